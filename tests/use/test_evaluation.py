"""Evaluation and the commands that use a trained model."""

import csv
import json
import re

import numpy as np
import pytest

from gemma_mlx.__main__ import verbs
from gemma_mlx.cli.door import enter
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.features import log_mel
from gemma_mlx.evaluation import Prediction, Report, evaluate, muted
from gemma_mlx.generation import generate
from gemma_mlx.models.load import load


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    return load(checkpoint_folder)


@pytest.fixture(scope="module")
def scored(rows):
    """media.csv without its rows of mere text, which have nothing to be asked."""
    source = list(csv.DictReader((rows / "media.csv").open()))
    path = rows / "scored.csv"
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, source[0])
        out.writeheader()
        out.writerows(r for r in source if r["audio_path"] or r["image_path"])
    return path


def verb(*arguments):
    return enter(verbs, [str(a) for a in arguments], name="gemma-mlx")


def test_scores_are_those_of_the_answers_that_generate_gives(loaded, scored, tmp_path):
    model, processor = loaded
    seen = []
    report = evaluate(
        model, processor, scored, tmp_path, max_tokens=6, batch_size=3, progress=lambda *at: seen.append(at)
    )
    examples = read_examples(scored)
    assert [p.reference for p in report.predictions] == [e.reference for e in examples]
    source = list(csv.DictReader(scored.open()))
    assert [p.task for p in report.predictions] == ["transcript" if r["audio_path"] else "answer" for r in source]
    answers = generate(model, processor, examples, max_tokens=6, batch_size=1)
    assert [p.prediction for p in report.predictions] == answers
    assert any(answers), "an untrained model should say something"
    assert report.scores["transcripts"] == 4 and report.scores["answers"] == 3
    assert seen[-1] == (7, 7)
    written = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [w["prediction"] for w in written] == answers
    assert json.loads((tmp_path / "report.json").read_text())["wer"] == report.scores["wer"]


def test_a_report_counts_what_is_right():
    report = Report((
        Prediction("1", "a:2", "transcript", "Alpha, bravo", "alpha bravo"),
        Prediction("2", "a:3", "transcript", "charlie delta", "charlie"),
        Prediction("3", "a:4", "answer", "7", " 7."),
        Prediction("4", "a:5", "answer", "eight", "nine"),
    ))  # fmt: skip
    assert report.scores == {
        "transcripts": 2, "wer": 0.25, "cer": 6 / 24, "answers": 2, "exact_match": 0.5, "f1": 0.5, "anls": 0.0,
    }  # fmt: skip
    assert Report(report.predictions, "none").scores["exact_match"] == 0.0
    assert re.search(r"WER\W+2\W+25\.00%", report.table()) and re.search(r"exact match\W+2\W+50\.00%", report.table())


def test_muted_clips_equal_digital_silence_and_pictures_are_grey(loaded, scored):
    _, processor = loaded
    batch = collate([processor.prompt(e) for e in read_examples(scored)], pad_id=processor.pad_id)
    quiet = muted(batch)
    for clip, mask in zip(quiet.input_features, quiet.input_features_mask, strict=True):
        n = int(mask.sum())
        np.testing.assert_allclose(clip[:n], log_mel(np.zeros(160 * n + 1, np.float32)), atol=1e-6)
        assert not clip[n:].any()
    valid = (quiet.image_position_ids >= 0).all(-1)
    assert (quiet.pixel_values[valid] == 0.5).all() and not quiet.pixel_values[~valid].any()
    assert not quiet.digests
    assert quiet.input_features.shape == batch.input_features.shape
    assert quiet.pixel_values.dtype == quiet.input_features.dtype == np.float32


def test_evaluate_and_generate_from_the_command_line(checkpoint_folder, scored, rows, tmp_path, capsys):
    out = tmp_path / "scores"
    common = ("--model", checkpoint_folder, "--image-tokens", 70)
    assert verb("evaluate", *common, "--data", scored, "--out", out, "--max-tokens", 3, "--limit", 5) == 0
    assert re.search(r"WER\W+3\W+\d+\.\d\d%\W+\d+\.\d\d% to \d", capsys.readouterr().out)
    assert len(list(csv.DictReader((out / "predictions.csv").open()))) == 5
    assert verb("generate", *common, "--audio", rows / "0.wav", "--image", rows / "1.png", "--max-tokens", 3) == 0
    assert verb("generate", *common, "--prompt", "hello", "--temperature", 0.7, "--seed", 1, "--max-tokens", 3) == 0


def test_commands_use_an_adapter_as_its_run_did(checkpoint_folder, rows, tmp_path, monkeypatch):
    from gemma_mlx.loop import finetune

    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    run = finetune(
        str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / "run", steps=1, rank=2, image_tokens=70,
        quiet=True, audio_prompt="Listen.", audio_window=13, system="Be brief.", targets="audio",
    )  # fmt: skip
    model, processor = load(checkpoint_folder, adapter=run.adapter)
    assert model.model.audio_tower.layers[0].self_attn.window == 13 and processor.image_tokens == 70
    asked = {}

    def spy(model, processor, data, out, *, prompts, **options):
        asked.update(prompts=prompts, tokens=processor.image_tokens, window=model.spec.audio.attention_window)
        return Report(())

    monkeypatch.setattr("gemma_mlx.evaluation.evaluate", spy)
    common = ("evaluate", "--model", checkpoint_folder, "--adapter", run.adapter, "--data", rows / "media.csv")
    assert verb(*common) == 0
    assert (asked["prompts"].audio, asked["prompts"].system) == ("Listen.", "Be brief.")
    assert (asked["tokens"], asked["window"]) == (70, 13)
    assert verb(*common, "--audio-prompt", "Write.", "--audio-window", 12) == 0
    assert asked["prompts"].audio == "Write." and asked["window"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--data", "x.csv"), "--model"),
        (("evaluate", "--model", "CHECKPOINT", "--data", "missing.csv"), "missing.csv"),
        (("evaluate", "--model", "CHECKPOINT", "--data", "ROWS/train.csv", "--adapter", "ROWS"), "no adapter here"),
        (("evaluate", "--model", "CHECKPOINT", "--data", "ROWS/media.csv"), r"media.csv:4: nothing but text"),
        (("evaluate", "--model", "CHECKPOINT", "--data", "ROWS/train.csv", "--out", "ROWS/train.csv"), "--out"),
        (("generate", "--model", "CHECKPOINT"), "nothing to answer"),
        (("generate", "--model", "CHECKPOINT", "--audio", "ROWS/train.csv"), "train.csv"),
        (("generate", "--model", "nowhere/", "--prompt", "x"), "nowhere/"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, checkpoint_folder, rows, capsys):
    known = {"CHECKPOINT": str(checkpoint_folder), "ROWS": str(rows)}
    filled = [known.get(a, re.sub("^ROWS", str(rows), a)) for a in arguments]
    assert verb(*filled) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and re.search(message, told.err), told.err
