"""The whole path on recordings of people: LibriVox clips with their text, from Debian's pocketsphinx-testdata."""

import csv
import re
from pathlib import Path

import pytest

from gemma_mlx.demo.run import CHECKPOINT, RECIPE
from gemma_mlx.evaluation import evaluate
from gemma_mlx.loop import finetune
from gemma_mlx.models.load import load

CLIPS = Path("/usr/share/pocketsphinx/test/data/librivox")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A CSV elsewhere, so that the clips are found through a media root."""
    if not CLIPS.is_dir():
        pytest.fail("the LibriVox clips are missing: apt-get install pocketsphinx-testdata")
    path = tmp_path_factory.mktemp("librivox") / "train.csv"
    lines = (CLIPS / "transcription").read_text().splitlines()
    found = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line).groups() for line in lines]
    with path.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["audio_path", "text"])
        out.writerows((f"{name}.wav", text) for text, name in found)
    return path


@pytest.mark.slow
def test_the_demo_run_fits_real_recordings(recordings, tmp_path):
    options = {**RECIPE, "batch_size": 5, "eval_every": 0}
    base, processor = load(CHECKPOINT)
    before = evaluate(base, processor, recordings, media_roots=[CLIPS], max_tokens=200)
    run = finetune(str(CHECKPOINT), data=recordings, media_root=[str(CLIPS)], out=tmp_path / "run", **options)
    tuned, processor = load(CHECKPOINT, adapter=run.adapter)
    after = evaluate(tuned, processor, recordings, media_roots=[CLIPS], max_tokens=200)
    print(f"five LibriVox clips: WER {before.scores['wer']:.1%} before, {after.scores['wer']:.1%} after")
    assert before.scores["wer"] > 0.8
    assert after.scores["wer"] < 0.1
