"""What frozen towers made of each picture and clip, kept across epochs and, on disk, across runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.lanes import in_pieces
from gemma_mlx.models.media import module_names
from gemma_mlx.parts import present
from gemma_mlx.tower_store import Memory, Store

Tower = Callable[[np.ndarray, np.ndarray | None], mx.array]
FORMAT = 1
"""Raise this when a tower computes other values for the same input and weights."""


@dataclass(frozen=True)
class Medium:
    """One picture, frame or clip as its tower takes it, the key of its output, and that output if it was found."""

    key: bytes
    values: np.ndarray
    where: np.ndarray | None
    kept: mx.array | np.ndarray | None


class TowerCache:
    """A frozen tower's output for one medium at a time, by the medium's content.

    Each medium is encoded alone and, where its padding is not read, without it, so that its soft tokens do not depend
    on its batch: bit for bit the same in a resumed run, whatever is in the cache.

    Args:
        tower: (values [1, ...], positions or mask [1, ...] or None) -> output [n, D].
        trim: give each medium without its padding; false for a tower whose output depends on it.
        store: where outputs are kept; in memory by default.
        identity: of the tower, see ``tower_identity``; needed where the store serves several.
    """

    def __init__(self, tower: Tower, trim: bool = True, store: Store | None = None, identity: bytes = b""):
        self.tower, self.trim, self.identity = tower, trim, identity
        self.store = Memory() if store is None else store
        self.hits = self.misses = 0
        self._counting = Lock()

    def __call__(self, values: np.ndarray, where: np.ndarray | None) -> mx.array:
        """The tower's output [n, D] for all media of a batch, in order."""
        return self.encode(self.look_up(values, where))

    def look_up(
        self, values: np.ndarray, where: np.ndarray | None, digests: Sequence[bytes] | None = None
    ) -> list[Medium]:
        """The media of a batch and what is kept of them: all that needs neither weights nor MLX's streams.

        Args:
            values: [N, ...] pixels, or features [N, P, ...] padded as `where` says.
            where: [N, P, 2] positions, −1 in padding, or a mask [N, P]; None where nothing is padded.
            digests: hashes of the media's contents, where they are known; else they are made of the arrays.
        """
        places = [None] * len(values) if where is None else list(where)
        if self.trim and where is not None:
            lengths = present(where).sum(axis=1)
            values = [v[:n] for v, n in zip(values, lengths, strict=True)]
            places = [w[:n] for w, n in zip(places, lengths, strict=True)]
        return [self._medium(*medium) for medium in zip(values, places, digests or [None] * len(values), strict=True)]

    def _medium(self, values: np.ndarray, where: np.ndarray | None, digest: bytes | None) -> Medium:
        content = blake2b(self.identity, digest_size=16)
        for array in (values, where):
            content.update(b"-" if array is None else f"{array.dtype}{array.shape}".encode())
            if digest is None:
                content.update(b"" if array is None else np.ascontiguousarray(array))
        content.update(digest or b"")
        key = content.digest()
        return Medium(key, values, where, self.store.get(key))

    def encode(self, media: Sequence[Medium]) -> mx.array:
        """The tower's output [n, D] for these media, in order."""
        return mx.concatenate([self._one(medium) for medium in media])

    def _one(self, medium: Medium) -> mx.array:
        found = self.store.get(medium.key) if medium.kept is None else medium.kept
        if found is not None:
            with self._counting:
                self.hits += 1
            found = mx.array(found) if isinstance(found, np.ndarray) else found
            return found.view(mx.bfloat16) if found.dtype == mx.uint16 else found
        with self._counting:
            self.misses += 1
        with in_pieces():
            made = self.tower(medium.values[None], None if medium.where is None else medium.where[None])
        mx.eval(made)  # another thread may find it
        self.store.put(medium.key, made)
        return made


def tower_identity(model: Any, kind: str) -> bytes:
    """A hash of all that decides a tower's output beside the medium: its weights' bytes, its settings (window, norms,
    pooling), this format, MLX's version and device."""
    name = module_names(kind)[0]
    settings = model.spec.audio if kind == "audio" else model.spec.vision
    content = blake2b(repr((FORMAT, mx.__version__, mx.default_device().type.name, name, settings)).encode())
    for path, weight in sorted(tree_flatten(model.model[name].parameters()), key=lambda item: item[0]):
        content.update(f"{path} {weight.dtype} {weight.shape}".encode())
        content.update(memoryview(weight.reshape(-1).view(mx.uint8)))
    return content.digest()
