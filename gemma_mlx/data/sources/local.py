"""Rows of a CSV (or TSV) file on this machine, each knowing its line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError

_FIELD_LIMIT = 1 << 24
"""Characters in one cell; Python's own limit (131,072) is shorter than a long document."""


class CsvRows:
    """An iterator of `Row` over one file; it can say where it is and go on from there.

    UTF-8 with or without a byte-order mark, RFC 4180 quoting (cells may hold commas, quotes and line breaks), a header
    in the first line. A ``.tsv`` file is split at tabs. Empty lines are skipped. Reading is streamed, and `state`
    is the byte after the last record given out, so resuming costs one seek.

    Raises (here and while iterating):
        InputError: naming file:line, for a missing or empty file, a bad header (no name, a name twice), a record with
            more or fewer cells than the header, broken quoting, and bytes that are not UTF-8.
    """

    def __init__(self, path: str | Path, state: dict[str, int] | None = None):
        self.path = Path(path)
        self.delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
        csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
        self._offset = self._line = self._row = 0
        self.columns: tuple[str, ...] = self._header()
        self._start = self.state()
        self.seek(state)

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file; give the path of a CSV file") from None
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read ({e.strerror}); give the path of a CSV file") from None

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        """Decoded lines, counted; the csv reader takes no line beyond the record it returns."""
        while raw := file.readline():
            self._line += 1
            try:
                # The byte-order mark is stripped from the first line alone.
                text = raw.decode("utf-8-sig" if self._offset == 0 else "utf-8")
            except UnicodeDecodeError as e:
                raise InputError(
                    f"{self.path}:{self._line}: not UTF-8 (byte {raw[e.start]:#04x}); save the file as UTF-8"
                ) from None
            self._offset += len(raw)
            yield text

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
        """(first line, cells) of every record."""
        reader = csv.reader(self._lines(file), delimiter=self.delimiter, strict=True)
        while True:
            first = self._line + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                raise InputError(
                    f"{self.path}:{first}: broken CSV record ({e}); a cell with commas, quotes or line breaks stands "
                    'in double quotes, a quote inside it is written ""'
                ) from None
            if cells:
                yield first, cells

    def _header(self) -> tuple[str, ...]:
        with self._open() as file:
            first, cells = next(self._records(file), (1, []))
        names = tuple(cell.strip() for cell in cells)
        if not names:
            raise InputError(f"{self.path}:1: the file is empty; expected a header line such as audio_path,text")
        if "" in names:
            raise InputError(f"{self.path}:{first}: column {names.index('') + 1} of the header has no name; name it")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{self.path}:{first}: column {twice[0]!r} stands twice in the header; rename one of them")
        return names

    def state(self) -> dict[str, int]:
        """Where the next record starts: byte offset, lines before it, records given out."""
        return {"offset": self._offset, "line": self._line, "row": self._row}

    def seek(self, state: dict[str, int] | None = None) -> None:
        """Go on from a `state` of the same file; from its first record if there is none."""
        state = state or self._start
        self._offset, self._line, self._row = state["offset"], state["line"], state["row"]

    def __iter__(self) -> Iterator[Row]:
        with self._open() as file:
            file.seek(self._offset)
            for line, cells in self._records(file):
                where = f"{self.path}:{line}"
                if len(cells) != len(self.columns):
                    raise InputError(
                        f"{where}: wrong sample format: {len(cells)} cells, the header has {len(self.columns)} "
                        f"({', '.join(self.columns)}); put cells that contain {self.delimiter!r} in double quotes"
                    )
                self._row += 1
                yield Row(dict(zip(self.columns, cells, strict=True)), where)
