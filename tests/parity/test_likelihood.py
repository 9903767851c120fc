"""Perplexity and token accuracy of references, row by row, against transformers' loss and torch's cross entropy."""

import numpy as np
import pytest
import torch
from parity_cases import CASES, audio, image, make_batch, video

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.evaluating.likelihood import row_likelihoods

BOUND = 1e-4
"""Relative, of a row's summed cross entropies. Logits agree within 2e-4 (test_logits.py)."""
ROWS = {
    **{name: CASES[name] for name in ("text", "right-padded batch", "1 and 2 images per row", "everything")},
    "two clips over a batch": CASES["two clips over a batch, shorter first"],
    "a video beside text": [[30], [2, video(2, 6, 6), 9]],
    "rows of 1 to 40 labels": [[1], [3, image(6, 6), 40], [5, audio(61), 2]],
}


def expected(backend, batch):
    """(float64 [B, 3] as `row_likelihoods`, transformers' own mean loss of the batch)."""
    found = backend.run(batch)
    logits = torch.tensor(found.logits, dtype=torch.float64)[:, :-1]
    labels = torch.tensor(batch.labels, dtype=torch.long)[:, 1:]
    valid = labels != IGNORE_INDEX
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    right = (logits.argmax(-1) == labels) & valid
    return torch.stack([losses.sum(1), valid.sum(1), right.sum(1)], 1).numpy(), found.loss


@pytest.mark.parametrize("case", ROWS)
def test_each_row_has_transformers_cross_entropy(pair, case, record):
    batch = make_batch(ROWS[case])
    wanted, mean = expected(pair.theirs, batch)
    found = row_likelihoods(pair.ours, batch)
    assert found.shape == wanted.shape and found.dtype == np.float64
    np.testing.assert_array_equal(found[:, 1:], wanted[:, 1:])
    difference = np.abs(found[:, 0] / wanted[:, 0] - 1).max()
    record(f"likelihood of references {pair.name}", case, difference)
    assert difference <= BOUND
    assert found[:, 0].sum() / found[:, 1].sum() == pytest.approx(mean, rel=BOUND)


def test_rows_without_labels_add_nothing(pair):
    batch = make_batch([[9], [5], [7]])
    batch.labels[1] = IGNORE_INDEX
    found, wanted = row_likelihoods(pair.ours, batch), expected(pair.theirs, batch)[0]
    assert found[1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(found, wanted, rtol=BOUND)
    batch.labels[:] = IGNORE_INDEX
    assert not row_likelihoods(pair.ours, batch).any()
