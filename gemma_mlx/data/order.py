"""Which samples make up each batch: functions of seed, epoch and lengths, so that a place in an epoch is one number."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
WINDOW = 50
"""Batches' worth of shuffled samples among which those of similar length are brought together. The more, the less
padding and the less chance in who meets whom."""

Rows = list[list[int]]
"""The rows of one batch, each of them the samples that lie in it end to end."""


class Order:
    """A permutation of range(n) keyed by (seed, epoch), computed entry by entry.

    A Feistel network over the smallest even number of bits that holds n, walked until it lands inside: nothing is
    stored, any position can be asked for, and the order does not depend on a library's version.
    """

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._half, self._low = half, (1 << half) - 1
        key = _mix(_mix(seed & _MASK64) ^ epoch)
        self._keys = [_mix(key + i) for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        value = position
        while True:
            left, right = value >> self._half, value & self._low
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._low)
            value = left << self._half | right
            if value < self.n:
                return value


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


class Plan(Protocol):
    """Every sample once an epoch, in batches."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """The batches of an epoch after those that hold its first `start` samples."""

    def count(self, epochs: float) -> float:
        """Batches in so many epochs."""

    def state(self) -> dict[str, int]:
        """What it depends on beside seed and number of samples; a resumed run must find the same."""


class Shuffled:
    """Batches of `batch_size` samples in the order of (seed, epoch), or of the file; the last may be smaller."""

    def __init__(self, n: int, batch_size: int, seed: int = 0, shuffle: bool = True):
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        order = Order(self.n, self.seed, epoch) if self.shuffle else range(self.n)
        for first in range(start, self.n, self.batch_size):
            yield [[order[i]] for i in range(first, min(first + self.batch_size, self.n))]

    def count(self, epochs: float) -> float:
        return epochs * -(-self.n // self.batch_size)

    def state(self) -> dict[str, int]:
        return {}


class Grouped:
    """Batches of samples of similar length: each `window` batches' worth of the shuffled samples is sorted by length
    and cut into batches, and the batches of the epoch are shuffled.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch; one batch of an epoch may be smaller.
        seed: orders samples and batches.
        window: see `WINDOW`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, window: int = WINDOW):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        order, size, found = Order(len(self.lengths), self.seed, epoch), self.batch_size, []
        for first in range(0, len(order), size * self.window):
            near = [order[i] for i in range(first, min(first + size * self.window, len(order)))]
            near.sort(key=self.lengths.__getitem__)
            found += [[[i] for i in near[at : at + size]] for at in range(0, len(near), size)]
        yield from after(start, in_turn(found, self.seed, epoch))

    def count(self, epochs: float) -> float:
        return epochs * -(-len(self.lengths) // self.batch_size)

    def state(self) -> dict[str, int]:
        return {"lengths": checksum(self.lengths)}


def checksum(lengths: Sequence[int]) -> int:
    """CRC-32 of the lengths, as little-endian 64-bit integers."""
    return zlib.crc32(np.asarray(lengths, "<i8").tobytes())


def in_turn(items: list, seed: int, epoch: int) -> list:
    """The items in an order of (seed, epoch) that has nothing to do with that of the samples."""
    order = Order(len(items), ~seed, epoch)
    return [items[i] for i in order]


def after(start: int, batches: list[Rows]) -> Iterator[Rows]:
    """The batches after those that hold the first `start` samples."""
    seen = 0
    for batch in batches:
        if seen >= start:
            yield batch
        seen += sum(map(len, batch))


def padding(batches: Iterator[Rows], lengths: Sequence[int], multiple: int = 1) -> float:
    """The part of the positions of these batches that holds no token; rows are padded to a multiple of `multiple`."""
    tokens = positions = 0
    for batch in batches:
        rows = [sum(lengths[i] for i in row) for row in batch]
        tokens, positions = tokens + sum(rows), positions + len(rows) * (-(-max(rows) // multiple) * multiple)
    return 1 - tokens / positions
