"""How far a score may be from the truth because other rows might have been drawn: intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Corpus = Callable[[np.ndarray], np.ndarray]
"""float64 [..., k] sums of counts -> float64 [...] scores."""

_CELLS = 1 << 20
"""Draws that are held at a time: 8 MiB of them."""
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """Ends of a confidence interval; NaN where there is only one row or cluster, or none."""

    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there were rows enough for an interval."""
        return isfinite(self.low)


class Paired(NamedTuple):
    """The second system's score minus the first's, its interval, and how often chance alone gives as much."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap(
    stats: np.ndarray,
    corpus: Corpus,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[object] | None = None,
) -> Interval:
    """The interval of a score of rows: the bias-corrected and accelerated bootstrap, widened for few rows.

    BCa (Efron 1987) moves the percentiles for the skew that error counts have. Its tails are then widened as the t
    distribution asks: a bootstrap's spread lacks the division by n - 1 (Hesterberg 2015), and is itself uncertain, the
    more so where few rows hold most errors, so the degrees of freedom are Satterthwaite's.
    Where all resamples give one score (no row has an error, all rows alike) both ends are that score: rows that never
    differed tell nothing of rows that would.

    Args:
        stats: float64 [n, k], each row's counts.
        corpus: score of summed counts.
        samples: how many times n rows are drawn anew.
        level: share of such intervals that hold the true score.
        seed: of the draws; same seed, same interval.
        clusters: n labels of what was drawn together (speakers, recordings): then those are drawn, not rows.
    """
    stats = _units(stats, clusters)
    if len(stats) < 2:
        return Interval(float("nan"), float("nan"))
    values = np.sort(np.concatenate([corpus(sums) for sums in _resampled(stats, samples, seed)]))
    low, high = np.quantile(values, _levels(values, stats, corpus, level))
    return Interval(float(low), float(high))


def _levels(values: np.ndarray, stats: np.ndarray, corpus: Corpus, level: float) -> list[float]:
    """Which two quantiles of the resampled scores are the ends."""
    n, total = len(stats), stats.sum(0)
    left_out = corpus(total - stats)
    pull = left_out.mean() - left_out
    pull /= np.abs(pull).max() or 1.0  # only its shape counts, and perplexities have fourth powers beyond a float
    spread = float((pull**2).sum())
    skew = float((pull**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    score = float(corpus(total))
    below = (np.searchsorted(values, score) + np.searchsorted(values, score, "right")) / (2 * len(values))
    bias = _NORMAL.inv_cdf(min(max(below, 1 / len(values)), 1 - 1 / len(values)))
    peak = n * float((pull**4).sum()) / spread**2 if spread > 0 else 0.0
    freedom = min(n - 1, 2 * n / (peak - 1)) if peak > 1 else n - 1
    tail = sqrt(n / (n - 1)) * _t_quantile((1 + level) / 2, freedom)
    return [_NORMAL.cdf(bias + (bias + z) / max(1 - skew * (bias + z), 1e-9)) for z in (-tail, tail)]


def _t_quantile(share: float, freedom: float) -> float:
    """Student's t by its expansion about the normal quantile (Abramowitz and Stegun 26.7.5)."""
    z = _NORMAL.inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def paired(
    stats_a: np.ndarray,
    stats_b: np.ndarray,
    corpus: Corpus,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[object] | None = None,
) -> Paired:
    """Two systems on the same rows: score of b minus score of a.

    The interval draws rows (or clusters) for both at once. The p-value exchanges the two systems' answers on randomly
    chosen rows: it is the share of exchanges, the true one counted in, with a difference as large on either side.

    Args:
        stats_a, stats_b: float64 [n, k], counts of the same rows in the same order.
        Others as for `bootstrap`.
    """
    a, b = _units(stats_a, clusters), _units(stats_b, clusters)
    if a.shape != b.shape:
        raise ValueError(f"counts of shape {a.shape} and {b.shape}: not the same rows")
    width = a.shape[1]
    difference = float(corpus(b.sum(0)) - corpus(a.sum(0)))
    both = np.concatenate([a, b], 1)
    low, high = bootstrap(both, lambda s: corpus(s[..., width:]) - corpus(s[..., :width]), samples, level, seed)
    return Paired(difference, low, high, _exchanged(a, b, corpus, difference, samples, seed))


def _exchanged(a: np.ndarray, b: np.ndarray, corpus: Corpus, difference: float, samples: int, seed: int) -> float:
    draws, least, found = np.random.default_rng([seed, 1]), abs(difference) * (1 - 1e-9), 0
    sums_a, sums_b, gained = a.sum(0), b.sum(0), b - a
    for count in _chunks(samples, len(a)):
        moved = draws.integers(0, 2, (count, len(a))).astype(np.float64) @ gained
        found += int((np.abs(corpus(sums_b - moved) - corpus(sums_a + moved)) >= least).sum())
    return (found + 1) / (samples + 1)


def _units(stats: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    """float64 [m, k]: the counts of what is drawn, rows or sums over the rows of a cluster."""
    stats = np.asarray(stats, np.float64)
    if clusters is None:
        return stats
    if len(clusters) != len(stats):
        raise ValueError(f"{len(stats)} rows but {len(clusters)} cluster labels")
    number = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(number), stats.shape[1]))
    np.add.at(sums, [number[label] for label in clusters], stats)
    return sums


def _resampled(stats: np.ndarray, samples: int, seed: int):
    """float64 [count, k] sums of as many draws as there are rows, until `samples` of them are given."""
    draws, n = np.random.default_rng([seed, 0]), len(stats)
    for count in _chunks(samples, n):
        chosen = draws.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(chosen.ravel(), minlength=count * n).reshape(count, n)
        yield times.astype(np.float64) @ stats


def _chunks(samples: int, n: int):
    size = max(_CELLS // max(n, 1), 1)
    yield from (min(size, samples - start) for start in range(0, samples, size))
