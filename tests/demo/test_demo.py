"""The embedded demo, run as the README runs it, and held to what the README says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import binom

from gemma_mlx.demo.run import CHECKPOINT, DATA, TESTS, binomial_interval
from gemma_mlx.lora import load_adapter
from gemma_mlx.models.load import load_model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(run folder, figures, what was printed)."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "run"
    command = [sys.executable, "-m", "gemma_mlx.train", "--demo", "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "demo.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_base_knows_its_own_domain(demo):
    before = demo[1]["before"]
    assert before["everyday"]["wer"] <= 0.08
    assert before["everyday"]["transcripts"] >= 100


@pytest.mark.slow
def test_it_learns_new_words_in_voices_it_never_heard(demo):
    before, after = demo[1]["before"]["nato"], demo[1]["after"]["nato"]
    assert before["transcripts"] >= 200
    assert before["wer"] >= 0.90
    assert after["wer"] <= 0.15


@pytest.mark.slow
def test_it_listens(demo):
    assert demo[1]["after"]["nato muted"]["wer"] >= 0.85


@pytest.mark.slow
def test_it_learns_to_read_digits(demo):
    before, after = demo[1]["before"]["digits"], demo[1]["after"]["digits"]
    assert before["answers"] >= 200
    assert before["exact_match"] < 0.30
    assert after["exact_match"] >= 0.90


@pytest.mark.slow
def test_it_looks(demo):
    low, high = demo[1]["commonest digit"]["interval"]
    assert low <= demo[1]["after"]["digits muted"]["exact_match"] <= high


@pytest.mark.slow
def test_what_it_leaves_and_prints(demo):
    out, figures, printed = demo
    for name in ("loss.png", "before_after.png", "metrics.jsonl", "config.yaml", "report.json"):
        assert (out / name).stat().st_size > 0
    for name in TESTS:
        assert (out / "scores" / name / "predictions.csv").is_file()
    assert f"{figures['after']['nato']['wer']:.1%}" in printed and f"{figures['before']['nato']['wer']:.1%}" in printed
    load_adapter(load_model(CHECKPOINT), out / "adapter")


def voices(name):
    return {Path(r["audio_path"]).stem.split("_", 1)[1] for r in rows(name) if r["audio_path"]}


def rows(name):
    return list(csv.DictReader((DATA / name).open()))


def test_held_out_voices_and_pictures_are_not_in_the_training_rows():
    assert voices("train.csv") and voices("test_nato.csv")
    assert not voices("train.csv") & (voices("test_nato.csv") | voices("test_everyday.csv"))
    seen = {Path(r["image_path"]).name for r in rows("train.csv") + rows("valid.csv") if r["image_path"]}
    assert not seen & {Path(r["image_path"]).name for r in rows("test_digits.csv")}


def test_the_checkpoint_is_small():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 12_000_000


@pytest.mark.parametrize("rows_", [50, 220, 1000])
@pytest.mark.parametrize("share", [0.1, 0.35])
def test_interval_against_scipy(share, rows_):
    low, high = binomial_interval(share, rows_)
    assert (low * rows_, high * rows_) == pytest.approx(binom.interval(0.95, rows_, share))
