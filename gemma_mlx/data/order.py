"""Which samples make up each batch: functions of seed, epoch and lengths, so that a place in an epoch is one number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from gemma_mlx.data.permutation import Order
from gemma_mlx.data.walks import Shuffle, Walk
from gemma_mlx.errors import InputError

WINDOW = 50
"""Batches' worth of shuffled samples among which those of similar length are brought together. The more, the less
padding and the less chance in who meets whom."""

Rows = list[list[int]]
"""The rows of one batch, each of them the samples that lie in it end to end."""
Measure = Callable[[Sequence[int]], Sequence[int]]
"""Samples -> tokens of each."""


class Plan(Protocol):
    """Every sample once an epoch, in batches."""

    walk: Walk

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """The batches of an epoch after those that hold its first `start` samples."""

    def count(self, epochs: float) -> float:
        """Batches in so many epochs.

        Raises:
            InputError: the number of samples is not known.
        """

    def state(self) -> dict[str, int]:
        """What it depends on beside seed and number of samples; a resumed run must find the same."""


class Shuffled:
    """Batches of `batch_size` samples as they come in a walk (a number of samples stands for `Shuffle`); the last may
    be smaller."""

    def __init__(self, samples: int | Walk, batch_size: int, seed: int = 0, shuffle: bool = True):
        self.walk = Shuffle(samples, seed, shuffle) if isinstance(samples, int) else samples
        self.batch_size = batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """See `Plan`."""
        samples = self.walk.walk(epoch, start)
        while batch := [[i] for i in islice(samples, self.batch_size)]:
            yield batch

    def count(self, epochs: float) -> float:
        """See `Plan`."""
        return epochs * -(-known(self.walk) // self.batch_size)

    def state(self) -> dict[str, int]:
        """See `Plan`."""
        return {}


class Grouped:
    """Batches of samples of similar length: each `window` batches' worth of a walk's samples is sorted by length and
    cut into batches, and these are shuffled.

    Args:
        lengths: tokens of each sample, or what gives those of some samples.
        batch_size: samples a batch; the last of an epoch may be smaller.
        seed: orders samples and batches.
        window: see `WINDOW`.
        walk: the order before grouping; by default `Shuffle` of as many samples as there are lengths.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Measure,
        batch_size: int,
        seed: int = 0,
        window: int = WINDOW,
        walk: Walk | None = None,
    ):
        self.walk = walk or Shuffle(len(lengths), seed)
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window

    def batches(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """See `Plan`."""
        size = self.batch_size
        number, inside = divmod(start, size * self.window)
        samples = self.walk.walk(epoch, start - inside)
        while near := list(islice(samples, size * self.window)):
            of = dict(zip(near, self._measured(near), strict=True))
            near.sort(key=of.__getitem__)
            found = [[[i] for i in near[at : at + size]] for at in range(0, len(near), size)]
            yield from after(inside, in_turn(found, self.seed + number, epoch))
            number, inside = number + 1, 0

    def _measured(self, samples: list[int]) -> Sequence[int]:
        return self.lengths(samples) if callable(self.lengths) else [self.lengths[i] for i in samples]

    def count(self, epochs: float) -> float:
        """See `Plan`."""
        return epochs * -(-known(self.walk) // self.batch_size)

    def state(self) -> dict[str, int]:
        """See `Plan`."""
        return {} if callable(self.lengths) else {"lengths": checksum(self.lengths)}


def known(walk: Walk) -> int:
    """Samples of an epoch.

    Raises:
        InputError: not known.
    """
    if walk.n is None:
        raise InputError("how many rows these shards hold is not known before they are read; say --steps")
    return walk.n


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
