"""Rows by what they have in common: language, source, length, number of media, any column."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.languages import language_name
from gemma_mlx.normalizers import spaceless, tokens

SMALL = 20
"""Rows below which a group's score says little."""
MOST = 50
"""Groups of one breakdown; the smallest beyond that become one."""
MISSING, OTHERS = "(none)", "(others)"
DURATIONS = (2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds of audio and video at which a new group begins."""
LENGTHS = (1, 5, 10, 20, 50)
"""Words of the reference at which a new group begins."""


@dataclass(frozen=True)
class Group:
    """Rows that have something in common: their indices, in order."""

    name: str
    rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many rows."""
        return len(self.rows)

    @property
    def small(self) -> bool:
        """Whether its score should be read with care: fewer than `SMALL` rows."""
        return self.size < SMALL


def breakdown(rows: Sequence[Mapping[str, Any]], by: str) -> list[Group]:
    """The groups of the rows, each row in one.

    Args:
        rows: each row's facts: ``language``, ``where`` ("train.csv:8"), ``duration`` (seconds), ``media`` (how many),
            ``reference`` (text), and the cells of its other columns. None and "" are no fact.
        by: "language" (codes and names of one language are one group), "source" (the column, else the row's file),
            "duration", "media", "reference_length" (words), or a column.

    Returns:
        Groups in the order of their numbers, else the largest first; rows without the fact come last, as "(none)". No
        group where no row has the fact. Of more than `MOST` groups by name, the smallest are "(others)".

    Raises:
        InputError: `by` is neither of the above nor a column of any row.
    """
    if by not in _KEYS and not any(by in row for row in rows):
        known = sorted({name for row in rows for name in row} | set(_KEYS))
        raise InputError(f"group by {by!r}: no such column; there are {', '.join(known)}")
    key = _KEYS.get(by) or (lambda row: _name(row.get(by)))
    found: dict[tuple[float, str], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(key(row) or _NOWHERE, []).append(i)
    if set(found) <= {_NOWHERE}:
        return []
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    return _fewer([Group(name, tuple(members)) for (_, name), members in ordered])


def _fewer(groups: list[Group]) -> list[Group]:
    if len(groups) <= MOST:
        return groups
    last = groups[-1:] if groups[-1].name == MISSING else []
    named = groups[: len(groups) - len(last)]
    kept = MOST - 1 - len(last)
    rest = sorted(i for group in named[kept:] for i in group.rows)
    return [*named[:kept], Group(OTHERS, tuple(rest)), *last]


Key = tuple[float, str]
"""(place in the order, name)"""
_NOWHERE: Key = (float("inf"), MISSING)


def _name(value: Any) -> Key | None:
    text = "" if value is None else str(value).strip()
    return (0, text) if text else None


def _language(row: Mapping[str, Any]) -> Key | None:
    given = row.get("language")
    return _name(language_name(str(given or "")) or given)


def _source(row: Mapping[str, Any]) -> Key | None:
    return _name(row.get("source")) or _name(file_of(str(row.get("where") or "")))


def file_of(where: str) -> str:
    """The file of a row's place: "clips/train.csv" of "clips/train.csv:8"; the place itself where it has no number."""
    file, _, line = where.rpartition(":")
    return file if file and line.isdigit() else where


def _duration(row: Mapping[str, Any]) -> Key | None:
    seconds = row.get("duration")
    if seconds is None or seconds == "" or not float(seconds) >= 0:
        return None
    place = bisect_right(DURATIONS, float(seconds))
    low, high = (f"{d:g}" for d in (DURATIONS[place - 1] if place else 0, DURATIONS[min(place, len(DURATIONS) - 1)]))
    return place, f"{low}-{high} s" if place < len(DURATIONS) else f"{low} s or more"


def _length(row: Mapping[str, Any]) -> Key | None:
    if row.get("reference") is None:
        return None
    unit = "letters" if spaceless(row.get("language")) else "words"
    place = bisect_right(LENGTHS, len(tokens(str(row["reference"]), row.get("language"))))
    low, high = LENGTHS[place - 1] if place else 0, LENGTHS[min(place, len(LENGTHS) - 1)] - 1
    name = (
        f"{low} {unit} or more" if place == len(LENGTHS) else f"{low}-{high} {unit}" if high > low else f"{low} {unit}"
    )
    return place, name


def _media(row: Mapping[str, Any]) -> Key | None:
    number = row.get("media")
    return None if number is None else (int(number), str(int(number)))


_KEYS: dict[str, Callable[[Mapping[str, Any]], Key | None]] = {
    "language": _language,
    "source": _source,
    "duration": _duration,
    "media": _media,
    "reference_length": _length,
}
"""How rows are grouped by facts that are no plain column."""
