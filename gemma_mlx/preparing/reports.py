"""What is told about data: lines on the screen, report.json, bad_rows.csv, duplicates.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.files import write_whole
from gemma_mlx.preparing.check import Checked
from gemma_mlx.preparing.rows import Rows

BAD_ROWS, DUPLICATES, REPORT = "bad_rows.csv", "duplicates.csv", "report.json"
SHOWN = 20
"""Bad rows that are shown on the screen."""
LISTED = 10_000
"""Lines of duplicates.csv for each kind: a row has to be read again for its place."""


class BadRows:
    """The list of bad rows, written as they are met.

    Attributes:
        count: how many there are.
        shown: the first of them as ``where: reason``.
    """

    def __init__(self, path: Path):
        self.count, self.shown = 0, []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._out = csv.writer(self._file)
        self._out.writerow(["where", "id", "reason"])

    def add(self, row: Checked) -> None:
        """One more."""
        self.count += 1
        self._out.writerow([row.where, row.row_id, row.reason])
        if len(self.shown) < SHOWN:
            self.shown.append(f"{row.where}: {row.reason}")

    def __enter__(self) -> BadRows:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_duplicates(path: Path, found: Mapping[str, tuple[Rows, Rows, np.ndarray]]) -> None:
    """Write each row that repeats another beside the first such.

    Args:
        path: the file.
        found: what they share -> (rows, the rows they repeat, int64 [n, 2] of positions in both).
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["same", "where", "id", "first_where", "first_id"])
        for kind, (rows, others, pairs) in found.items():
            for row, first in pairs[:LISTED].tolist():
                out.writerow([kind, *_place(rows, row), *_place(others, first)])


def _place(rows: Rows, index: int) -> tuple[str, str]:
    source, place = rows.find(index)
    row = source.table[place]
    return row.where, source.text(row, "id")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write report.json."""
    write_whole(path, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as a short table."""
    yield from _table(report["data"], report["train"], report["tokens"])
    if "valid" in report:
        yield from _table(report["valid_data"], report["valid"], report["valid_tokens"])
    yield from _line("duplicates", _counts(report["duplicates"], "same "))
    if "leaks" in report:
        yield from _line("leaks into validation", _counts(report["leaks"], "same "))
    for name, rows in report.get("written", {}).items():
        yield from _line("written", f"{name}: {rows} rows")


def _table(name: str, found: Mapping[str, Any], tokens: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name}: {found['rows']} rows, {found['bad']} bad"
    yield from _line("rows", _counts(found["kinds"]))
    if audio := found.get("audio"):
        yield from _line("audio", f"{audio['clips']} clips, {audio['hours']:.2f} h; {audio['over_30_s']} over 30 s")
        yield from _line("  seconds", _spread(audio["seconds"]))
        yield from _line("  sample rates", _counts(audio["sample_rates"]))
    if images := found.get("images"):
        yield from _line("pictures", str(images["pictures"]))
        yield from _line("  width", _spread(images["width"]))
        yield from _line("  height", _spread(images["height"]))
    if videos := found.get("videos"):
        yield from _line("videos", f"{videos['films']}; seconds: {_spread(videos['seconds'])}")
    if "languages" in found:
        yield from _line("languages", _counts(found["languages"]))
    yield from _line("tokens", f"{_spread(tokens['each'])}; {tokens['total']} in all ({tokens['by']})")


def _line(name: str, text: str) -> Iterator[str]:
    if text:
        yield f"  {name:<22} {text}"


def _counts(found: Mapping[str, int], before: str = "") -> str:
    shown = [f"{before}{name} {n}" for name, n in list(found.items())[:8]]
    return ", ".join(shown) + (f", and {len(found) - 8} more" if len(found) > 8 else "")


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['min']:g} to {found['max']:g}, median {found['median']:g}" if found else "none"
