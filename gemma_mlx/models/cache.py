"""Keys and values of past tokens, for generation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from gemma_mlx.spec import SLIDING, TextSpec

GROWTH = 256
"""Tokens by which the buffer of a full-attention layer grows."""


class SlidingCache:
    """Keeps the last `window` − 1 keys and values: with its own, a next token sees `window` of them."""

    def __init__(self, window: int):
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def size(self) -> int:
        """Tokens held."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, heads, T, d] and return all that these T queries may see: up to window − 1 + T tokens."""
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        start = max(0, keys.shape[2] - (self.window - 1))
        # A copy, because a slice would keep the whole prefill's buffer alive.
        self.keys = mx.contiguous(keys[:, :, start:])
        self.values = mx.contiguous(values[:, :, start:])
        return keys, values

    def arrays(self) -> list[mx.array]:
        """What to evaluate between steps."""
        return [] if self.keys is None else [self.keys, self.values]


class FullCache:
    """Keeps every key and value, in buffers that grow by `GROWTH` tokens."""

    def __init__(self) -> None:
        self.size = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def _reserve(self, keys: mx.array, total: int) -> None:
        held = 0 if self.keys is None else self.keys.shape[2]
        if total <= held:
            return
        batch, heads, _, dims = keys.shape
        shape = (batch, heads, -(-(total - held) // GROWTH) * GROWTH, dims)
        # Two arrays: assigning into a slice changes the Python object, and one object would serve as both.
        more = [mx.zeros(shape, keys.dtype), mx.zeros(shape, keys.dtype)]
        if self.keys is not None:
            more = [mx.concatenate([old, new], axis=2) for old, new in zip((self.keys, self.values), more, strict=True)]
        self.keys, self.values = more

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, heads, T, d] and return all tokens so far."""
        start, self.size = self.size, self.size + keys.shape[2]
        self._reserve(keys, self.size)
        self.keys[:, :, start : self.size] = keys
        self.values[:, :, start : self.size] = values
        return self.keys[:, :, : self.size], self.values[:, :, : self.size]

    def arrays(self) -> list[mx.array]:
        """What to evaluate between steps."""
        return [] if self.keys is None else [self.keys, self.values]


class Cache:
    """The caches of all layers that own keys and values; layers that share another's have none.

    Attributes:
        offset: tokens seen so far, padding included; the position of the next token.
        valid: bool [B, offset], false on padding; None while no row had padding.
    """

    def __init__(self, spec: TextSpec):
        self.offset = 0
        self.valid: np.ndarray | None = None
        self.layers = [
            SlidingCache(spec.sliding_window) if spec.layer_types[i] == SLIDING else FullCache()
            for i in range(spec.first_kv_shared_layer)
        ]

    def held(self, kind: str) -> int:
        """Past tokens that a layer of this type still holds."""
        found = (c.size for c in self.layers if isinstance(c, SlidingCache) == (kind == SLIDING))
        return next(found, 0)

    def extend_valid(self, mask: np.ndarray | None, batch: int, length: int) -> np.ndarray | None:
        """Note which of `length` new tokens are real; returns bool [B, offset + length], or None if all are.

        `mask` is [B, length], or [B, offset + length] as transformers' generation passes it.
        """
        if mask is not None and mask.shape[1] != length:
            mask = mask[:, -length:]
        if self.valid is None and (mask is None or mask.all()):
            return None
        past = np.ones((batch, self.offset), bool) if self.valid is None else self.valid
        new = np.ones((batch, length), bool) if mask is None else mask.astype(bool)
        self.valid = np.concatenate([past, new], axis=1)
        return self.valid

    def arrays(self) -> list[mx.array]:
        """Every array held, to be evaluated between steps so that no graph piles up."""
        return [a for layer in self.layers for a in layer.arrays()]
