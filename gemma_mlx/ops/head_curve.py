"""The softcap of logits in units that make a softmax cheap.

With t = tanh(x / c), the softcap c · t and its slope follow from s = 1 / (1 + e^(2x / c)) alone: t = 1 − 2s, so
e^(c·t − c) = e^(−2c·s) and 1 − t² = 4·(s − s²). Scores are kept in units in which both exponentials are powers of
two. As c · t − c lies within −2c and 0, a small cap needs no running maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mlx.ops.device import on_gpu

_LN2 = math.log(2.0)
_FIXED_RANGE = 100.0
"""Powers of two down to minus this are added up without a running maximum: float32 has 126."""


def power(x: mx.array) -> mx.array:
    """2^x. On a CPU MLX's power takes a third of its exp's time and errs less."""
    return mx.exp(x * _LN2) if on_gpu() else mx.power(2.0, x)


@dataclass(frozen=True)
class Curve:
    """The softcap `cap`, or None; `prescaled`: scores come as multiples of `unit` already."""

    cap: float | None = None
    prescaled: bool = False

    @property
    def unit(self) -> float:
        """A score for each logit."""
        return (2.0 / self.cap if self.cap else 1.0) / _LN2

    @property
    def scale(self) -> float:
        """What is still to be multiplied."""
        return 1.0 if self.prescaled else self.unit

    @property
    def reach(self) -> float:
        """Powers of two that the cap spans."""
        # Rounded as the chunks see it, so that the target's own logit is off by the same and not by 1e-6 from them.
        return float(np.float32(2.0 * self.cap / _LN2)) if self.cap else math.inf

    @property
    def fixed(self) -> bool:
        """Whether exponents are measured from 0, and not from the highest so far."""
        return self.reach <= _FIXED_RANGE

    def __call__(self, scores: mx.array) -> tuple[mx.array, mx.array | None]:
        """(log2 of e^logit, or of e^(logit − cap); a quarter of the cap's slope, None without a cap)."""
        if self.cap is None:
            return scores, None
        s = mx.reciprocal(1.0 + power(scores))
        return s * -self.reach, s - mx.square(s)

    def reference(self, top: mx.array) -> mx.array:
        """What exponents are measured from: the highest so far, or 0 where all of them fit float32."""
        return mx.zeros_like(top) if self.fixed else self(top)[0]

    def scores(self, products: mx.array) -> mx.array:
        """Scores in float32 of products of hidden states and rows of the head."""
        products = products.astype(mx.float32)
        return products if self.prescaled else products * self.scale

    @property
    def constants(self) -> mx.array:
        """float32 [2]: scale and reach."""
        return mx.array([self.scale, self.reach if self.cap else 0.0], mx.float32)


class Targets:
    """The targets [n, 1] of some positions, counted from a chunk's first id, within the chunk's ``size``."""

    def __init__(self, local: mx.array, size: int):
        self.inside, self.at = (local >= 0) & (local < size), mx.clip(local, 0, size - 1)

    def of(self, values: mx.array) -> mx.array:
        """Each row's entry at its target; any entry where the target is elsewhere."""
        return mx.take_along_axis(values, self.at, axis=1)

    def replaced(self, values: mx.array, new: mx.array) -> mx.array:
        """``values`` with ``new`` [n, 1] at the targets."""
        return mx.put_along_axis(values, self.at, mx.where(self.inside, new, self.of(values)), axis=1)
