"""Few shapes for many batches: a compiled step is compiled once for every shape of its arguments.

A batch's sizes are a line of integers; a bucket is such a line too, and holds every batch none of whose sizes is
larger. All sizes go up with the bucket, so that there are as many shapes as buckets, whatever is in the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice, pairwise

import numpy as np

from gemma_mlx.data.order import Plan, Rows
from gemma_mlx.data.template import AUDIO, IMAGE, VIDEO, Sample

KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
TOKENS, LABELS, ROW_LABELS = 0, 1, 2
"""Places in a line: tokens of the longest row; labels of all rows, and of the row with most of them."""
SOFT, MEDIA, LONGEST = slice(3, 6), slice(6, 9), slice(9, 12)
"""By kind: soft tokens, pictures or clips, and the soft tokens of the largest of them."""
MULTIPLES = np.array([32, 32, 8, 64, 64, 64, 1, 1, 1, 8, 8, 8])
"""A bucket's sizes are multiples of these."""
MOST = 7
"""Buckets of the training rows, not counting the one that holds everything."""
MOST_VALID = 2
"""Buckets of the validation rows: each costs a compilation, and there padding costs no backward."""
WORTH = 0.02
"""One bucket more must save this part of the padded work."""
LEVELS = 48
"""Row lengths that are told apart when buckets are chosen."""
SIMULATED = 1_000
"""At least so many batches are looked at, over several epochs of small data."""


def of_sample(sample: Sample) -> np.ndarray:
    """int32 [12], the sizes of a row that holds this sample alone."""
    sizes = np.zeros(12, np.int32)
    sizes[[TOKENS, LABELS, ROW_LABELS]] = len(sample), sample.label_count, sample.label_count
    for at, token_type in enumerate(KINDS.values()):
        edges = np.flatnonzero(np.diff(np.pad(sample.token_types == token_type, 1).astype(np.int8)))
        lengths = edges[1::2] - edges[::2]  # media are set apart by their opening and closing tokens
        sizes[3 + at : 12 : 3] = lengths.sum(), len(lengths), lengths.max(initial=0)
    return sizes


def of_row(samples: np.ndarray) -> np.ndarray:
    """Sizes of a row that holds samples of these sizes [n, 12] end to end."""
    sizes = samples.sum(axis=0)
    sizes[LONGEST] = samples[:, LONGEST].max(axis=0)
    return sizes


def of_batch(rows: np.ndarray) -> np.ndarray:
    """Sizes of a batch of rows of these sizes [B, 12]."""
    sizes = rows.max(axis=0)
    for summed in (LABELS, SOFT, MEDIA):
        sizes[summed] = rows[:, summed].sum(axis=0)
    return sizes


@dataclass(frozen=True)
class Buckets:
    """Buckets in ascending order, int [k, 12], for batches of up to ``rows`` rows; the last holds any batch of rows
    that were looked at. ``padding``: the part of the positions of the batches looked at that holds no token."""

    rows: int
    sizes: np.ndarray
    padding: float = 0.0

    def find(self, sizes: np.ndarray, rows: int) -> np.ndarray | None:
        """The first bucket that holds a batch of these sizes; None where none does."""
        fits = (self.sizes >= sizes).all(axis=1)
        return self.sizes[fits.argmax()] if fits.any() and rows <= self.rows else None


def choose_buckets(
    samples: np.ndarray, plan: Plan, rows: int, cost: Callable[[np.ndarray], float], most: int = MOST
) -> Buckets:
    """The buckets that leave the least padded work over the batches that a plan makes of these samples.

    Batches are sorted by their longest row and cut into at most ``most`` runs; a bucket holds the largest of each size
    in its run. The cut of least work is found exactly (dynamic programming over the lengths), and fewer buckets are
    taken where one more saves little. It follows from lengths and plan alone, so a resumed run finds the same.

    Args:
        samples: int [n, 12], as from `of_sample`.
        plan: of the run's batches; its first epochs are looked at.
        rows: of a batch.
        cost: work of a step of these sizes.
        most: buckets besides the last, which takes every sample's sizes at once.
    """
    lines = [[samples[row] for row in batch] for batch in _batches(plan)]
    in_rows = [np.stack([of_row(row) for row in batch]) for batch in lines]
    batches = np.stack([of_batch(batch) for batch in in_rows])
    largest = np.maximum(samples.max(axis=0), np.concatenate(in_rows).max(axis=0))
    everything = _rounded(of_batch(np.tile(largest, (rows, 1))))
    levels, each = _levels(batches)
    chosen = _cut(levels, each, cost, most)
    chosen = chosen if (chosen[-1] == everything).all() else [*chosen, everything]
    found = Buckets(rows, np.stack(chosen))
    positions = sum(int(found.find(batch, rows)[TOKENS]) * rows for batch in batches)
    tokens = sum(int(batch[:, TOKENS].sum()) for batch in in_rows)
    return Buckets(rows, found.sizes, 1 - tokens / positions)


def _batches(plan: Plan) -> list[Rows]:
    """Whole epochs of at least `SIMULATED` batches together, but no more than five times as many."""
    found: list[Rows] = []
    for epoch in count():
        found += islice(plan.batches(epoch), 5 * SIMULATED - len(found))
        if len(found) >= SIMULATED:
            return found
    raise AssertionError


def _rounded(sizes: np.ndarray) -> np.ndarray:
    rounded = -(-sizes // MULTIPLES) * MULTIPLES
    rounded[..., : ROW_LABELS + 1] = np.maximum(rounded[..., : ROW_LABELS + 1], MULTIPLES[: ROW_LABELS + 1])
    return rounded


def _levels(batches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(largest sizes [l, 12] of the batches of each length, how many they are), by ascending length."""
    lengths = _rounded(batches)[:, TOKENS]
    known = np.unique(lengths)
    if len(known) > LEVELS:  # as many batches in each
        known = np.unique(np.quantile(lengths, np.arange(1, LEVELS + 1) / LEVELS, method="higher"))
    level = np.searchsorted(known, lengths)
    largest = [_rounded(batches[level == i].max(axis=0)) for i in range(len(known))]
    return np.stack(largest), np.bincount(level, minlength=len(known))


def _cut(levels: np.ndarray, each: np.ndarray, cost: Callable[[np.ndarray], float], most: int) -> list[np.ndarray]:
    """Runs of levels -> the largest sizes of each run, of as few runs as are worth it."""
    n = len(levels)
    work = np.full((n + 1, n + 1), np.inf)  # of the levels from i to j in one bucket
    for i in range(n):
        for j in range(i + 1, n + 1):
            work[i, j] = cost(levels[i:j].max(axis=0)) * each[i:j].sum()
    best, starts = work[0].copy(), []  # best[j]: least work of the first j levels
    best[0] = 0.0
    found = [best[n]]
    for _ in range(1, min(most, n)):
        through = best[:, None] + work
        starts.append(through.argmin(axis=0))
        best = through.min(axis=0)  # of at most so many buckets: those before may be empty
        best[0] = 0.0
        found.append(best[n])
    enough = next(k for k, total in enumerate(found) if total <= found[-1] * (1 + WORTH))
    edges = [n]
    for start in reversed(starts[:enough]):
        edges.append(int(start[edges[-1]]))
    edges = sorted({0, *edges})
    return [levels[a:b].max(axis=0) for a, b in pairwise(edges)]
