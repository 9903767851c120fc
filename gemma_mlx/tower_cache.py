"""What frozen towers made of each picture and clip, kept in memory across epochs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from threading import Lock

import mlx.core as mx
import numpy as np

from gemma_mlx.lanes import in_pieces

CACHE_BYTES = 1 << 30
"""The most memory that kept outputs may take: 2,300 pictures of 280 soft tokens for E2B in bfloat16."""


class TowerCache:
    """A frozen tower's output for one medium at a time, by the medium's content.

    Each medium is encoded alone, without padding, so that its soft tokens do not depend on its batch: bit for bit the
    same in a resumed run, whatever is in the cache. The least recently used go when the limit is passed.

    Args:
        tower: (features [1, n, ...], positions or mask [1, n, ...]) -> soft tokens [m, D].
        limit: bytes kept at most; 0 keeps none.
    """

    def __init__(self, tower: Callable[[np.ndarray, np.ndarray], mx.array], limit: int = CACHE_BYTES):
        self.tower, self.limit = tower, limit
        self._kept: OrderedDict[bytes, mx.array] = OrderedDict()
        self._bytes = 0
        self._changing = Lock()

    def __call__(self, features: np.ndarray, valid: np.ndarray, where: np.ndarray) -> mx.array:
        """Soft tokens [m_total, D] of all media of a batch, in order.

        Args:
            features: [N, P, ...] what the tower reads, padded.
            valid: bool [N, P], true on the first so many entries of each medium.
            where: [N, P, ...] the tower's second argument.
        """
        lengths = valid.sum(axis=1)
        return mx.concatenate([self._one(f[:n], w[:n]) for f, w, n in zip(features, where, lengths, strict=True)])

    def _one(self, features: np.ndarray, where: np.ndarray) -> mx.array:
        key = blake2b(features.tobytes() + where.tobytes(), digest_size=16).digest()
        with self._changing:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        with in_pieces():
            made = self.tower(features[None], where[None])
        mx.eval(made)  # another thread may find it
        with self._changing:
            if key not in self._kept and made.nbytes <= self.limit:
                self._kept[key] = made
                self._bytes += made.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made
