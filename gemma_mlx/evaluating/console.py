"""A report as tables on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from gemma_mlx.evaluating.measuring import Measured
from gemma_mlx.evaluating.report import Report, Scored
from gemma_mlx.grouping import SMALL, Group
from gemma_mlx.resampling import Interval

SHOWN = 5
"""Rows in a list of the worst."""
MOST_GROUPS = 20
MOST_METRICS = 3
"""Groups and metrics of a table of groups."""


def as_text(report: Report, width: int = 100) -> str:
    """The tables as plain text of at most ``width`` columns."""
    from rich.console import Console

    text = io.StringIO()
    show(report, Console(file=text, width=width))
    return text.getvalue().rstrip("\n")


def show(report: Report, console: Any) -> None:
    """Print a report on a rich console."""
    for part in _parts(report):
        console.print(part, markup=False, highlight=False)


def told(m: Measured, interval: Interval) -> str:
    """An interval as it is printed; "" where one row gives none."""
    return "" if not interval.known else f"{m.tell(interval.low)} to {m.tell(interval.high)}"


def change(m: Measured, difference: float) -> str:
    """A difference of two scores with its sign."""
    sign = "-" if difference < 0 else "+"
    text = m.tell(abs(difference))
    return f"{sign}{text[:-1]} pts" if text.endswith("%") else sign + text


def of_group(scored: Scored | None) -> str:
    """A score with its interval in brackets, in short; "" where there is none."""
    if scored is None:
        return ""
    m, interval = scored
    around = _brief(m, interval)
    return f"{m.tell(m.value)} ({around})" if around else m.tell(m.value)


def nothing_to_group(by: str) -> str:
    """What is said in place of groups."""
    return f"by {by}: no row has one"


def _brief(m: Measured, interval: Interval) -> str:
    return told(m, interval).replace("%", "").replace(" to ", "–")


def remarks(report: Report) -> list[str]:
    """What a reader must know beside the scores."""
    lines = [f"normaliser: {report.normalizer}; intervals: 95 %, bootstrap" + (
        f" over {report.cluster_by}" if report.cluster_by else " over rows"
    )]  # fmt: skip
    if report.cut_off:
        lines.append(
            f"{report.cut_off} of {len(report.predictions)} answers were cut off at the most tokens (--max-tokens); "
            "what a model would have gone on to say is not counted"
        )
    if any(group.small for groups in report.groups.values() for group in groups):
        lines.append(f"groups of fewer than {SMALL} rows say little")
    return lines


def _parts(report: Report) -> Iterator[Any]:
    yield _summary(report)
    yield from remarks(report)
    for by, groups in report.group_scores.items():
        yield _groups(report, by, groups) if groups else nothing_to_group(by)
        if len(groups) > MOST_GROUPS:
            yield f"and {len(groups) - MOST_GROUPS} more groups in report.json"
    if report.other is not None and report.compared:
        yield from _changes(report)
    elif np.nansum(report.errors) > 0:
        yield _worst(report)


def _grid(title: str, *columns: str) -> Any:
    """A table whose first column is words and whose others are figures."""
    table = _table(title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _table(title: str, **options: Any) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, **options)


def _summary(report: Report) -> Any:
    if report.other is None:
        table = _grid("Scores", "", "rows", "score", "95 % interval")
        for m in report.measured:
            table.add_row(m.title, str(len(m.rows)), m.tell(m.value), told(m, report.intervals[m.name]))
        return table
    both = {c.own.name: c for c in report.compared}
    table = _grid("Scores", "", "rows", "model", "95 % interval", report.other_name, "difference", "p")
    for m in report.measured:
        line = [m.title, str(len(m.rows)), m.tell(m.value), _brief(m, report.intervals[m.name])]
        if c := both.get(m.name):
            line += [m.tell(c.other.value), _difference(m, c.paired), f"{c.paired.p_value:.4f}"]
        table.add_row(*line)
    return table


def _difference(m: Measured, test: Any) -> str:
    around = "" if np.isnan(test.low) else f" ({change(m, test.low)} to {change(m, test.high)})"
    return (change(m, test.difference) + around).replace(" pts", "")


def _groups(report: Report, by: str, groups: list[tuple[Group, list[Scored | None]]]) -> Any:
    table = _grid(f"By {by}", "", "rows", *(m.title for m in report.measured[:MOST_METRICS]))
    for group, scores in groups[:MOST_GROUPS]:
        table.add_row(*_escaped([group.name, str(group.size), *map(of_group, scores[:MOST_METRICS])]))
    return table


def _rows(report: Report, title: str, rows: Any) -> Any:
    names = ["row", "reference", "model"] + ([] if report.other is None else [report.other_name])
    table = _table(title, show_lines=len(names) > 3)
    for name in names:
        table.add_column(name, overflow="fold")
    for i in rows:
        p = report.predictions[i]
        line = [PurePath(p.row_id).name, _cut(p.reference), _cut(p.prediction)]
        table.add_row(*_escaped(line + ([_cut(report.other[i].prediction)] if report.other is not None else [])))
    return table


def _escaped(cells: list[str]) -> list[Any]:
    from rich.text import Text

    return [Text(cell) for cell in cells]


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _changes(report: Report) -> Iterator[Any]:
    first = report.compared[0]
    counts = f"{first.own.title}: {len(first.better)} rows better than {report.other_name}, {len(first.worse)} worse"
    yield f"{counts}, {len(first.own.rows) - len(first.better) - len(first.worse)} equal"
    for title, rows in (("Most improved", first.better), ("Most worsened", first.worse)):
        if rows:
            yield _rows(report, title, rows[:SHOWN])


def _worst(report: Report) -> Any:
    order = [i for i in report.worst_first[:SHOWN] if report.errors[i] > 0]
    return _rows(report, "Worst rows", order)
