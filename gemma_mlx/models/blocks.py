"""Causal attention in blocks of queries: a block meets the keys that it may see, not all of its row.

Traced for a gradient, MLX forms the scores of all queries against all keys, most of them masked. In blocks, a sliding
layer's cost grows with the length of a row and no longer with its square, a full layer's halves, and that of a packed
row is that of its samples. What is left out had weight exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mlx.models.masks import additive_mask
from gemma_mlx.models.padding import host

BLOCK = {"gpu": 256, "cpu": 128}
"""Queries in a block: fewer leave out more, and launch more."""


@dataclass(frozen=True)
class Block:
    """Queries `start` to `stop` on keys `low` to `stop`; mask as `scaled_dot_product_attention` takes it."""

    start: int
    stop: int
    low: int
    mask: mx.array | str


@dataclass(frozen=True)
class Blocks:
    """All queries of rows in which each sees itself and what precedes it.

    `window` keys at most if that is given, and of its own segment alone if there are `segment_ids` [B, T].
    """

    parts: tuple[Block, ...]
    window: int | None
    segment_ids: mx.array | None = None

    def rows(self, queries: mx.array, length: int, dtype: mx.Dtype) -> mx.array:
        """Additive mask [B, 1, n, T] of chosen queries, int positions [B, n]."""
        ids = self.segment_ids
        segments = None if ids is None else (mx.take_along_axis(ids, queries, axis=1), ids)
        return additive_mask(queries, mx.arange(length), self.window, None, dtype, segments=segments)


def block_size() -> int:
    """Queries in a block on this device."""
    return BLOCK[mx.default_device().type.name]


def spans(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, stop, low) of the blocks of rows of `length` tokens."""
    size = block_size()
    for start in range(0, length, size):
        yield start, min(start + size, length), 0 if window is None else max(0, start - window + 1)


def pairs(length: int, window: int | None) -> int:
    """Scores of a row of `length` tokens and one head, masked ones included."""
    return sum((stop - start) * (stop - low) for start, stop, low in spans(length, window))


def blocks(length: int, window: int | None, dtype: mx.Dtype, segment_ids: mx.array | None = None) -> Blocks:
    """The blocks of rows of `length` tokens; `segment_ids` int [B, length] of packed rows."""
    made, parts, begins = {}, [], _segment_begins(segment_ids)
    for start, stop, low in spans(length, window):
        low = max(low, 0 if begins is None else int(begins[start]))
        mask: mx.array | str = "causal"  # lower right aligned
        if segment_ids is not None or (window is not None and stop > window):
            form = (start, stop, low) if segment_ids is not None else (stop - start, start - low)
            if form not in made:
                ids = segment_ids
                segments = None if ids is None else (ids[:, start:stop], ids[:, low:stop])
                queries, keys = mx.arange(start, stop)[None], mx.arange(low, stop)
                made[form] = additive_mask(queries, keys, window, None, dtype, segments=segments)
            mask = made[form]
        parts.append(Block(start, stop, low, mask))
    return Blocks(tuple(parts), window, segment_ids)


def _segment_begins(segment_ids: mx.array | None) -> np.ndarray | None:
    """[T]: the first column of any segment that a column lies in; None where the ids are not known."""
    ids = host(segment_ids)
    if ids is None:
        return None
    begins = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    return np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), axis=1).min(axis=0)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Blocks | mx.array | str | None) -> mx.array:
    """softmax(scale · q kᵀ + mask) v: q [B, heads, T, d], k and v [B, kv_heads, T', d] -> [B, heads, T, d].

    Softmax in float32. The mask as `mx.fast.scaled_dot_product_attention` takes it, or blocks.
    """
    if not isinstance(mask, Blocks):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    made = [
        mx.fast.scaled_dot_product_attention(
            q[:, :, b.start : b.stop], k[:, :, b.low : b.stop], v[:, :, b.low : b.stop], scale=scale, mask=b.mask
        )
        for b in mask.parts
    ]
    return mx.concatenate(made, axis=2)
