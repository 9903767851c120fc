"""All answers of one evaluation and what follows from them: scores, intervals, groups, a comparison; as files."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_mlx.evaluating.comparison import Compared, compare
from gemma_mlx.evaluating.measuring import OF_TASK, Measured, measure, row_errors, row_scores
from gemma_mlx.evaluating.prediction import Prediction
from gemma_mlx.files import write_whole
from gemma_mlx.grouping import Group, breakdown
from gemma_mlx.resampling import Interval

PREDICTIONS, REPORT, PAGE = "predictions.csv", "report.json", "report.html"
NORMALIZE = "whisper"
"""The normaliser, unless another is named."""
_COUNTED = {"transcript": "transcripts", "answer": "answers", "text": "texts"}


class Scored(NamedTuple):
    """A metric over some rows, and its 95 % interval."""

    measured: Measured
    interval: Interval


@dataclass(frozen=True)
class Report:
    """Predictions in the order of the rows, and how they are looked at.

    Attributes:
        predictions: of the model.
        normalize, metrics: see `gemma_mlx.evaluating.measuring.measure`.
        group_by: see `gemma_mlx.grouping.breakdown`.
        cluster_by: rows of one value of this column are drawn together in intervals and tests: speakers, recordings.
        other: predictions for the same rows that these are compared with, or None.
        other_name: what they are called.
        about: what else ``report.json`` says.
    """

    predictions: tuple[Prediction, ...]
    normalize: str = NORMALIZE
    metrics: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()
    cluster_by: str | None = None
    other: tuple[Prediction, ...] | None = None
    other_name: str = "base"
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def measured(self) -> list[Measured]:
        """The metrics of the predictions."""
        return measure(self.predictions, self.normalize, self.metrics)

    @cached_property
    def scores(self) -> dict[str, float | int]:
        """``transcripts`` with ``wer`` and ``cer``, ``answers`` with ``exact_match``, ``f1`` and ``anls``: those of
        which there are any. With named metrics ``rows`` and those. Then ``perplexity`` and ``token_accuracy``."""
        values = {m.name: m.value for m in self.measured}
        found: dict[str, float | int] = {}
        if self.metrics:
            found["rows"] = sum(p.task in OF_TASK for p in self.predictions)
            found |= {name: values.pop(name) for name in self.metrics if name in values}
        else:
            for task, names in OF_TASK.items():
                if count := sum(p.task == task for p in self.predictions):
                    found |= {_COUNTED[task]: count, **{name: values.pop(name) for name in names}}
        return {**found, **values}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Metric -> its 95 % interval."""
        return {m.name: m.interval(self.clusters) for m in self.measured}

    @cached_property
    def groups(self) -> dict[str, list[Group]]:
        """What rows are grouped by -> groups."""
        facts = [p.facts() for p in self.predictions]
        return {by: breakdown(facts, by) for by in self.group_by}

    @cached_property
    def group_scores(self) -> dict[str, list[tuple[Group, list[Scored | None]]]]:
        """What rows are grouped by -> (group, each metric over its rows; None where it counts none of them)."""

        def scored(whole: Measured, group: Group) -> Scored | None:
            inside = whole.among(group.rows)
            return inside and Scored(inside, inside.interval(self.clusters))

        return {by: [(g, [scored(m, g) for m in self.measured]) for g in groups] for by, groups in self.groups.items()}

    @property
    def normalizer(self) -> str:
        """The normaliser with the version that decides what it does."""
        package = "whisper-normalizer" if self.normalize == "whisper" else "gemma-mlx"
        return f"{self.normalize} ({package} {importlib.metadata.version(package)})"

    @cached_property
    def measured_other(self) -> list[Measured]:
        """The metrics of what the predictions are compared with."""
        return [] if self.other is None else measure(self.other, self.normalize, self.metrics)

    @cached_property
    def compared(self) -> list[Compared]:
        """The predictions' metrics beside the other ones'."""
        return compare(self.measured, self.measured_other, self.clusters)

    @property
    def cut_off(self) -> int:
        """Answers that ended at the most tokens."""
        return sum(p.finish == "length" for p in self.predictions)

    @cached_property
    def errors(self) -> np.ndarray:
        """float64 [rows]: see `gemma_mlx.evaluating.measuring.row_errors`."""
        return row_errors(self.measured, len(self.predictions))

    @cached_property
    def worst_first(self) -> list[int]:
        """Row numbers by `errors`, the largest first; rows without one last."""
        return np.argsort(-np.nan_to_num(self.errors, nan=-1.0), kind="stable").tolist()

    @cached_property
    def clusters(self) -> list[Any] | None:
        """A label for every row; rows without one stand for themselves."""
        if self.cluster_by is None:
            return None
        values = [p.facts().get(self.cluster_by) for p in self.predictions]
        return [(i,) if value in (None, "") else value for i, value in enumerate(values)]

    def table(self, width: int = 100) -> str:
        """The scores as lines of text."""
        from gemma_mlx.evaluating.console import as_text

        return as_text(self, width)

    def write(self, folder: str | Path) -> None:
        """Write ``predictions.csv`` (one line a row) and ``report.json`` (the scores) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PREDICTIONS, self._lines().encode())
        report = json.dumps(_plain(self.as_dict()), indent=2, ensure_ascii=False)
        write_whole(folder / REPORT, (report + "\n").encode())

    def as_dict(self) -> dict[str, Any]:
        """What ``report.json`` says."""
        found: dict[str, Any] = {**self.scores, "normalize": self.normalize}
        found["normalizer"] = self.normalizer
        found["counted"] = {m.name: m.signature for m in self.measured if m.signature}
        found["cut_off"] = self.cut_off
        found["intervals"] = {"level": 0.95, "clusters": self.cluster_by, **self.intervals}
        if self.group_by:
            found["groups"] = {by: [self._group(*each) for each in groups] for by, groups in self.group_scores.items()}
        if self.other is not None:
            found["comparison"] = {"with": self.other_name, **{c.own.name: self._compared(c) for c in self.compared}}
        return {**found, **self.about}

    @staticmethod
    def _group(group: Group, scores: list[Scored | None]) -> dict[str, Any]:
        inside = [scored for scored in scores if scored]
        found: dict[str, Any] = {"group": group.name, "rows": group.size}
        found |= {m.name: m.value for m, _ in inside}
        found["intervals"] = {m.name: interval for m, interval in inside}
        return found

    def _compared(self, c: Compared) -> dict[str, Any]:
        test = c.paired
        found = {"other": c.other.value, "difference": test.difference, "interval": [test.low, test.high]}
        found["p_value"] = test.p_value
        for name in ("better", "worse"):
            rows = getattr(c, name)
            found[name] = {"rows": len(rows), "first": [self.predictions[i].row_id for i in rows[:20]]}
        return found

    def _lines(self) -> str:
        """``predictions.csv``."""
        scores = row_scores(self.measured, len(self.predictions))
        others = row_errors(self.measured_other, len(self.predictions))
        cells = [name for name in dict.fromkeys(name for p in self.predictions for name in p.cells)]
        names = ["row_id", "where", "task", "reference", "prediction", "errors", "finish", "language", "source"]
        names += ["seconds", *scores, *cells]
        names += [] if self.other is None else ["other_prediction", "other_errors", "other_finish"]
        text = io.StringIO(newline="")
        out = csv.writer(text)
        out.writerow(names)
        for i, p in enumerate(self.predictions):
            line = [p.row_id, p.where, p.task, p.reference, p.prediction, _short(self.errors[i]), p.finish]
            line += [p.language, p.source, "" if p.seconds is None else _short(p.seconds)]
            line += [_short(values[i]) for values in scores.values()] + [p.cells.get(name, "") for name in cells]
            if self.other is not None:
                line += [self.other[i].prediction, _short(others[i]), self.other[i].finish]
            out.writerow(line)
        return text.getvalue()


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """For JSON: NaN, of which it knows nothing, becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
