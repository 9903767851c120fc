"""A stopped evaluation goes on where it was: no finished row again, and the same bytes as if it had not stopped."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.evaluating import answering
from gemma_mlx.evaluating.answering import batches_of
from gemma_mlx.evaluating.ledger import opened
from gemma_mlx.evaluation import FINISHED, FINISHED_OTHER, evaluate
from gemma_mlx.lora import apply_lora, lora_layers
from gemma_mlx.models.load import load

OPTIONS = {"max_tokens": 2, "batch_size": 4, "page": False}
COUNT = 60
"""Rows: four chunks of 16."""


def write_rows(path, count, seed=0):
    """Questions of many lengths, some with another row's id or an odd text."""
    r = random.Random(seed)
    with path.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["id", "prompt", "response", "language"])
        for i in range(count):
            words = " ".join(r.choice(["alfa", "bravo", "echo", "größe", "東京"]) for _ in range(r.randint(1, 12)))
            out.writerow([f"row-{i}", f"Repeat: {words}", words, r.choice(["en", "de", ""])])
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    return load(checkpoint_folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("questions") / "test.csv", COUNT)


@pytest.fixture
def asked(monkeypatch):
    """Rows in the order in which they were asked; stops as one pulls the plug before chunk `asked.stop_before`."""

    class Asked(list):
        stop_before = None

    seen, real = Asked(), answering.answers

    def spy(model, processor, examples, *rest, **more):
        if seen.stop_before is not None and seen.stop_before == 0:
            raise KeyboardInterrupt
        seen.stop_before = None if seen.stop_before is None else seen.stop_before - 1
        seen.extend(e.row_id for e in examples)
        return real(model, processor, examples, *rest, **more)

    monkeypatch.setattr(answering, "answers", spy)
    return seen


