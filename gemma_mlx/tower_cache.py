"""What frozen towers made of each picture and clip, kept in memory across epochs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from threading import Lock

import mlx.core as mx
import numpy as np

from gemma_mlx.lanes import in_pieces

Tower = Callable[[np.ndarray, np.ndarray | None], mx.array]
CACHE_BYTES = 1 << 30
"""The most memory that kept outputs may take: 2,300 pictures of 280 soft tokens for E2B in bfloat16."""


class TowerCache:
    """A frozen tower's output for one medium at a time, by the medium's content.

    Each medium is encoded alone and, where its padding is not read, without it, so that its soft tokens do not depend
    on its batch: bit for bit the same in a resumed run, whatever is in the cache. The least recently used go when the
    limit is passed.

    Args:
        tower: (values [1, ...], positions or mask [1, ...] or None) -> output [n, D].
        trim: give each medium without its padding; false for a tower whose output depends on it.
        limit: bytes kept at most; 0 keeps none.
    """

    def __init__(self, tower: Tower, trim: bool = True, limit: int = CACHE_BYTES):
        self.tower, self.trim, self.limit = tower, trim, limit
        self._kept: OrderedDict[bytes, mx.array] = OrderedDict()
        self._bytes = 0
        self._changing = Lock()

    def __call__(self, values: np.ndarray, where: np.ndarray | None) -> mx.array:
        """The tower's output [n, D] for all media of a batch, in order.

        Args:
            values: [N, ...] pixels, or features [N, P, ...] padded as `where` says.
            where: [N, P, 2] positions, −1 in padding, or a mask [N, P]; None where nothing is padded.
        """
        places = [None] * len(values) if where is None else list(where)
        if self.trim and where is not None:
            lengths = (where > 0 if where.ndim == 2 else (where >= 0).all(-1)).sum(axis=1)
            values = [v[:n] for v, n in zip(values, lengths, strict=True)]
            places = [w[:n] for w, n in zip(places, lengths, strict=True)]
        return mx.concatenate([self._one(v, w) for v, w in zip(values, places, strict=True)])

    def _one(self, values: np.ndarray, where: np.ndarray | None) -> mx.array:
        key = blake2b(values.tobytes() + (b"" if where is None else where.tobytes()), digest_size=16).digest()
        with self._changing:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        with in_pieces():
            made = self.tower(values[None], None if where is None else where[None])
        mx.eval(made)  # another thread may find it
        with self._changing:
            if key not in self._kept and made.nbytes <= self.limit:
                self._kept[key] = made
                self._bytes += made.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made
