"""evaluate --likelihood on rows of every kind, each against transformers alone, row by row."""

import csv

import numpy as np
import pytest
import torch

from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import Example, Text, Turn
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.evaluation import evaluate
from gemma_mlx.models.load import load


@pytest.fixture(scope="module")
def theirs(checkpoint_folder):
    from gemma_mlx.torch_backend import TorchBackend

    return TorchBackend(checkpoint_folder, device="cpu")


@pytest.fixture(scope="module")
def report(checkpoint_folder, rows):
    model, processor = load(checkpoint_folder)
    return evaluate(model, processor, rows / "media.csv", likelihood=True, max_tokens=2, batch_size=4)


def alone(theirs, processor, example):
    """(nats, labels, right) of one row, its labels on the last model turn, from transformers' loss."""
    batch = collate([processor.sample(example)], pad_id=processor.pad_id)
    found = theirs.run(batch)
    labels = torch.tensor(batch.labels[0, 1:]).long()
    valid = labels != -100
    right = (torch.tensor(found.logits[0, :-1]).argmax(-1) == labels) & valid
    return found.loss * int(valid.sum()), int(valid.sum()), int(right.sum())


def test_perplexity_and_accuracy_are_transformers(report, theirs, checkpoint_folder, rows):
    processor = Processor(checkpoint_folder)
    wanted = np.array([alone(theirs, processor, e) for e in read_examples(rows / "media.csv")])
    found = np.array([p.likelihood for p in report.predictions])
    np.testing.assert_array_equal(found[:, 1:], wanted[:, 1:])
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-4)
    assert {p.task for p in report.predictions} == {"transcript", "answer", "text"}
    nats, labels, right = wanted.sum(0)
    assert report.scores["perplexity"] == pytest.approx(np.exp(nats / labels), rel=1e-4)
    assert report.scores["token_accuracy"] == right / labels


def test_rows_of_text_have_a_likelihood_and_no_answer(report, rows):
    source = list(csv.DictReader((rows / "media.csv").open()))
    texts = [p for p in report.predictions if p.task == "text"]
    assert len(texts) == sum(not r["audio_path"] and not r["image_path"] for r in source)
    assert not any(p.prediction for p in texts)
    assert report.scores["transcripts"] + report.scores["answers"] + len(texts) == len(source)


def test_without_it_rows_of_text_are_refused(checkpoint_folder, rows):
    model, processor = load(checkpoint_folder)
    with pytest.raises(InputError, match=r"media\.csv:4: nothing but text.*--likelihood"):
        evaluate(model, processor, rows / "media.csv")


def test_a_conversation_counts_its_last_answer_alone(checkpoint_folder, theirs):
    turn = lambda role, text: Turn(role, (Text(text),))  # noqa: E731
    talk = [turn("user", "one"), turn("model", "alfa bravo charlie"), turn("user", "two"), turn("model", "echo")]
    example = Example(tuple(talk), "talk:1", "1")
    model, processor = load(checkpoint_folder)
    found = evaluate(model, processor, [example], likelihood=True, max_tokens=1).predictions[0].likelihood
    whole, last = (alone(theirs, Processor(checkpoint_folder, train_on=part), example) for part in ("all", "last"))
    assert found == (pytest.approx(last[0], rel=1e-4), *last[1:]) and last[1] < whole[1]
    assert processor.train_on == "all"
