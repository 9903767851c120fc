"""In which order the samples of an epoch come: functions of (seed, epoch), walked from any position on.

None of them stores more than a few integers for each stretch of the data, so a place in an epoch is one number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Protocol

import numpy as np

from gemma_mlx.data.permutation import Order
from gemma_mlx.errors import InputError

SHUFFLED_BYTES = 128 << 20
"""Of tables that are read by stretches: the most bytes among which rows are shuffled at a time."""
BLOCK = 4_096
"""Samples within which a mixture holds its shares exactly."""
SHARDS = 4
"""Of shards that are fetched one by one: so many are shuffled together."""
SHARD_BITS = 32
"""A sample of a stream is named shard << 32 | row."""


class Walk(Protocol):
    """The samples of each epoch, one after another."""

    n: int | None
    """Samples an epoch; None where that is not known before all have been seen."""

    def walk(self, epoch: int, start: int = 0) -> Iterator[int]:
        """The samples of an epoch from position `start` on."""


class Shuffle:
    """All of range(n) in the order of (seed, epoch), or ascending."""

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True):
        self.n, self.seed, self.shuffle = n, seed, shuffle

    def walk(self, epoch: int, start: int = 0) -> Iterator[int]:
        """See `Walk`."""
        order = Order(self.n, self.seed, epoch) if self.shuffle else range(self.n)
        return (order[i] for i in range(start, self.n))


class ByStretches:
    """Stretches of consecutive samples in the order of (seed, epoch); neighbouring ones, up to `most` bytes, together
    make a window, and within it samples are shuffled.

    Where one window holds everything this is `Shuffle`: then it does not matter by which stretches a table is read.

    Args:
        units: samples of each stretch, in the order of the data.
        sizes: bytes of each stretch while it is in use.
        seed: orders stretches and samples.
        most: see `SHUFFLED_BYTES`. A larger stretch is a window of its own.
    """

    def __init__(self, units: Sequence[int], sizes: Sequence[int], seed: int = 0, most: int = SHUFFLED_BYTES):
        self.units, self.sizes, self.seed, self.most = units, sizes, seed, most
        self._first = [0, *accumulate(units)]
        self.n = self._first[-1]

    def walk(self, epoch: int, start: int = 0) -> Iterator[int]:
        """See `Walk`."""
        for number, window in enumerate(self._windows(epoch)):
            inside = [0, *accumulate(self.units[u] for u in window)]
            if start < inside[-1]:
                order = Order(inside[-1], _window_seed(self.seed, number), epoch)
                for at, row in _rows(order, inside, start):
                    yield self._first[window[at]] + row
            start = max(0, start - inside[-1])

    def _windows(self, epoch: int) -> Iterator[list[int]]:
        """The stretches of each window, ascending."""
        order, window, size = Order(len(self.units), ~self.seed, epoch), [], 0
        for i in range(len(self.units)):
            unit = order[i]
            if window and size + self.sizes[unit] > self.most:
                yield sorted(window)
                window, size = [], 0
            window.append(unit)
            size += self.sizes[unit]
        if window:
            yield sorted(window)


def _window_seed(seed: int, number: int) -> int:
    """The first window has the seed of `Shuffle`."""
    return seed + number * 0x9E3779B9


def _rows(order: Sequence[int], edges: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """(stretch of the window, row of the stretch) of each place from `start` on; `edges`: cumulated rows, from 0."""
    for i in range(start, edges[-1]):
        at = bisect_right(edges, order[i]) - 1
        yield at, order[i] - edges[at]


class Mixture:
    """Several walks in one, each with its weight: how often an epoch sees each of its samples.

    A weight of 2 sees every sample twice, one of 0.25 a quarter of them, and the next epoch the next quarter. Shares
    are exact within every block of about `BLOCK` samples, so that rare data do not come all at once.

    Args:
        walks: over samples 0 … n − 1 of each part.
        weights: of each part.
        seed: mixes.
    """

    def __init__(self, walks: Sequence[Walk], weights: Sequence[float], seed: int = 0):
        self.walks, self.seed = walks, seed
        self._first = [0, *accumulate(walk.n for walk in walks)]
        self._draws = [
            max(1, round(walk.n * weight)) if walk.n else 0 for walk, weight in zip(walks, weights, strict=True)
        ]
        self.n = sum(self._draws)
        # Blocks of about equal size, large beside the number of parts: the largest part never has to give one back.
        self._blocks = -(-self.n // max(BLOCK, 4 * len(walks) ** 2))

    def walk(self, epoch: int, start: int = 0) -> Iterator[int]:
        """See `Walk`."""
        first = ((start + 1) * self._blocks - 1) // self.n
        begun, edge = self._shares(first), first * self.n // self._blocks
        runs = [self._endless(part, epoch * own + begun[part]) for part, own in enumerate(self._draws)]
        for block in range(first, self._blocks):
            counts = np.subtract(self._shares(block + 1), self._shares(block))
            parts = np.repeat(np.arange(len(counts)), counts)
            order = Order(len(parts), self.seed + block, epoch)
            for i in range(len(parts)):
                part = int(parts[order[i]])
                sample = self._first[part] + next(runs[part])
                if edge >= start:
                    yield sample
                edge += 1

    def _shares(self, block: int) -> list[int]:
        """Samples of each part before a block: rounded down, and the largest part fills up."""
        position = block * self.n // self._blocks
        shares = [own * position // self.n for own in self._draws]
        largest = max(range(len(shares)), key=self._draws.__getitem__)
        shares[largest] += position - sum(shares)
        return shares

    def _endless(self, part: int, drawn: int) -> Iterator[int]:
        """The part's samples, one pass after another, after so many."""
        walk = self.walks[part]
        turn, position = divmod(drawn, walk.n)
        while True:
            yield from walk.walk(turn, position)
            turn, position = turn + 1, 0


