"""Evaluation and the commands that use a trained model."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gemma_mlx.__main__ import verbs
from gemma_mlx.cli.door import enter
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.features import log_mel
from gemma_mlx.errors import InputError
from gemma_mlx.evaluating.identity import model_digests
from gemma_mlx.evaluation import Prediction, Report, evaluate, muted
from gemma_mlx.generation import generate
from gemma_mlx.models.load import load


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


# --- scores, groups, intervals


def said(row, task, reference, prediction, **facts):
    return Prediction(str(row), f"data/t.csv:{row}", task, reference, prediction, **facts)


TALK = [
    said(1, "transcript", "I'll take 21 colours", "i will take twenty one colors", language="en", seconds=1.5),
    said(2, "transcript", "zwei Äpfel", "zwei apfel", language="de", seconds=6.0),
    said(3, "transcript", "alfa bravo charlie", "alfa brave charlie", language="en", seconds=40.0, finish="length"),
    said(4, "answer", "Paris", "paris.", language="English", media=1),
    said(5, "answer", "the red house", "a red house", language="English"),
    said(6, "answer", "seven", "8"),
]


def test_each_row_is_normalised_in_its_language():
    """Against whisper_normalizer and jiwer directly."""
    import jiwer
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    cleans = {"en": EnglishTextNormalizer(), "de": BasicTextNormalizer()}
    pairs = [[cleans[p.language](text) for text in (p.reference, p.prediction)] for p in TALK[:3]]
    wanted = jiwer.wer(*map(list, zip(*pairs, strict=True)))
    assert wanted == pytest.approx(2 / 10)  # apfel, brave
    report = Report(tuple(TALK))
    assert report.scores["wer"] == pytest.approx(wanted)
    assert report.as_dict()["normalizer"].startswith("whisper (whisper-normalizer ")
    assert Report(tuple(TALK), "none").scores["wer"] > 0.5
    assert report.cut_off == 1 and "1 of 6 answers were cut off" in report.table()


def test_named_metrics_count_all_rows_and_equal_sacrebleu():
    import sacrebleu

    report = Report(tuple(TALK), metrics=("bleu", "chrf", "f1"))
    predictions, references = [p.prediction for p in TALK], [[p.reference for p in TALK]]
    assert list(report.scores) == ["rows", "bleu", "chrf", "f1"] and report.scores["rows"] == 6
    assert report.scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, references).score)
    assert report.scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score)
    assert "BLEU" in report.table() and "%" not in report.table().split("chrF")[0].split("BLEU")[1]


@pytest.mark.parametrize("name", ["wer", "exact_match", "chrf", "bleu"])
def test_a_right_row_has_no_error_and_a_wrong_one_has(name):
    rows = (said(1, "answer", "a b c d e f", "a b c d e f"), said(2, "answer", "a b c d e f", "u v w x y z"))
    right, wrong = Report(rows, metrics=(name,)).errors
    assert right == pytest.approx(0, abs=1e-9) and wrong == pytest.approx(100 if name in ("chrf", "bleu") else 1)


def test_groups_are_the_scores_of_their_rows_alone():
    report = Report(tuple(TALK), group_by=("language", "duration", "source", "task"))
    found = report.as_dict()["groups"]
    assert [(g["group"], g["rows"]) for g in found["language"]] == [("English", 4), ("German", 1), ("(none)", 1)]
    assert [(g["group"], g["rows"]) for g in found["task"]] == [("answer", 3), ("transcript", 3)]
    assert [g["group"] for g in found["duration"]] == ["0-2 s", "5-10 s", "30 s or more", "(none)"]
    assert found["source"][0]["rows"] == 6
    for by, chosen in (("language", lambda p: p.language in ("en", "English")), ("task", lambda p: p.task == "answer")):
        alone = Report(tuple(filter(chosen, TALK)))
        group = found[by][0]
        assert {n: group[n] for n in alone.scores if n in group} == {
            n: pytest.approx(v) for n, v in alone.scores.items() if n in group
        }
        for name, interval in alone.intervals.items():
            np.testing.assert_allclose(group["intervals"][name], interval)
    assert "By language" in report.table() and "30 s or more" in report.table()


def test_intervals_are_of_rows_or_of_clusters():
    """Rows said twice by each speaker: over rows the interval is too narrow by about √2."""
    r = np.random.default_rng(0)
    right = np.repeat(r.random(60) < 0.6, 2)
    rows = [said(i, "answer", "a", "a" if ok else "b", cells={"who": str(i // 2)}) for i, ok in enumerate(right)]
    by_rows, by_speakers = Report(tuple(rows)), Report(tuple(rows), cluster_by="who")
    width = lambda report: np.diff(report.intervals["exact_match"])[0]  # noqa: E731
    p = right.mean()
    assert width(by_rows) == pytest.approx(2 * 1.96 * (p * (1 - p) / 120) ** 0.5, rel=0.1)
    assert width(by_speakers) == pytest.approx(2 * 1.96 * (p * (1 - p) / 60) ** 0.5, rel=0.1)
    assert "bootstrap over who" in by_speakers.table()
    nameless = [said(i, "answer", "a", "a" if ok else "b", cells={"who": ""}) for i, ok in enumerate(right)]
    assert Report(tuple(nameless), cluster_by="who").intervals == by_rows.intervals


def test_one_row_has_no_interval(tmp_path):
    report = Report((TALK[0],))
    report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["intervals"]["wer"] == [None, None]
    assert " to " not in report.table() and "nan" not in report.table()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_keep_to_their_width(width):
    other = tuple(said(i, p.task, p.reference, "something else") for i, p in enumerate(TALK, 1))
    likely = [replace(p, likelihood=(90.0 + i, 10, i)) for i, p in enumerate(TALK)]
    likely_other = tuple(replace(p, likelihood=(5e3, 600, 1)) for p in other)
    report = Report(tuple(likely), group_by=("language",), other=likely_other)
    assert max(map(len, report.table(width).splitlines())) <= width
    assert width < 100 or "…" not in report.table(width).partition("normaliser:")[0]
    assert "[bold]" in Report((said(1, "answer", "x", "[bold]y[/]"), TALK[3])).table(width)


# --- another side


def random_pairs(count, seed):
    r = np.random.default_rng(seed)
    words = ["a", "b", "c", "d"]
    lines = lambda: [" ".join(r.choice(words, r.integers(1, 6))) for _ in range(count)]  # noqa: E731
    return lines(), lines(), lines()


def test_a_comparison_is_the_two_evaluations_and_their_difference(tmp_path):
    references, first, second = random_pairs(40, 4)
    own = tuple(said(i, "transcript", *pair) for i, pair in enumerate(zip(references, first, strict=True)))
    other = tuple(said(i, "transcript", *pair) for i, pair in enumerate(zip(references, second, strict=True)))
    report = Report(own, other=other)
    report.write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["comparison"]
    alone = Report(other).scores
    assert found["with"] == "base" and found["wer"]["other"] == alone["wer"]
    assert abs(found["wer"]["difference"]) > 0.01
    assert found["wer"]["difference"] == pytest.approx(report.scores["wer"] - alone["wer"])
    low, high = found["wer"]["interval"]
    assert low < found["wer"]["difference"] < high and 0 < found["wer"]["p_value"] <= 1
    written = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [w["other_prediction"] for w in written] == second
    gains = {w["row_id"]: float(w["other_errors"]) - float(w["errors"]) for w in written}
    assert found["wer"]["better"]["rows"] == sum(g > 0 for g in gains.values())
    assert found["wer"]["worse"]["rows"] == sum(g < 0 for g in gains.values())
    first_better = [gains[row] for row in found["wer"]["better"]["first"]]
    assert first_better == sorted(first_better, reverse=True) and min(first_better) > 0
    assert Report(own, other=own).compared[0].paired.p_value == 1.0


@pytest.fixture(scope="module")
def tuned(checkpoint_folder, rows, tmp_path_factory):
    """Two adapters that change what is said."""
    import mlx.core as mx

    from gemma_mlx.lora import apply_lora, lora_layers, save_adapter

    folders = []
    for seed in (1, 2):
        model, _ = load(checkpoint_folder)
        apply_lora(model, "decoder", 2, 8.0)
        mx.random.seed(seed)
        for layer in lora_layers(model).values():
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
        folders.append(save_adapter(model, tmp_path_factory.mktemp("tuned") / f"{seed}"))
    return folders


def answers_of(loaded, scored, **options):
    return [p.prediction for p in evaluate(*loaded, scored, max_tokens=3, limit=4, **options).predictions]


@pytest.mark.parametrize("side", ["base", "adapter"])
def test_another_side_answers_as_it_does_alone(checkpoint_folder, scored, tuned, side):
    model, processor = load(checkpoint_folder, adapter=tuned[0])
    compare, name = ("base", "base") if side == "base" else (tuned[1], "other")
    alone = load(checkpoint_folder) if side == "base" else load(checkpoint_folder, adapter=tuned[1])
    own = answers_of((model, processor), scored)
    report = evaluate(model, processor, scored, max_tokens=3, limit=4, compare=compare, likelihood=True)
    assert [p.prediction for p in report.predictions] == own
    assert [p.prediction for p in report.other] == answers_of(alone, scored) != own
    assert report.other_name == name and {"wer", "perplexity"} <= {c.own.name for c in report.compared}
    assert answers_of((model, processor), scored) == own


def test_the_report_says_what_was_compared(checkpoint_folder, scored, tuned, tmp_path):
    model, processor = load(checkpoint_folder, adapter=tuned[0])
    evaluate(model, processor, scored, tmp_path, max_tokens=1, limit=2, compare="base")
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["model"]["adapter"] == [str(tuned[0])] and told["compare"] == "base"
    digests = model_digests(load(checkpoint_folder)[0])
    assert told["model"]["sha256"] == digests["model"] and digests["adapter"] == "none"
    assert told["data"]["source"] == str(scored) and told["settings"]["batch_size"] == "8"
    assert f"Adapter: {tuned[0]}" in (tmp_path / "report.html").read_text()


def test_an_earlier_file_is_another_side(checkpoint_folder, loaded, scored, tuned, tmp_path):
    model, processor = load(checkpoint_folder, adapter=tuned[0])
    before = evaluate(*loaded, scored, tmp_path / "before", max_tokens=2, limit=4)
    file = tmp_path / "before" / "predictions.csv"
    report = evaluate(model, processor, scored, max_tokens=2, limit=4, compare=file)
    both = evaluate(model, processor, scored, max_tokens=2, limit=4, compare="base")
    assert report.other == tuple(p for p in before.predictions) and report.other_name == "earlier"
    assert [c.paired for c in report.compared] == [c.paired for c in both.compared]
    text = file.read_text()
    for changed, told in (
        (text.replace("alfa", "golf", 1), "had another reference there"),
        ("\n".join(text.splitlines()[:-1]) + "\n", "no answer to"),
        (text.replace("row_id", "name", 1), "no column 'row_id'"),
    ):
        file.write_text(changed)
        with pytest.raises(InputError, match=told):
            evaluate(model, processor, scored, max_tokens=2, limit=4, compare=file)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compare": "base"}, "the model has no adapter"),
        ({"compare": "nowhere.csv"}, r"nowhere\.csv: cannot be read"),
        ({"compare": "nowhere/"}, "nowhere"),
        ({"metrics": ["blue"]}, "--metrics blue: unknown; did you mean bleu"),
        ({"metrics": ["zzzz"]}, "known: wer, cer"),
        ({"normalize": "wisper"}, "normalize: expected whisper"),
        ({"group_by": ["durration"]}, "--group-by durration: no such column; did you mean 'duration'"),
        ({"group_by": ["questionn"]}, "did you mean 'question'"),
        ({"cluster_by": "zz"}, "--cluster-by zz: no such column; known: language"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_answer(loaded, scored, tmp_path, monkeypatch, options, told):
    monkeypatch.setattr("gemma_mlx.evaluating.answering.answers", None)
    with pytest.raises(InputError, match=told):
        evaluate(*loaded, scored, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_reference_is_told(loaded):
    from gemma_mlx.data.examples import Example, Text, Turn

    bare = Example((Turn("user", (Text("hello"),)),), "x.csv:7")
    with pytest.raises(InputError, match=r"x\.csv:7: no reference"):
        evaluate(*loaded, [bare])
    with pytest.raises(InputError, match="no rows"):
        evaluate(*loaded, [])


def test_columns_group_rows_and_stand_in_the_file(loaded, tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("id,prompt,response,topic,lang\nx,say a,a,letters,en\ny,say 1,1,digits,de\nz,say b,b,letters,\n")
    options = {"max_tokens": 2, "columns": {"language": "lang"}, "language": "fr"}
    report = evaluate(*loaded, path, tmp_path / "out", group_by=["topic", "language"], **options)
    assert [(g.name, g.rows) for g in report.groups["topic"]] == [("letters", (0, 2)), ("digits", (1,))]
    assert [p.language for p in report.predictions] == ["en", "de", "fr"]
    written = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [w["topic"] for w in written] == ["letters", "digits", "letters"]
    assert [w["row_id"] for w in written] == ["x", "y", "z"] and {w["source"] for w in written} == {"test.csv"}
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["data"]["rows"] == 3 and told["model"]["adapter_sha256"] == "none"
    assert told["settings"]["max_tokens"] == "2"
