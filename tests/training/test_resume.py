"""A run that is killed anywhere and resumed is the run that was never killed, bit for bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.loop import finetune

TIMED = {"tokens_per_second", "step_seconds", "data_wait", "peak_memory_gb"}
STEPS = 24
ENVIRONMENT = {**os.environ, "GEMMA_MLX_COMPILE": "off", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def options(checkpoint_folder, rows, out):
    return {
        "model": str(checkpoint_folder), "data": str(rows / "train.csv"), "valid": str(rows / "valid.csv"),
        "out": str(out), "steps": STEPS, "batch_size": 4, "accumulate": 2, "rank": 2, "dropout": 0.1, "lr": 0.01,
        "save_every": 3, "eval_every": 5, "log_every": 2, "seed": 11,
    }  # fmt: skip


def words(values):
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "gemma_mlx.train", *arguments],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def trace(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def adapter(out):
    return (out / "adapter" / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(checkpoint_folder, rows, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(words(options(checkpoint_folder, rows, out)))
    assert process.wait(120) == 0, process.stderr.read()
    assert len([line for line in trace(out) if "loss" in line]) == STEPS // 2
    return out


def wait_for_step(out, step, process):
    """Until metrics.jsonl has reached ``step`` (log lines come every second step)."""
    pattern = re.compile(r'"step": (\d+), "loss"')
    while process.poll() is None:
        path = out / "metrics.jsonl"
        found = pattern.findall(path.read_text()) if path.exists() else []
        if found and int(found[-1]) >= step:
            return
        time.sleep(0.002)


def test_killed_at_five_random_moments(checkpoint_folder, rows, whole, tmp_path):
    out, r = tmp_path / "run", random.Random(5)
    arguments, kills = words(options(checkpoint_folder, rows, out)), 0
    for moment in sorted(r.sample(range(1, STEPS - 1), 5)):
        process = start(arguments)
        wait_for_step(out, moment, process)
        time.sleep(r.random() * 0.05)  # anywhere in the step, in a write, or in a validation
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        arguments = ["--resume", "--out", str(out)]
    assert kills == 5
    process = start(arguments)
    assert process.wait(120) == 0, process.stderr.read()
    assert trace(out) == trace(whole)
    assert adapter(out) == adapter(whole)
    assert (out / "rows.jsonl").read_bytes() == (whole / "rows.jsonl").read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("signum,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(checkpoint_folder, rows, whole, tmp_path, signum, code):
    out = tmp_path / "run"
    process = start(words(options(checkpoint_folder, rows, out)))
    wait_for_step(out, 8, process)
    process.send_signal(signum)
    assert process.wait(60) == code
    lines = process.stderr.read().splitlines()
    assert "--resume" in lines[-1] and str(out) in lines[-1] and not any("Traceback" in line for line in lines)
    step = int(re.search(r"stopped at step (\d+)", lines[-1])[1])
    assert (out / "checkpoints" / f"step-{step:06d}").is_dir() and 8 <= step < STEPS
    assert start(["--resume", "--out", str(out)]).wait(120) == 0
    assert trace(out) == trace(whole) and adapter(out) == adapter(whole)


@pytest.fixture
def stopped(checkpoint_folder, rows, tmp_path, monkeypatch):
    """A run of 6 of 24 steps, with checkpoints 3 and 6, as a crash leaves it."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    given = options(checkpoint_folder, rows, tmp_path / "run") | {"accumulate": 1}
    model = given.pop("model")

    def crash(job, *_):
        if job.progress.step == 8:
            raise OSError("the machine went down")
        return original(job, *_)

    from gemma_mlx import loop

    original = loop.Job.advance
    with monkeypatch.context() as patch:
        patch.setattr(loop.Job, "advance", crash)
        with pytest.raises(OSError, match="went down"):
            finetune(model, quiet=True, **given)
    return model, given


def test_a_damaged_checkpoint_falls_back_with_one_line(stopped, capfd):
    model, given = stopped
    newest = tmp = given["out"] + "/checkpoints/step-000006/adapter.safetensors"
    with open(newest, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    resumed = finetune(model, quiet=True, resume=True, out=given["out"])
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and tmp.rsplit("/", 1)[0] in warnings[0]
    clean = finetune(model, quiet=True, **{**given, "out": given["out"] + "-clean"})
    assert adapter(resumed.folder) == adapter(clean.folder) and trace(resumed.folder) == trace(clean.folder)


def test_what_may_change_on_resume_and_what_not(stopped, rows):
    model, given = stopped
    for name, value in (("rank", 4), ("lr", 0.5), ("batch_size", 2), ("seed", 3), ("data", str(rows / "media.csv"))):
        with pytest.raises(InputError, match=rf"^{name}: .*started with"):
            finetune(model, quiet=True, **{**given, "resume": True, name: value})
    run = finetune(model, quiet=True, **{**given, "resume": True, "steps": 10, "eval_every": 2, "log_every": 1})
    assert run.report["steps"] == 10 and run.history[-1]["step"] == 10


def test_changed_rows_are_refused(stopped, tmp_path, rows):
    model, given = stopped
    from pathlib import Path

    copy = tmp_path / "copy.csv"
    copy.write_bytes((rows / "train.csv").read_bytes())
    config = Path(given["out"]) / "config.yaml"
    config.write_text(config.read_text().replace(given["data"], str(copy)))
    copy.write_bytes(copy.read_bytes().replace(b"alfa", b"olfa"))
    with pytest.raises(InputError, match="changed since the run began"):
        finetune(model, quiet=True, resume=True, out=given["out"])


def test_a_run_folder_is_not_overwritten(stopped):
    model, given = stopped
    with pytest.raises(InputError, match="holds a run already"):
        finetune(model, quiet=True, **given)
