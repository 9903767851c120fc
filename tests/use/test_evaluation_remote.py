"""Rows whose media lie on a server: fetched once for answers, seconds and the page alike."""

import base64
import csv
import io
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from gemma_mlx.data.media import load_audio
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.evaluation import evaluate
from gemma_mlx.models.load import load


@pytest.fixture
def server(rows, tmp_path):
    """(address, names that were asked for) of a server of clips."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    for clip in rows.glob("*.wav"):
        shutil.copy(clip, folder)

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.strip("/"))
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_media_far_away(checkpoint_folder, rows, server, tmp_path):
    address, asked = server
    names = sorted(clip.name for clip in rows.glob("*.wav"))
    data = tmp_path / "test.csv"
    with data.open("w", newline="") as f:
        csv.writer(f).writerows([["audio_path", "text"], *([f"{address}/{name}", "alfa bravo"] for name in names)])
    fetcher = LazyFetcher([], hosts=["127.0.0.1"], folder=tmp_path / "cache")
    report = evaluate(*load(checkpoint_folder), data, tmp_path / "out", max_tokens=3, fetcher=fetcher)
    assert sorted(asked) == names
    page = (tmp_path / "out" / "report.html").read_text()
    clips = [base64.b64decode(c) for c in re.findall(r'src="data:audio/flac;base64,([^"]*)"', page)]
    seen = {len(soundfile.read(io.BytesIO(clip))[0]) for clip in clips}
    waves = [load_audio(rows / name) for name in names]
    assert len(clips) == len(names) and seen == {len(wave) for wave in waves}
    np.testing.assert_allclose([p.seconds for p in report.predictions], [len(wave) / 16000 for wave in waves])
