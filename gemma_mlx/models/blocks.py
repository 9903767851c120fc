"""Causal attention in blocks of queries: a block meets the keys that it may see, not all of its row.

Traced for a gradient, MLX forms the scores of all queries against all keys, most of them masked. In blocks, a sliding
layer's cost grows with the length of a row and no longer with its square, and a full layer's halves. What is left out
had weight exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

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
    """All queries of rows in which each sees itself and what precedes it, `window` keys at most if that is given."""

    window: int | None
    parts: tuple[Block, ...]


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


def blocks(length: int, window: int | None, dtype: mx.Dtype) -> Blocks:
    """The blocks of rows of `length` tokens."""
    made, parts = {}, []
    for start, stop, low in spans(length, window):
        mask: mx.array | str = "causal"  # lower right aligned
        if window is not None and stop > window:
            form = (stop - start, start - low)
            if form not in made:
                made[form] = _window_mask(*form, window, dtype)
            mask = made[form]
        parts.append(Block(start, stop, low, mask))
    return Blocks(window, tuple(parts))


def _window_mask(queries: int, before: int, window: int, dtype: mx.Dtype) -> mx.array:
    """Additive mask [1, 1, queries, before + queries] where so many keys precede the first query."""
    distance = mx.arange(before, before + queries)[:, None] - mx.arange(before + queries)[None]
    seen = mx.logical_and(distance >= 0, distance < window)
    return mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))[None, None]


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
