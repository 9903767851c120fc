"""Several samples end to end in one row, each a segment that sees itself alone: little of a batch is padding.

Attention computes a row whole and masks what lies in other segments, so its cost grows with the square of the budget: a
few times the mean length is enough, and beyond that more is lost there than is saved in padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.order import Rows, after, checksum, in_turn
from gemma_mlx.data.template import Sample
from gemma_mlx.data.walks import Shuffle, Walk


class Packed:
    """Batches of `batch_size` rows of up to `budget` tokens, packed anew each epoch from the shuffled samples.

    Args:
        lengths: tokens of each sample.
        batch_size: rows a batch; the last of an epoch may have fewer.
        budget: most tokens in a row of several samples; a longer sample has a row to itself.
        seed: orders samples and rows.
        walk: the order before packing; by default `Shuffle`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, budget: int, seed: int = 0, walk: Walk | None = None):
        self.walk = walk or Shuffle(len(lengths), seed)
        self.lengths, self.batch_size, self.budget, self.seed = lengths, batch_size, budget, seed

    def state(self) -> dict[str, int]:
        """What the plan depends on beside seed and number of samples."""
        return {"lengths": checksum(self.lengths)}

    def rows(self, epoch: int) -> Rows:
        """The rows of an epoch, in order."""
        return in_turn(best_fit(self.walk.walk(epoch), self.lengths, self.budget), self.seed, epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        rows = self.rows(epoch)
        yield from after(start, [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)])

    def count(self, epochs: float) -> float:
        """Batches in so many epochs, of which each may have another number."""
        whole = int(epochs)
        sizes = [-(-len(self.rows(epoch)) // self.batch_size) for epoch in range(whole + (epochs > whole))]
        return sum(sizes[:whole]) + sum((epochs - whole) * size for size in sizes[whole:])


def best_fit(samples: Iterable[int], lengths: Sequence[int], budget: int) -> Rows:
    """Best fit (Johnson 1973): each sample as it comes into the fullest row that has room for it, else a new one."""
    rows: Rows = []
    room: list[tuple[int, int]] = []  # (tokens, row), in ascending order
    for i in samples:
        at = bisect_left(room, (lengths[i], 0))
        left, row = room.pop(at) if at < len(room) else (budget, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if left > lengths[i]:
            insort(room, (left - lengths[i], row))
    return rows


def joined(samples: Sequence[Sample]) -> Sample:
    """The samples end to end as one row of segments 1, 2, …, their media in reading order.

    A sample's first token is predicted by nothing, as in a row of its own: it has no label.
    """
    labels = [sample.labels.copy() for sample in samples]
    for own in labels:
        own[:1] = IGNORE_INDEX
    return replace(
        samples[0],
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        labels=np.concatenate(labels),
        token_types=np.concatenate([sample.token_types for sample in samples]),
        images=tuple(image for sample in samples for image in sample.images),
        clips=tuple(clip for sample in samples for clip in sample.clips),
        where=", ".join(sample.where for sample in samples),
        row_id=", ".join(sample.row_id or sample.where for sample in samples),
        videos=tuple(video for sample in samples for video in sample.videos),
        segment_ids=np.repeat(np.arange(1, len(samples) + 1, dtype=np.int32), [len(sample) for sample in samples]),
    )
