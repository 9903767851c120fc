"""Rows of a CSV (or TSV) file on this machine, each knowing its line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from gemma_mlx.data.blob import suffix_of
from gemma_mlx.data.sources.lines import FIELD_LIMIT, LineFile, broken_record, csv_starts
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError
from gemma_mlx.files import file_digest

_MARK = b"\xef\xbb\xbf"
"""The byte-order mark; a quote behind it opens a cell."""


class CsvTable:
    """A CSV file as a `gemma_mlx.data.sources.table.Table`.

    UTF-8 with or without a byte-order mark, RFC 4180 quoting (cells may hold commas, quotes and line breaks), a header
    in the first line, whose first name may be missing (an index that some programs write). A ``.tsv`` file is split at
    tabs. Empty lines are skipped. Opening scans the file once for the beginnings of its records, 12 bytes of memory
    each.

    Raises:
        InputError: here, naming file:line, for a missing or empty file, a bad header (no name, a name twice), a quote
            that is never closed, and NUL characters; from a row, for more or fewer cells than the header has, broken
            quoting, and bytes that are not UTF-8.
    """

    units = None

    def __init__(self, path: str | Path, name: str | None = None, base: str | None = None):
        self.path = Path(path)
        self.name, self.base = name or str(path), base or str(self.path.parent)
        self.delimiter = "\t" if suffix_of(self.name) == ".tsv" else ","
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
        self._file = LineFile(self.path, "CSV", self.name)
        begin = len(_MARK) if self._file.read(0, len(_MARK)) == _MARK else 0
        starts, lines = csv_starts(self._file, self.delimiter, begin, 0)
        self.columns = self._header(starts, lines)
        self._starts, self._lines = starts[1:], lines[1:]

    def _header(self, starts: np.ndarray, lines: np.ndarray) -> tuple[str, ...]:
        if not len(lines):
            raise InputError(f"{self.name}:1: the file is empty; expected a header line such as audio_path,text")
        where = f"{self.name}:{lines[0]}"
        names = tuple(cell.strip() for cell in self._cells(int(starts[0]), int(starts[1]), int(lines[0])))
        if "" in names[1:]:
            raise InputError(f"{where}: column {names.index('', 1) + 1} of the header has no name; name it")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{where}: column {twice[0]!r} stands twice in the header; rename one of them")
        return names

    def _cells(self, start: int, end: int, line: int) -> list[str]:
        text = self._file.text(start, end, f"{self.name}:{line}")
        # Not splitlines: to the csv module only a line feed ends a line, and only outside quotes a record.
        parts = (part + "\n" for part in text.split("\n"))
        try:
            return next(csv.reader(parts, delimiter=self.delimiter, strict=True))
        except csv.Error as e:
            raise broken_record(self.name, line, e) from None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        line = int(self._lines[index])
        cells = self._cells(int(self._starts[index]), int(self._starts[index + 1]), line)
        where = f"{self.name}:{line}"
        if len(cells) != len(self.columns):
            raise InputError(
                f"{where}: wrong sample format: {len(cells)} cells, the header has {len(self.columns)} "
                f"({', '.join(self.columns)}); put cells that contain {self.delimiter!r} in double quotes"
            )
        return Row(dict(zip(self.columns, cells, strict=True)), where)

    def fingerprint(self) -> str:
        """sha256 of the file."""
        return file_digest(self.path)
