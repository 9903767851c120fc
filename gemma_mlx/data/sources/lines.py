"""Where each record of a text file begins, found once by a scan that keeps no text."""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from weakref import ref

import numpy as np

from gemma_mlx.errors import InputError, SourceError

CHUNK = 8 << 20
MOST_RECORD = 64 << 20
"""Bytes of one record; a longer one is no row but a broken quote or a wrong file."""
FIELD_LIMIT = 1 << 24
"""Characters of one cell; Python's own limit (131,072) is shorter than a long document."""
MOST_OPEN = 64
"""Files that are open at a time; a process may have few (256 where macOS sets the limit)."""
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


class _OpenFiles:
    """Lets the file that was opened first go, where there are too many; its last reader closes it."""

    def __init__(self) -> None:
        self._users: list[ref[LineFile]] = []
        self._lock = threading.Lock()

    def add(self, user: LineFile) -> None:
        with self._lock:
            self._users = [one for one in self._users if one() not in (None, user)] + [ref(user)]
            while len(self._users) > MOST_OPEN:
                if (first := self._users.pop(0)()) is not None:
                    first.file = None


class LineFile:
    """A file of records, read by place from several threads. It stays the file that was opened, also when another one
    takes its name, as long as no more than `MOST_OPEN` of a program are in use.

    Raises:
        InputError: here, where it cannot be read.
        SourceError: while reading, it is no longer the file that was opened.
    """

    def __init__(self, path: Path, kind: str, name: str = ""):
        self.path, self.name = path, name or str(path)
        try:
            self.file: BinaryIO | None = path.open("rb")
            self._stamp = _stamp(self.file)
            self.size = self._stamp[2]
            _OPEN.add(self)
            self.read(0, 1)
        except FileNotFoundError:
            raise InputError(f"{self.name}: no such file; give the path of a {kind} file") from None
        except OSError as e:
            raise InputError(f"{self.name}: cannot be read ({e.strerror}); give the path of a {kind} file") from None

    def read(self, start: int, end: int) -> bytes:
        """The bytes in [start, end), as far as there are any."""
        end = min(end, self.size)
        file = self.file or self._again()  # which stays open in here, also where it is let go meanwhile
        data = os.pread(file.fileno(), max(0, end - start), start)
        if len(data) < end - start:
            raise SourceError(f"{self.name}: became shorter while it was in use; restore it and resume")
        return data

    def _again(self) -> BinaryIO:
        try:
            file = self.path.open("rb")
        except OSError as e:
            raise SourceError(f"{self.name}: cannot be read any more ({e.strerror}); restore it and resume") from None
        if _stamp(file) != self._stamp:
            file.close()
            raise SourceError(f"{self.name}: changed while it was in use; start again, or restore it and resume")
        self.file = file
        _OPEN.add(self)
        return file

    def text(self, start: int, end: int, where: str, most: int = MOST_RECORD) -> str:
        """The same as text.

        Raises:
            InputError: not UTF-8, or more than `most` bytes.
        """
        if end - start > most:
            raise InputError(f"{where}: a record of {(end - start) >> 20} MiB, the limit is {most >> 20}; split it")
        raw = self.read(start, end)
        try:
            return raw.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as e:
            line = raw[: e.start].count(b"\n")
            place = where if not line else f"{where} (line {line + 1} of the record)"
            raise InputError(f"{place}: not UTF-8 (byte {raw[e.start]:#04x}); save the file as UTF-8") from None

    def piece(self, start: int, line: int) -> bytes:
        """The bytes from `start`, the beginning of a line after `line` lines, to the end of a line some MiB on; b"" at
        the end of the file.

        Raises:
            InputError: a NUL character, or a line longer than `MOST_RECORD`; naming file:line.
        """
        piece = self.read(start, start + CHUNK)
        while piece and b"\n" not in piece and start + len(piece) < self.size:
            if len(piece) > MOST_RECORD:
                raise InputError(
                    f"{self.name}:{line + 1}: a line of more than {MOST_RECORD >> 20} MiB; expected a text file, one "
                    "record a line"
                )
            piece += self.read(start + len(piece), start + len(piece) + CHUNK)
        if start + len(piece) < self.size:
            piece = piece[: piece.rfind(b"\n") + 1]
        if (at := piece.find(b"\0")) >= 0:
            line += piece[:at].count(b"\n") + 1
            raise InputError(f"{self.name}:{line}: a NUL character; save the file as plain UTF-8 text")
        return piece


