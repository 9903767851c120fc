"""A prepared folder is there whole or not at all, whatever ends the run."""

import errno
import signal
import subprocess
import sys
import time

import pytest
from prepared_rows import table

from gemma_mlx.errors import InputError
from gemma_mlx.preparing.staging import staging


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_interrupted_process_leaves_nothing(tmp_path):
    path = table(tmp_path / "t.csv", [{"prompt": f"question {i}", "response": "answer " * 20} for i in range(60_000)])
    code = "from gemma_mlx.__main__ import main; main()"
    arguments = ["prepare", str(path), "--out", str(tmp_path / "o"), "--split", "0.9"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    partial, deadline = tmp_path / ".o.partial" / "bad_rows.csv", time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert partial.exists()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert names(tmp_path) == ["t.csv"]


def test_two_processes_do_not_meet(tmp_path):
    with staging(tmp_path / "o") as one:
        (one.path / "report.json").write_text("{}")
        with pytest.raises(InputError, match="another process"), staging(tmp_path / "o"):
            pass
        assert (one.path / "report.json").exists()
        one.publish(finished=True)
    assert names(tmp_path) == ["o"] and names(tmp_path / "o") == ["report.json"]


def test_downloads_outlive_a_failure_but_not_a_success(tmp_path):
    with pytest.raises(RuntimeError), staging(tmp_path / "o") as one:
        one.downloads.mkdir()
        (one.downloads / "a.wav").write_bytes(b"a")
        (one.path / "train.csv").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == [".o.partial"]
    with staging(tmp_path / "o") as two:
        assert two.kept() == 1 and names(two.path) == ["downloads", "lock"]
        two.publish(finished=True)
    assert names(tmp_path) == ["o"] and not names(tmp_path / "o")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_line(tmp_path, number):
    with pytest.raises(InputError, match="cannot be written"), staging(tmp_path / "o"):
        raise OSError(number, "no room")
    assert not names(tmp_path)


def test_what_may_be_replaced(tmp_path):
    (tmp_path / "o").mkdir()
    for made, fine in (
        (["report.json", "bad_rows.csv"], True),
        (["bad_rows.csv"], False),
        (["report.json", "x"], False),
    ):
        for name in names(tmp_path / "o"):
            (tmp_path / "o" / name).unlink()
        for name in made:
            (tmp_path / "o" / name).write_text("old")
        if fine:
            with staging(tmp_path / "o") as place:
                (place.path / "report.json").write_text("new")
                place.publish(finished=True)
            assert names(tmp_path / "o") == ["report.json"]
        else:
            with pytest.raises(InputError, match="not empty"), staging(tmp_path / "o"):
                pass
            assert names(tmp_path / "o") == sorted(made)
    (tmp_path / "link").symlink_to(tmp_path / "o")
    with pytest.raises(InputError, match="no folder"), staging(tmp_path / "link"):
        pass