class Stream:
    """Shards in the order of (seed, epoch), fetched when their turn comes; `SHARDS` neighbours are shuffled together.

    How many rows a shard has is asked when it is reached. To go on from a position the shards before it must be
    counted; who counts them may remember.

    Args:
        shards: how many there are.
        count: rows of a shard.
        seed: orders shards and rows.
        shuffle: false for the order of the data.
        together: shards that are shuffled together.
        ahead: told of the shards that come after those whose rows come now.
    """

    n = None

    def __init__(
        self, shards: int, count: Callable[[int], int], seed: int = 0, shuffle: bool = True, together: int = SHARDS,
        ahead: Callable[[int], None] | None = None,
    ):  # fmt: skip
        if shards < 1:
            raise InputError("no shards; expected at least one")
        self.shards, self.count, self.seed, self.shuffle, self.together = shards, count, seed, shuffle, together
        self.ahead = ahead or (lambda shard: None)

    def walk(self, epoch: int, start: int = 0) -> Iterator[int]:
        """See `Walk`; samples are named as `SHARD_BITS` says."""
        turn = Shuffle(self.shards, ~self.seed, self.shuffle).walk(epoch)
        number, following = 0, self._window(turn)
        while window := following:
            following = self._window(turn)
            counts = [self.count(shard) for shard in window]
            inside = [0, *accumulate(counts)]
            if start < inside[-1]:
                for shard in following:
                    self.ahead(shard)
                order = Order(inside[-1], _window_seed(self.seed, number), epoch) if self.shuffle else range(inside[-1])
                for at, row in _rows(order, inside, start):
                    yield window[at] << SHARD_BITS | row
            start, number = max(0, start - inside[-1]), number + 1

    def _window(self, turn: Iterator[int]) -> list[int]:
        """The shards that come together, ascending."""
        return sorted(islice(turn, self.together if self.shuffle else 1))
