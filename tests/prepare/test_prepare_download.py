"""prepare --download against a server on this machine that counts what it gives."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prepared_rows import read_csv, read_jsonl, table

from gemma_mlx.data.dataset import read_examples


@pytest.fixture
def server(folder):
    """(host:port, bytes of content sent so far by path)."""
    sent: dict[str, int] = {}

    class Files(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = folder / self.path.lstrip("/").split("?")[0]
            data = path.read_bytes() if path.is_file() else None
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            if data is not None:
                self.send_header("ETag", f'"{hash(data)}"')
            self.end_headers()
            if self.command == "GET" and data is not None:
                self.wfile.write(data)
                sent[self.path] = sent.get(self.path, 0) + len(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{http.server_port}", sent
    http.shutdown()
    http.server_close()


def rows(host, *names):
    return [{"id": i, "audio_url": f"http://{host}/{name}", "text": f"text {i}"} for i, name in enumerate(names)]


def test_urls_become_files(server, folder, run, tmp_path):
    host, sent = server
    apart = tmp_path / "apart"
    apart.mkdir()
    path = table(apart / "t.csv", rows(host, "a.wav", "b.wav", "a.wav?again=1"))
    flags = ("--download", "--allow-host", host, "--media-cache-dir", tmp_path / "cache")
    code, out, err = run(path, "--out", tmp_path / "o", *flags)
    assert code == 0, out + err
    written = read_csv(tmp_path / "o" / "train.csv")
    assert "audio_url" not in written[0] and not any("apart" in row["audio_path"] for row in written)
    assert [(tmp_path / "o" / row["audio_path"]).read_bytes() for row in written] == [
        (folder / name).read_bytes() for name in ("a.wav", "b.wav", "a.wav")
    ]
    assert sum(sent.values()) == sum((folder / name).stat().st_size for name in ("a.wav", "b.wav", "a.wav"))
    assert [e.reference for e in read_examples(tmp_path / "o" / "train.csv")] == ["text 0", "text 1", "text 2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["apart", "cache", "data", "o"]


def test_a_second_run_fetches_only_what_is_missing(server, folder, run, tmp_path):
    host, sent = server
    path = table(folder / "t.csv", rows(host, "a.wav", "nowhere.wav", "b.wav", "c.wav"))
    flags = ("--download", "--convert", "flac", "--allow-host", host)
    code, _, err = run(path, "--out", tmp_path / "o", *flags, "--media-cache-dir", tmp_path / "one")
    assert code == 2 and "3 downloaded files are kept" in err
    (bad,) = read_csv(tmp_path / "o" / "bad_rows.csv")
    assert bad["where"] == f"{path}:3" and "cannot be fetched" in bad["reason"] and "nowhere.wav" in bad["reason"]
    assert not (tmp_path / "o" / "train.csv").exists()
    kept = {p.name.split("-")[0]: p for p in (tmp_path / ".o.partial" / "downloads").rglob("*.wav")}
    assert sorted(kept) == ["a", "b", "c"]
    kept["b"].write_bytes(kept["b"].read_bytes()[:100])  # not whole
    sent.clear()
    more = ("--media-cache-dir", tmp_path / "two", "--on-bad-row", "skip")
    code, _, err = run(path, "--out", tmp_path / "o", *flags, *more)
    assert code == 0, err
    assert sent == {"/b.wav": (folder / "b.wav").stat().st_size}
    assert [row["id"] for row in read_csv(tmp_path / "o" / "train.csv")] == ["0", "2", "3"]
    assert not (tmp_path / ".o.partial").exists()
    assert all(row["audio_path"].endswith(".flac") for row in read_csv(tmp_path / "o" / "train.csv"))


def test_what_may_not_be_fetched_is_a_bad_row(server, folder, run, tmp_path):
    host, sent = server
    urls = [f"http://{host}/a.wav", f"file://{folder}/a.wav", "ftp://x/a.wav", "not a url", "http://[::1"]
    path = table(folder / "t.csv", [{"audio_url": url, "text": "x"} for url in urls])
    code, _, _ = run(path, "--out", tmp_path / "o", "--download", "--media-cache-dir", tmp_path / "cache")
    assert code == 2 and not sent
    bad = read_csv(tmp_path / "o" / "bad_rows.csv")
    assert [row["where"] for row in bad] == [f"{path}:{line}" for line in range(2, 7)]
    assert not list(tmp_path.glob(".o.partial/downloads/**/*.wav"))


def test_a_path_comes_before_a_url(server, folder, run, tmp_path):
    host, sent = server
    given = rows(host, "a.wav", "b.wav")
    given[0]["audio_path"] = "c.wav"
    path = table(folder / "t.csv", given)
    flags = ("--download", "--allow-host", host, "--media-cache-dir", tmp_path / "cache")
    assert run(path, "--out", tmp_path / "o", *flags)[0] == 0
    first, second = read_csv(tmp_path / "o" / "train.csv")
    assert (tmp_path / "o" / first["audio_path"]).read_bytes() == (folder / "c.wav").read_bytes()
    assert (tmp_path / "o" / second["audio_path"]).read_bytes() == (folder / "b.wav").read_bytes()
    assert list(sent) == ["/b.wav"]


def test_a_column_of_urls_that_is_read_as_it_is(server, folder, run, tmp_path):
    host, _ = server
    path = table(folder / "t.csv", rows(host, "a.wav"))
    flags = ("--download", "--allow-host", host, "--media-cache-dir", tmp_path / "cache")
    assert run(path, "--out", tmp_path / "o", *flags, "--columns", "audio_path=audio_url")[0] == 0
    (row,) = read_csv(tmp_path / "o" / "train.csv")
    assert (tmp_path / "o" / row["audio_url"]).read_bytes() == (folder / "a.wav").read_bytes()


def test_urls_stay_where_they_are_unless_asked_for(server, folder, run, tmp_path):
    host, sent = server
    url = f"http://{host}/a.wav"
    path = table(folder / "t.csv", [{"audio_path": url, "text": "x"}, {"audio_path": "b.wav", "text": "y"}])
    flags = ("--allow-host", host, "--media-cache-dir", tmp_path / "cache")
    assert run(path, "--out", tmp_path / "o", *flags, "--write", "csv")[0] == 0
    first, second = read_csv(tmp_path / "o" / "train.csv")
    assert first["audio_path"] == url and second["audio_path"].startswith("media/")
    assert run(path, "--out", tmp_path / "p", *flags, "--convert", "flac")[0] == 0
    assert [row["audio_path"][-5:] for row in read_csv(tmp_path / "p" / "train.csv")] == [".flac"] * 2
    assert len(sent) == 1


def test_relative_paths_of_a_table_far_away_become_urls(server, folder, run, tmp_path):
    host, _ = server
    table(folder / "t.csv", [{"audio_path": "a.wav", "text": "x"}, {"audio_path": "nowhere.wav", "text": "y"}])
    flags = ("--media-cache-dir", tmp_path / "cache", "--on-bad-row", "skip")
    code, _, err = run(f"http://{host}/t.csv", "--out", tmp_path / "o", "--write", "jsonl", *flags)
    assert code == 0, err
    (example,) = read_jsonl(tmp_path / "o" / "train.jsonl")
    assert example["audio_path"] == f"http://{host}/a.wav"
    (bad,) = read_csv(tmp_path / "o" / "bad_rows.csv")
    assert bad["where"] == f"http://{host}/t.csv:3"
