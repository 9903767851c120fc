"""How likely a model finds the references: cross entropy and correct argmaxes of their tokens, each given the true
ones before it (teacher forcing), without the logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.data.examples import Example
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import Sample
from gemma_mlx.loss import label_positions, label_scores
from gemma_mlx.models.label_rows import LabelRows, label_rows


def samples_of(processor: Processor, examples: Sequence[Example]) -> list[Sample]:
    """The rows with labels on what their references are: the last model turn with its end token, or a whole text."""
    last = copy.copy(processor)
    last.train_on = "last"
    return [last.sample(example) for example in examples]


def row_likelihoods(model: Any, batch: Batch) -> np.ndarray:
    """Of each row (sum of cross entropies in nats, label positions, correct argmaxes), float64 [B, 3].

    The sums are made in float64 of float32 log-probabilities, whatever the dtype of the model.
    """
    where = label_positions(batch.labels, 1)
    count = int(where["weights"].sum())
    sums = np.zeros((len(batch.labels), 3))
    if not count:
        return sums
    found = label_rows(where["positions"], count, batch.labels.shape)
    names = ("columns", "grid", "back")
    labels = LabelRows(*(mx.array(a) if a is not None else None for a in (where["positions"], *map(found.get, names))))
    hidden = model.hidden(**batch.inputs(), labels=labels)
    log_probs, correct = label_scores(model, hidden, mx.array(where["targets"]), gradient=False)
    mx.eval(log_probs, correct)
    rows = where["positions"] // batch.labels.shape[1]
    for column, values in enumerate((-np.array(log_probs), np.ones(count), np.array(correct))):
        np.add.at(sums[:, column], rows, values.astype(np.float64)[:count])
    return sums