def files(folder):
    names = ("predictions.csv", "report.json", "report.html")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_stopped_again_and_again_it_gives_the_same_bytes(loaded, questions, asked, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(*loaded, questions, whole, **{**OPTIONS, "page": True})
    assert len(asked) == COUNT
    asked.clear()
    for chunks in (1, 0, 2):
        asked.stop_before = chunks
        with pytest.raises(KeyboardInterrupt):
            evaluate(*loaded, questions, parts, **OPTIONS)
        assert not files(parts)
    asked.stop_before, seen = None, []
    report = evaluate(*loaded, questions, parts, **{**OPTIONS, "page": True}, progress=lambda *at: seen.append(at))
    assert len(asked) == COUNT and len(set(asked)) == COUNT
    assert len(files(parts)) == 3 and files(parts) == files(whole) and len(report.predictions) == COUNT
    assert seen[-1] == (COUNT, COUNT) and seen[0][0] > 0
    asked.clear()
    evaluate(*loaded, questions, parts, **OPTIONS, normalize="none", metrics=["chrf"])
    assert not asked, "other scores of the same answers"
    assert json.loads((parts / "report.json").read_text())["normalize"] == "none"


@pytest.fixture(scope="module")
def all_finished(loaded, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all finished")
    evaluate(*loaded, questions, folder, **OPTIONS)
    return folder


@pytest.mark.parametrize("cut", [1, 17])
def test_a_torn_line_is_a_chunk_to_do_again(loaded, questions, all_finished, asked, tmp_path, cut):
    before, ledger = files(all_finished), tmp_path / FINISHED
    data = (all_finished / FINISHED).read_bytes()
    ledger.write_bytes(data[:-cut])
    last = {record["i"] for record in json.loads(data.splitlines()[-1])}
    evaluate(*loaded, questions, tmp_path, **OPTIONS)
    assert set(asked) == {f"row-{i}" for i in last} and len(asked) == len(last)
    assert files(tmp_path) == before and ledger.read_bytes() == data


def test_a_head_cut_short_starts_anew(loaded, questions, tmp_path):
    (tmp_path / FINISHED).write_bytes(b'{"format": 1, "ident')
    evaluate(*loaded, questions, tmp_path, limit=3, **OPTIONS)
    assert len((tmp_path / FINISHED).read_bytes().splitlines()) == 2


@pytest.fixture(scope="module")
def finished(loaded, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    evaluate(*loaded, questions, folder, limit=8, **OPTIONS)
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_tokens": 5}, r"max_tokens 2, now 5"),
        ({"batch_size": 8}, r"batch_size 4, now 8"),
        ({"without_media": True}, r"without_media False, now True"),
        ({"likelihood": True}, r"likelihood False, now True"),
        ({"limit": 7}, r"other data, other prompts"),
    ],
)
def test_other_settings_are_refused(loaded, questions, finished, change, told):
    before = (finished / FINISHED).read_bytes()
    with pytest.raises(InputError, match=rf"its answers are of another evaluation \({told}\).*--restart"):
        evaluate(*loaded, questions, finished, **{**OPTIONS, "limit": 8, **change})
    assert (finished / FINISHED).read_bytes() == before


def test_other_rows_models_and_adapters_are_refused(checkpoint_folder, loaded, questions, finished, tmp_path):
    model, processor = load(checkpoint_folder)
    options = {**OPTIONS, "limit": 8}
    other = tmp_path / "test.csv"
    other.write_text(questions.read_text().replace("alfa", "golf", 1))
    with pytest.raises(InputError, match=r"\(other data, other prompts\)"):
        evaluate(model, processor, other, finished, **options)
    apply_lora(model, "decoder", 2, 4.0)
    with pytest.raises(InputError, match=r"\(other adapter\)"):
        evaluate(model, processor, questions, finished, **options)
    with_adapter = tmp_path / "adapter"
    evaluate(model, processor, questions, with_adapter, **options)
    layer = next(iter(lora_layers(model).values()))
    layer.lora_b = layer.lora_b + 1e-3 * mx.array(np.eye(*layer.lora_b.shape, dtype=np.float32))
    with pytest.raises(InputError, match=r"\(other adapter\)"):
        evaluate(model, processor, questions, with_adapter, **options)
    model, processor = load(checkpoint_folder)
    norm = model.model.language_model.norm
    norm.weight = norm.weight * 1.001
    with pytest.raises(InputError, match=r"\(other model\)"):
        evaluate(model, processor, questions, finished, **options)
    with pytest.raises(InputError, match=r"\(other model\)"):
        evaluate(*load(checkpoint_folder, dtype="bfloat16"), questions, finished, **options)
    with pytest.raises(InputError, match=r"\(other prompts\)"):
        prompts = type(processor)(checkpoint_folder, chat_template="{{ messages[0]['content'] }}")
        evaluate(loaded[0], prompts, questions, finished, **options)


def test_restart_answers_all_again(loaded, questions, asked, tmp_path):
    evaluate(*loaded, questions, tmp_path, limit=6, **OPTIONS)
    asked.clear()
    evaluate(*loaded, questions, tmp_path, limit=5, restart=True, **OPTIONS)
    assert len(asked) == 5


def test_a_damaged_line_is_told(loaded, questions, all_finished, tmp_path):
    ledger = tmp_path / FINISHED
    lines = (all_finished / FINISHED).read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + b"[{\n" + b"".join(lines[2:]))
    with pytest.raises(InputError, match=r"finished\.jsonl:2: damaged.*--restart"):
        evaluate(*loaded, questions, tmp_path, **OPTIONS)
    ledger.write_bytes(b"{}\n")
    with pytest.raises(InputError, match="not a list of finished rows"):
        evaluate(*loaded, questions, tmp_path, **OPTIONS)


def test_two_evaluations_do_not_share_a_folder(loaded, questions, tmp_path):
    with opened(tmp_path / FINISHED, {}), pytest.raises(InputError, match="another evaluation is writing"):
        evaluate(*loaded, questions, tmp_path, **OPTIONS)


@pytest.mark.parametrize("count", [1, 7, 64, 65])
def test_chunks_hold_every_row_once_longest_first(count):
    lengths = np.random.default_rng(count).integers(1, 9, count).tolist()
    chunks = batches_of(lengths, 16)
    flat = [i for chunk in chunks for i in chunk]
    assert sorted(flat) == list(range(count)) and all(len(chunk) == 16 for chunk in chunks[:-1])
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


