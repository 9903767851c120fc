"""Which positions a training loss reads, where the decoder goes on with them alone.

A layer's keys and values are needed at every position, all else of it only where a later layer or the loss reads its
output. Above the last layer that owns keys and values nobody reads a position without a label: the stream shrinks to
label positions there, in one line over the batch, and attention alone brings them back to the rows that they are of.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class LabelRows:
    """Label positions as index arrays, int32.

    Attributes:
        flat: [N], into the flattened [B·T] positions. In padding any position.
        columns: [B, n], the position in its row of each row's labels; 0 in padding.
        grid: [B, n], which of the N each of them is; None with one row, whose N are its n.
        back: [N], where in the flattened [B·n] each of the N is; None with one row.
    """

    flat: mx.array
    columns: mx.array
    grid: mx.array | None = None
    back: mx.array | None = None

    def pick(self, x: mx.array) -> mx.array:
        """[..., B, T, d] -> [..., 1, N, d]."""
        return mx.take(x.reshape(*x.shape[:-3], 1, -1, x.shape[-1]), self.flat, axis=-2)

    def by_row(self, x: mx.array) -> mx.array:
        """[1, N, ...] -> [B, n, ...]; what stands in a row's padding means nothing, but is finite."""
        return x if self.grid is None else x[0][self.grid]

    def in_line(self, x: mx.array) -> mx.array:
        """[B, n, ...] -> [1, N, ...]."""
        return x if self.back is None else x.reshape(-1, *x.shape[2:])[self.back][None]


def label_rows(flat: np.ndarray, count: int, shape: tuple[int, int], multiple: int = 1) -> dict[str, np.ndarray]:
    """``columns``, ``grid`` and ``back`` of `LabelRows`, the latter two for more than one row.

    Args:
        flat: int [N] positions into the flattened batch, in reading order, the first ``count`` of them real.
        shape: (B, T) of the batch.
        multiple: n is the smallest power of two times this that holds the fullest row; 1 for exactly its labels.
    """
    rows, columns = np.divmod(flat, shape[1])
    if shape[0] == 1:
        return {"columns": columns[None].astype(np.int32)}
    each = np.bincount(rows[:count], minlength=shape[0])
    width = max(1, int(each.max()))
    if multiple > 1:
        width = multiple << max(0, int(np.ceil(np.log2(width / multiple))))
    starts = np.cumsum(each) - each
    within = np.arange(count) - starts[rows[:count]]
    found = {"columns": np.zeros((shape[0], width), np.int32), "grid": np.zeros((shape[0], width), np.int32)}
    found["columns"][rows[:count], within] = columns[:count]
    found["grid"][rows[:count], within] = np.arange(count)
    found["back"] = np.zeros(len(flat), np.int32)
    found["back"][:count] = rows[:count] * width + within
    return found
