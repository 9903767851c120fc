"""Keys and values of past tokens, for generation.

All rows of a batch end at the same column; a shorter row begins later, and what stands before it is padding. So rows
can leave, and rows that were read elsewhere can join: only columns in front come and go. A key is rotated by its place
in its own row, which does not change by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mlx.spec import SLIDING, TextSpec

GROWTH = 256
"""Tokens by which the buffers grow."""

KeysValues = tuple[mx.array, mx.array]


def _in_front(x: mx.array, columns: int) -> mx.array:
    """[B, heads, T, d] with so many columns of zeros before them."""
    return mx.concatenate([mx.zeros((*x.shape[:2], columns, x.shape[3]), x.dtype), x], axis=2)


class FullCache:
    """Keeps every key and value, in buffers that grow by `GROWTH` tokens.

    Attributes:
        size: tokens held.
        keys, values: buffers [B, heads, …, d], of which the columns from `start` on, `size` of them, are held.
    """

    most: int | None = None
    """Tokens held at most; None for no limit."""

    def __init__(self) -> None:
        self.start = self.size = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Append [B, heads, T, d] and return all that the new queries may see."""
        stop = self.start + self.size
        if self.keys is None or stop + keys.shape[2] > self.keys.shape[2]:
            return self._grow(keys, values)
        seen = slice(self.start, stop + keys.shape[2])
        self.keys[:, :, stop : seen.stop] = keys
        self.values[:, :, stop : seen.stop] = values
        self._hold(seen.start, seen.stop)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def _grow(self, keys: mx.array, values: mx.array) -> KeysValues:
        """As `update`, into larger buffers."""
        seen = [keys, values]
        if self.size:
            seen = [mx.concatenate([old, new], axis=2) for old, new in zip(self.held(), seen, strict=True)]
        total = seen[0].shape[2]
        first = 0 if self.most is None else max(0, total - self.most)
        # Concatenated, thus copied: a slice would keep the whole prefill's buffer alive. Two arrays of zeros, because
        # assigning into a slice changes the Python object, and one object would serve as both.
        self.keys, self.values = (
            mx.concatenate([x[:, :, first:], mx.zeros((*x.shape[:2], GROWTH, x.shape[3]), x.dtype)], axis=2)
            for x in seen
        )
        self.start, self.size = 0, total - first
        return seen[0], seen[1]

    def _hold(self, start: int, stop: int) -> None:
        self.start = start if self.most is None else max(start, stop - self.most)
        self.size = stop - self.start

    def held(self) -> KeysValues:
        """Keys and values [B, heads, size, d]."""
        own = slice(self.start, self.start + self.size)
        return self.keys[:, :, own], self.values[:, :, own]

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Hold exactly these."""
        self.keys, self.values, self.start, self.size = keys, values, 0, keys.shape[2]

    def reaches(self, columns: int, left: int) -> bool:
        """Whether all that must be held is, once the last `columns` are dropped of which `left` were before them."""
        return self.start + self.size - columns >= self._wanted(left)

    def drop(self, columns: int, left: int) -> None:
        """Forget the last `columns`; `left` were seen before them."""
        stop = self.start + self.size - columns
        self.start, self.size = stop - self._wanted(left), self._wanted(left)

    def _wanted(self, seen: int) -> int:
        return seen if self.most is None else min(seen, self.most)

    def arrays(self) -> list[mx.array]:
        """What to evaluate between steps."""
        return [] if self.keys is None else [self.keys, self.values]


class SlidingCache(FullCache):
    """Keeps the last `window` − 1 keys and values: with its own, a next token sees `window` of them."""

    def __init__(self, window: int):
        super().__init__()
        self.window, self.most = window, window - 1


@dataclass(frozen=True)
class Snapshot:
    """Columns seen at one time, and by layer what its sliding window held then; None for layers that keep all."""

    offset: int
    sliding: list[KeysValues | None]


class Cache:
    """The caches of all layers that own keys and values; layers that share another's have none.

    Attributes:
        offset: columns seen so far, padding included.
        valid: bool [B, offset], false on padding; None while no row had padding.
        starts: int32 [B], the column where each row begins, from where its positions count; None where all positions
            count from column 0 (rotary embeddings tell the two apart by the last bits of rounding alone).
    """

    def __init__(self, spec: TextSpec):
        self.offset = 0
        self.valid: np.ndarray | None = None
        self.starts: np.ndarray | None = None
        self.layers = [
            SlidingCache(spec.sliding_window) if spec.layer_types[i] == SLIDING else FullCache()
            for i in range(spec.first_kv_shared_layer)
        ]

    def held(self, kind: str) -> int:
        """Past tokens that a layer of this type still holds."""
        found = (c.size for c in self.layers if isinstance(c, SlidingCache) == (kind == SLIDING))
        return next(found, 0)

    def positions(self) -> int | mx.array:
        """The next column's position: one for all rows, or int32 [B]."""
        return self.offset if self.starts is None else mx.array((self.offset - self.starts).astype(np.int32))

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

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, without the columns that are padding in all of them."""
        index, rows = mx.array(np.array(rows, np.int32)), list(rows)
        valid = None if self.valid is None else self.valid[rows]
        empty = 0 if valid is None else int(valid.any(axis=0).argmax())
        self.offset -= empty
        self.valid = None if valid is None or valid[:, empty:].all() else valid[:, empty:]
        self.starts = self._starts()[rows] - empty if empty or self.starts is not None else None
        for layer in self.layers:
            keys, values = layer.held()
            gone = max(0, layer.size - self.offset)
            layer.put(keys[:, :, gone:][index], values[:, :, gone:][index])

    def join(self, other: Cache) -> None:
        """Take in the rows of another, behind one's own; both are then as long as the longer one."""
        both, wide = (self, other), max(self.offset, other.offset)
        valid = [np.pad(cache._valid(), ((0, 0), (wide - cache.offset, 0))) for cache in both]
        starts = [cache._starts() + wide - cache.offset for cache in both]
        for layer, added in zip(self.layers, other.layers, strict=True):
            width = max(layer.size, added.size)
            pairs = zip(layer.held(), added.held(), strict=True)
            layer.put(*(mx.concatenate([_in_front(x, width - x.shape[2]) for x in pair]) for pair in pairs))
        self.offset, self.starts, joined = wide, np.concatenate(starts), np.concatenate(valid)
        self.valid = None if joined.all() else joined

    def _valid(self) -> np.ndarray:
        rows = self.layers[0].keys.shape[0]
        return np.ones((rows, self.offset), bool) if self.valid is None else self.valid

    def _starts(self) -> np.ndarray:
        rows = self.layers[0].keys.shape[0]
        return np.zeros(rows, np.int64) if self.starts is None else self.starts

    def trim(self, offset: int) -> bool:
        """Forget all columns from `offset` on; false, and nothing is changed, where a sliding layer no longer holds
        what the columns before see. For rows without padding."""
        gone = self.offset - offset
        if not all(layer.reaches(gone, offset) for layer in self.layers):
            return False
        for layer in self.layers:
            layer.drop(gone, offset)
        self.offset = offset
        return True

    def snapshot(self) -> Snapshot:
        """What `restore` needs to come back here as long as the columns so far are kept."""
        held = [layer.held() if isinstance(layer, SlidingCache) else None for layer in self.layers]
        mx.eval([pair for pair in held if pair is not None])
        return Snapshot(self.offset, held)

    def restore(self, snapshot: Snapshot) -> None:
        """Forget all columns since the snapshot. For rows without padding."""
        for layer, pair in zip(self.layers, snapshot.sliding, strict=True):
            if pair is None:
                layer.drop(self.offset - snapshot.offset, snapshot.offset)
            else:
                layer.put(*pair)
        self.offset = snapshot.offset

    def arrays(self) -> list[mx.array]:
        """Every array held, to be evaluated between steps so that no graph piles up."""
        return [a for layer in self.layers for a in layer.arrays()]
