"""A permutation that stores nothing."""

from __future__ import annotations

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


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
