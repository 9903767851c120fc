"""Two models' answers to the same rows: the difference of their scores, and which rows changed."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.adapters.attach import instead
from gemma_mlx.data.examples import Example
from gemma_mlx.errors import InputError
from gemma_mlx.evaluating.measuring import Measured
from gemma_mlx.resampling import Paired, paired

BASE = "base"
_NEEDED = ("row_id", "reference", "prediction")


@dataclass(frozen=True)
class Compared:
    """One metric of two sides over the same rows.

    Attributes:
        own, other: the metric of the model and of what it is compared with.
        paired: the model's score minus the other's, its 95 % interval, and a p-value.
        better, worse: row numbers, the largest change first.
    """

    own: Measured
    other: Measured
    paired: Paired
    better: tuple[int, ...]
    worse: tuple[int, ...]


def compare(
    own: Sequence[Measured], other: Sequence[Measured], clusters: Sequence[object] | None = None
) -> list[Compared]:
    """Every metric that both sides have over the same rows; ``clusters`` are labels of all predictions."""
    found, others = [], {m.name: m for m in other}
    for mine in own:
        theirs = others.get(mine.name)
        if theirs is None or not np.array_equal(mine.rows, theirs.rows):
            continue
        of_rows = None if clusters is None else [clusters[i] for i in mine.rows]
        test = paired(theirs.stats, mine.stats, mine.corpus, clusters=of_rows)
        gain = theirs.errors() - mine.errors()
        order = np.argsort(-np.abs(gain), kind="stable")
        better, worse = (tuple(mine.rows[order[sign * gain[order] > 0]].tolist()) for sign in (1, -1))
        found.append(Compared(mine, theirs, test, better, worse))
    return found


def earlier_answers(path: Path, rows: Sequence[Example]) -> list[tuple[str, str]]:
    """(prediction, how it finished) of each row, from the ``predictions.csv`` of an earlier evaluation.

    Raises:
        InputError: not such a file; a row is missing, or has another reference.
    """
    there: dict[str, list[dict[str, str]]] = {}
    limit = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            if missing := [name for name in _NEEDED if name not in (lines.fieldnames or ())]:
                raise InputError(f"--compare {path}: no column {missing[0]!r}; expected a predictions.csv")
            for line in lines:
                there.setdefault(line["row_id"], []).append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--compare {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    finally:
        csv.field_size_limit(limit)  # it is the process's
    return [_of_row(path, row, there.get(row.row_id, [])) for row in rows]


def _of_row(path: Path, row: Example, lines: list[dict[str, str]]) -> tuple[str, str]:
    """The row's earlier answer, which is taken off the list: rows of one name are in the same order there."""
    if not lines:
        raise InputError(f"--compare {path}: no answer to {row.where} ({row.row_id}); evaluate the same rows")
    line = lines.pop(0)
    if line["reference"] != row.reference:
        raise InputError(f"--compare {path}: {row.where} had another reference there; evaluate the same rows")
    return line["prediction"], line.get("finish") or "stop"


@contextmanager
def other_model(model: Any, compare: str | Path) -> Iterator[Any]:
    """The same resident base without its adapter (``BASE``) or with another one; afterwards it is as it was."""
    with instead(model, None if str(compare) == BASE else compare):
        yield model
