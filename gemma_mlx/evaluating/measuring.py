"""Predictions -> scores: which metric counts which rows, and what each row adds to it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.evaluating.prediction import Prediction
from gemma_mlx.normalizers import normalizer
from gemma_mlx.resampling import Interval, bootstrap
from gemma_mlx.scoring import METRICS, Metric, metric

OF_TASK = {"transcript": ("wer", "cer"), "answer": ("exact_match", "f1", "anls")}
"""Task -> what its rows are measured by, unless metrics are named."""


@dataclass(frozen=True)
class Measured:
    """A metric over some of the rows.

    Attributes:
        name, title, higher_is_better, points, corpus: as of `gemma_mlx.scoring.Metric`.
        tell: the score as it is printed.
        rows: int [n], which predictions.
        stats: float64 [n, k], what each adds.
        signature: how it is counted.
    """

    name: str
    title: str
    higher_is_better: bool
    points: bool
    corpus: Callable[[np.ndarray], np.ndarray]
    tell: Callable[[float], str]
    rows: np.ndarray
    stats: np.ndarray
    signature: str = ""

    @property
    def value(self) -> float:
        """The score of all its rows together."""
        return float(self.corpus(self.stats.sum(axis=0)))

    def each(self) -> np.ndarray:
        """float64 [n]: the score of each row alone."""
        return self.corpus(self.stats)

    def errors(self) -> np.ndarray:
        """float64 [n]: how far each row is from the best score; what is worst comes highest."""
        each = self.each()
        return (100.0 if self.points else 1.0) - each if self.higher_is_better else each

    def interval(self, clusters: Sequence[object] | None = None) -> Interval:
        """95 % interval by bootstrap over its rows, or over clusters of them (labels of all predictions)."""
        of_rows = None if clusters is None else [clusters[i] for i in self.rows]
        return bootstrap(self.stats, self.corpus, clusters=of_rows)

    def among(self, chosen: Iterable[int]) -> Measured | None:
        """The same over those of its rows that are among ``chosen``; None if there are none."""
        inside = np.isin(self.rows, np.fromiter(chosen, np.int64))
        return replace(self, rows=self.rows[inside], stats=self.stats[inside]) if inside.any() else None


@cache
def cleaner(normalize: str, language: str) -> Callable[[str], str]:
    """`gemma_mlx.normalizers.normalizer`, which remembers what it was given: the same texts pass for every metric, and
    the same words for every row that is coloured. "" for a language that is not known."""
    return lru_cache(1 << 16)(normalizer(normalize, language or None))


def check_metrics(names: Sequence[str]) -> None:
    """Raise InputError for a name that is no metric."""
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, 2, 0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"--metrics {name}: unknown; {hint or 'known: ' + ', '.join(METRICS)}")


def measure(predictions: Sequence[Prediction], normalize: str, names: Sequence[str] = ()) -> list[Measured]:
    """Every metric that has rows.

    Args:
        predictions: of all tasks.
        normalize: see `gemma_mlx.normalizers.normalizer`; each row is normalised in its own language.
        names: metrics over all rows that were answered; by default those of `OF_TASK`, each over the rows of its task.

    Raises:
        InputError: an unknown metric or normaliser.
    """
    check_metrics(names)
    normalizer(normalize)
    tasks = {name: tuple(OF_TASK) for name in names} or {n: (task,) for task, ns in OF_TASK.items() for n in ns}
    found = [_measured(name, predictions, of, normalize) for name, of in tasks.items()]
    return [m for m in [*found, *_likelihoods(predictions)] if len(m.rows)]


def _measured(name: str, predictions: Sequence[Prediction], tasks: Sequence[str], normalize: str) -> Measured:
    rows = [i for i, p in enumerate(predictions) if p.task in tasks]
    used = {p.language: metric(name, p.language or None) for p in (predictions[i] for i in rows)}
    stats = [_counts(used[predictions[i].language], predictions[i], normalize) for i in rows]
    signatures = sorted({m.signature for m in used.values()} - {""})
    m = METRICS[name]
    return Measured(
        name, m.title, m.higher_is_better, m.points, m.corpus, m.text, np.array(rows, np.int64),
        np.array(stats, np.float64), "; ".join(signatures),
    )  # fmt: skip


def _counts(counted: Metric, p: Prediction, normalize: str) -> np.ndarray:
    if not counted.normalized:
        return counted.row(p.reference, p.prediction)
    clean = cleaner(normalize, p.language)
    return counted.row(clean(p.reference), clean(p.prediction))


def _likelihoods(predictions: Sequence[Prediction]) -> list[Measured]:
    """Perplexity and token accuracy of the references; counts: nats, tokens, likeliest tokens."""
    rows = [i for i, p in enumerate(predictions) if p.likelihood is not None and p.likelihood[1]]
    stats = np.array([predictions[i].likelihood for i in rows], np.float64).reshape(-1, 3)
    at = np.array(rows, np.int64)
    unit = "of the reference and its end token"
    return [
        Measured("perplexity", "perplexity", False, False, _perplexity, "{:.4g}".format, at, stats, unit),
        Measured("token_accuracy", "token accuracy", True, False, _accuracy, "{:.2%}".format, at, stats, unit),
    ]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of nats over tokens; beyond e^700, which a float just holds, that."""
    return np.exp(np.minimum(sums[..., 0] / np.maximum(sums[..., 1], 1), 700.0))


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return sums[..., 2] / np.maximum(sums[..., 1], 1)


def row_scores(measured: Sequence[Measured], count: int) -> dict[str, np.ndarray]:
    """Metric -> float64 [count], each row's own score; NaN where it has none."""
    scores = {}
    for m in measured:
        scores[m.name] = np.full(count, math.nan)
        scores[m.name][m.rows] = m.each()
    return scores


def row_errors(measured: Sequence[Measured], count: int) -> np.ndarray:
    """float64 [count]: each row's error by the first metric that counts it; NaN where none does."""
    errors = np.full(count, math.nan)
    for m in reversed(measured):
        errors[m.rows] = m.errors()
    return errors