def _stamp(file: BinaryIO) -> tuple[int, int, int, int]:
    """Which file it is, its size and time."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


_OPEN = _OpenFiles()


class Starts:
    """Byte offset and line of each record, 12 bytes a record."""

    def __init__(self) -> None:
        self._offsets: list[np.ndarray] = []
        self._lines: list[np.ndarray] = []

    def add(self, offsets: np.ndarray, lines: np.ndarray) -> None:
        """More records."""
        self._offsets.append(offsets.astype(np.int64))
        self._lines.append(lines.astype(np.uint32))

    def arrays(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(offsets with the file's end behind them, lines counted from 1)."""
        none = [np.zeros(0, np.int64)]
        lines = np.concatenate(self._lines or none).astype(np.uint32)
        return np.concatenate([*(self._offsets or none), np.array([end], np.int64)]), lines


def plain_starts(file: LineFile, start: int = 0, line: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Records of one line each; empty lines are none. See `Starts.arrays`, `LineFile.piece`."""
    found = Starts()
    while piece := file.piece(start, line):
        begins, filled = _lines_of(piece)
        found.add(start + begins[filled], line + 1 + np.flatnonzero(filled))
        start, line = start + len(piece), line + len(begins)
    return found.arrays(file.size)


def csv_starts(file: LineFile, delimiter: str, start: int, line: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of a CSV file, whose quoted cells may hold line breaks. See `Starts.arrays`, `LineFile.piece`.

    Lines whose quotes are all closed again on the same line are counted off many at a time; from the first other one
    on, the rest of a piece is left to Python's csv reader, which decides what a record is.

    Raises:
        InputError: naming file:line, for a quote that is never closed.
    """
    found = Starts()
    while piece := file.piece(start, line):
        begins, filled = _lines_of(piece)
        simple = _simple_lines(piece, begins, delimiter)
        filled[simple:] = False
        found.add(start + begins[filled], line + 1 + np.flatnonzero(filled))
        end = start + len(piece)
        if simple == len(begins):
            start, line = end, line + len(begins)
        else:
            start, line = _read_records(file, found, delimiter, start + int(begins[simple]), line + simple, end)
    return found.arrays(file.size)


def line_edges(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each line begins, where its line break or the end is) in bytes, uint8 [n]."""
    ends = np.flatnonzero(text == _NEWLINE)
    if not len(ends) or ends[-1] != len(text) - 1:
        ends = np.append(ends, len(text))
    return np.concatenate([[0], ends[:-1] + 1]), ends


def _lines_of(piece: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(where each line begins, whether there is something in it)."""
    text = np.frombuffer(piece, np.uint8)
    begins, ends = line_edges(text)
    lengths = ends - begins
    return begins, (lengths > 1) | ((lengths == 1) & (text[begins] != _RETURN))


def _simple_lines(piece: bytes, begins: np.ndarray, delimiter: str) -> int:
    """How many lines from the first on are whole records as far as quotes go.

    A line is if its quotes are even in number and each one that opens stands where a cell begins or doubles the one
    before it; then the quotes between open and close in turn.
    """
    if b'"' not in piece:
        return len(begins)
    text = np.frombuffer(piece, np.uint8)
    quotes = np.flatnonzero(text == _QUOTE)
    line = np.searchsorted(begins, quotes, "right") - 1
    first = np.searchsorted(line, line, "left")  # of the quotes on the same line
    opens = (np.arange(len(quotes)) - first) % 2 == 0
    before = text[quotes - 1]
    well = (quotes == begins[line]) | (before == ord(delimiter)) | (before == _QUOTE)
    odd = np.flatnonzero(np.bincount(line, minlength=len(begins)) % 2)
    return int(min([len(begins), *odd[:1], *line[opens & ~well][:1]]))


def _read_records(file: LineFile, found: Starts, delimiter: str, start: int, line: int, end: int) -> tuple[int, int]:
    """Records from `start` to the first that begins at or after `end`; (where that is, lines before it)."""
    offsets, lines, at, read = [], [], start, line

    def texts() -> Iterator[str]:
        nonlocal at, read
        while piece := file.piece(at, read):
            for raw in _split(piece):
                at, read = at + len(raw), read + 1
                yield raw.decode("latin-1")  # quotes, delimiters and line breaks are the same bytes in UTF-8

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while at < end:
        begun, first = at, read + 1
        try:
            cells = next(reader, None)
        except csv.Error as e:
            raise broken_record(file.name, first, e) from None
        if cells is None:
            break
        if cells:
            offsets.append(begun)
            lines.append(first)
    found.add(np.array(offsets, np.int64), np.array(lines, np.int64))
    return at, read


def _split(piece: bytes) -> list[bytes]:
    """Lines with their ends; a lone carriage return ends none."""
    lines = [line + b"\n" for line in piece.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def broken_record(name: str, line: int, error: csv.Error) -> InputError:
    """What is wrong with a record that the csv reader refuses."""
    return InputError(
        f"{name}:{line}: broken CSV record ({error}); a cell with commas, quotes or line breaks stands in double "
        'quotes, a quote inside it is written ""'
    )
