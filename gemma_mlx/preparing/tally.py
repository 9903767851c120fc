"""What all rows of a table add up to, in a few dozen bytes a row."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_mlx.preparing.check import Checked

KEYS = ("id", "row", "text", "group")
MOST_NAMES = 1000
"""Different languages or kinds that are told apart; a column with more holds something else."""
LONG = 30.0
"""Seconds that a clip may have in training."""


@dataclass
class Tally:
    """Counts and 64-bit hashes of the rows of one table, in its order.

    Attributes:
        good: one byte a row, 0 for a bad one.
        keys: as in `Checked`; 0 in bad rows.
        columns: the columns that rows have, in order of appearance.
        over_long: clips over 30 s, those in bad rows too.
    """

    good: bytearray = field(default_factory=bytearray)
    tokens: array = field(default_factory=lambda: array("i"))
    keys: dict[str, array] = field(default_factory=lambda: {name: array("Q") for name in KEYS})
    columns: dict[str, None] = field(default_factory=dict)
    kinds: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    rates: Counter = field(default_factory=Counter)
    seconds: array = field(default_factory=lambda: array("f"))
    video_seconds: array = field(default_factory=lambda: array("f"))
    sizes: array = field(default_factory=lambda: array("I"))
    over_long: int = 0
    _content: array = field(default_factory=lambda: array("Q"))
    _starts: array = field(default_factory=lambda: array("Q", [0]))

    def add(self, row: Checked) -> None:
        """The next row."""
        good = not row.reason
        self.good.append(good)
        self.over_long += sum(seen.kind == "audio" and seen.seconds > LONG for seen in row.media)
        self.tokens.append(row.tokens if good else 0)
        for name, kept in self.keys.items():
            kept.append(row.keys.get(name, 0) if good else 0)
        if good:
            self._add_good(row)
        self._starts.append(len(self._content) // 2)

    def _add_good(self, row: Checked) -> None:
        self.columns |= dict.fromkeys(row.columns)
        _count(self.kinds, row.kind)
        if row.language:
            _count(self.languages, row.language)
        for seen in row.media:
            self._content.frombytes(seen.content)
            if seen.kind == "audio":
                self.seconds.append(seen.seconds)
                _count(self.rates, seen.rate)
            elif seen.kind == "image":
                self.sizes.extend(seen.size)
            else:
                self.video_seconds.append(seen.seconds)

    def __len__(self) -> int:
        return len(self.good)

    def content(self, index: int) -> list[bytes]:
        """The digests of a row's media, in the order of `media_cells`."""
        first, last = self._starts[index], self._starts[index + 1]
        return [self._content[2 * i : 2 * i + 2].tobytes() for i in range(first, last)]

    def key(self, name: str) -> np.ndarray:
        """uint64 [rows]."""
        return np.array(self.keys[name], np.uint64)

    def media_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint64 [media] of each medium's content, int64 [media] its row), a row's equal media once."""
        keys = np.array(self._content, np.uint64)[::2]
        rows = np.repeat(np.arange(len(self)), np.diff(np.array(self._starts, np.int64)))
        order = np.lexsort((keys, rows))
        keys, rows = keys[order], rows[order]
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
        return keys[fresh], rows[fresh]

    def summary(self) -> dict[str, Any]:
        """What report.json says of the table."""
        bad = self.good.count(0)
        found: dict[str, Any] = {"rows": len(self), "good": len(self) - bad, "bad": bad, "kinds": _most(self.kinds)}
        if self.seconds or self.over_long:
            seconds = np.array(self.seconds, np.float64)
            found["audio"] = {
                "clips": len(seconds),
                "hours": round(float(seconds.sum()) / 3600, 4),
                "seconds": spread(seconds),
                "over_30_s": self.over_long,
                "sample_rates": {str(rate or "unknown"): n for rate, n in self.rates.most_common()},
            }
        if self.sizes:
            sizes = np.array(self.sizes).reshape(-1, 2)
            sides = {"width": spread(sizes[:, 1]), "height": spread(sizes[:, 0])}
            found["images"] = {"pictures": len(sizes), **sides}
        if self.video_seconds:
            found["videos"] = {"films": len(self.video_seconds), "seconds": spread(np.array(self.video_seconds))}
        if self.languages:
            found["languages"] = _most(self.languages)
        return found

    def lengths(self) -> np.ndarray:
        """int32: tokens of the good rows."""
        return np.array(self.tokens, np.int32)[np.frombuffer(bytes(self.good), np.uint8) > 0]


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, median and most, to three decimals; nothing of nothing."""
    if not len(values):
        return {}
    three = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {name: round(float(value), 3) for name, value in three.items()}


def _count(counter: Counter, name: Any) -> None:
    counter[name if name in counter or len(counter) < MOST_NAMES else "others"] += 1


def _most(counter: Counter) -> dict[str, int]:
    return dict(counter.most_common())


def duplicates(tally: Tally) -> dict[str, np.ndarray]:
    """What repeats within a table: "id", "row" (text and media), "media" -> int64 [n, 2] of (row, the first such)."""
    found = {name: _repeated(tally.key(name), np.arange(len(tally))) for name in ("id", "row")}
    return found | {"media": _repeated(*tally.media_keys())}


def leaks(train: Tally, valid: Tally) -> dict[str, np.ndarray]:
    """What both tables have: "media", "text" -> int64 [n, 2] of (row of `valid`, the first such of `train`)."""
    everything = np.arange(len(train)), np.arange(len(valid))
    return {
        "media": _shared(*train.media_keys(), *valid.media_keys()),
        "text": _shared(train.key("text"), everything[0], valid.key("text"), everything[1]),
    }


def _repeated(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    same = np.zeros(len(keys), bool)
    same[1:] = (keys[1:] == keys[:-1]) & (keys[1:] != 0)
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys)))) if len(keys) else order
    return _pairs(rows[same], rows[starts[same]])


def _shared(keys: np.ndarray, rows: np.ndarray, wanted: np.ndarray, asking: np.ndarray) -> np.ndarray:
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    at = np.searchsorted(keys, wanted)
    hit = (at < len(keys)) & (wanted != 0)
    hit[hit] = keys[at[hit]] == wanted[hit]
    return _pairs(asking[hit], rows[at[hit]])


def _pairs(rows: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Each row once, with the earliest other, in the order of rows."""
    pairs = np.stack([rows, firsts], axis=1).astype(np.int64)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    fresh = np.ones(len(pairs), bool)
    fresh[1:] = pairs[1:, 0] != pairs[:-1, 0]
    return pairs[fresh]