PROGRAM = """
import os, sys
from gemma_mlx.evaluating import answering
from gemma_mlx.evaluation import evaluate
from gemma_mlx.models.load import load

checkpoint, data, out, log = sys.argv[1:]
handle, real = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), answering.answers

def counted(model, processor, examples, *rest, **more):
    for index, answer in real(model, processor, examples, *rest, **more):
        os.write(handle, f"{os.getpid()} {examples[index].row_id}\\n".encode())
        yield index, answer

answering.answers = counted
evaluate(*load(checkpoint), data, out, max_tokens=24, batch_size=8, page=False)
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, arguments)])


def finished_rows(ledger):
    if not ledger.exists():
        return set()
    lines = ledger.read_bytes().split(b"\n")[1:-1]
    return {record["i"] for line in lines for record in json.loads(line)}


@pytest.mark.slow
def test_a_thousand_rows_through_eight_kills(checkpoint_folder, tmp_path):
    """SIGKILL at random moments; all answers over all processes are counted as they are given."""
    data, out, log = write_rows(tmp_path / "test.csv", 1000, seed=1), tmp_path / "out", tmp_path / "log"
    r, kills, again, ledger = random.Random(5), 0, 0, out / FINISHED
    while kills < 8:
        before, size = finished_rows(ledger), len(log.read_text().splitlines()) if log.exists() else 0
        process = start(checkpoint_folder, data, out, log)
        wanted = size + r.randint(1, 1000 // 8)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        time.sleep(r.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before the kill: too few rows are left"
        kills += 1
        answered = [line.split()[1] for line in log.read_text().splitlines()[size:]]
        again += len({f"row-{i}" for i in before} & set(answered))
        assert before <= finished_rows(ledger)
    left = 1000 - len(finished_rows(ledger))
    assert left > 0 and start(checkpoint_folder, data, out, log).wait() == 0
    answered = [line.split()[1] for line in log.read_text().splitlines()]
    assert again == 0 and len(set(answered)) == 1000
    assert len(answered) <= 1000 + 8 * 32, "more than one unfinished chunk a kill was lost"
    whole = tmp_path / "whole"
    assert start(checkpoint_folder, data, whole, tmp_path / "other log").wait() == 0
    assert files(out) == files(whole) and len(files(out)) == 2
    print(f"1,000 rows, {kills} kills: {len(answered)} answers given, no finished row again; {left} left for the last")


def test_a_comparison_goes_on_too(checkpoint_folder, questions, asked, tmp_path):
    """Both sides have a list of their own, and the model has its adapter again however the other side ended."""
    model, processor = load(checkpoint_folder)
    apply_lora(model, "decoder", 2, 4.0)
    for layer in lora_layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layers = lora_layers(model)
    options = {**OPTIONS, "compare": "base", "limit": 40}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(model, processor, questions, whole, **options)
    assert lora_layers(model) == layers
    asked.clear()
    asked.stop_before = 4  # three chunks of the model, one of the base
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, questions, parts, **options)
    assert lora_layers(model) == layers and (parts / FINISHED_OTHER).exists()
    asked.stop_before = None
    evaluate(model, processor, questions, parts, **options)
    assert len(asked) == 80 and files(parts) == files(whole)
    first = Path(parts / "predictions.csv").read_text()
    assert "other_prediction" in first.splitlines()[0]


def test_a_stopped_command_says_how_it_goes_on(checkpoint_folder, questions, asked, tmp_path, capsys):
    from gemma_mlx.__main__ import verbs
    from gemma_mlx.cli.door import enter

    asked.stop_before = 1
    options = ["--data", questions, "--out", tmp_path, "--max-tokens", 2, "--batch-size", 4, "--no-page"]
    command = ["evaluate", "--model", checkpoint_folder, *options]
    assert enter(verbs, list(map(str, command))) == 130
    assert "the same command goes on" in capsys.readouterr().err and len(asked) == 16
    asked.stop_before = None
    assert enter(verbs, list(map(str, command))) == 0
    assert len(asked) == COUNT == len(set(asked)) and not (tmp_path / "report.html").exists()
    assert enter(verbs, list(map(str, [*command, "--restart", "--limit", 3]))) == 0
    assert len(asked) == COUNT + 3
