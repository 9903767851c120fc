"""Rows of a plain text file, to go on with: lines, paragraphs, or the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_mlx.data.sources.cells import MAX_TEXT_BYTES
from gemma_mlx.data.sources.digests import ends_digest
from gemma_mlx.data.sources.lines import LineFile, line_edges
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError

SEPARATORS = ("line", "paragraph", "document")
_BLANK = np.isin(np.arange(256), list(b" \t\r\n\v\f"))


class TextTable:
    """A text file with one column, ``text``.

    UTF-8 with or without a byte-order mark. Blank lines are no rows. Line breaks inside a row are ``\\n``, and none
    ends it. Opening scans the file once; 20 bytes of memory a row.

    Args:
        path: the file.
        name: what messages call it; the path if None.
        base: see `gemma_mlx.data.sources.table.Table`; the file's folder if None.
        sep: what a row is: every "line"; every "paragraph", which blank lines end; or the whole "document".

    Raises:
        InputError: here, for a missing file, one of nothing but blanks, NUL characters, UTF-16, an unknown `sep`;
            from a row, naming file:line, for bytes that are not UTF-8 and more than `MAX_TEXT_BYTES`.
    """

    columns = ("text",)
    units = None

    def __init__(self, path: Path, name: str | None = None, base: str | None = None, *, sep: str = "line"):
        if sep not in SEPARATORS:
            raise InputError(f"sep is {sep!r}; expected one of {', '.join(SEPARATORS)}")
        self.path, self.name = path, name if name is not None else str(path)
        self.base = base if base is not None else str(path.parent)
        self._file, self._sep = LineFile(path, "text", self.name), sep
        if self._file.read(0, 2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{self.name}:1: UTF-16; save the file as UTF-8")
        begins, ends, lines = _filled_lines(self._file)
        if not len(lines):
            raise InputError(f"{self.name}:1: no text; expected at least one line that is not blank")
        if sep == "paragraph":
            cuts = np.flatnonzero(np.diff(lines) != 1) + 1
        else:
            cuts = np.arange(1, len(lines)) if sep == "line" else np.zeros(0, np.int64)
        first = np.concatenate([[0], cuts])
        last = np.concatenate([cuts - 1, [len(lines) - 1]])
        self._begins, self._ends, self._lines = begins[first], ends[last], lines[first].astype(np.uint32)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        where = f"{self.name}:{int(self._lines[index])}"
        text = self._file.text(int(self._begins[index]), int(self._ends[index]), where, MAX_TEXT_BYTES)
        return Row({"text": text.replace("\r\n", "\n").removesuffix("\r")}, where)

    def fingerprint(self) -> str:
        """`ends_digest` with where each row begins and ends."""
        return ends_digest(self.path, self._sep.encode(), self._begins.tobytes(), self._ends.tobytes())


def _filled_lines(file: LineFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first byte, byte after the last but the line break, number from 1) of each line that is not blank."""
    start = len(b"\xef\xbb\xbf") if file.read(0, 3) == b"\xef\xbb\xbf" else 0
    line, found = 0, [np.zeros((3, 0), np.int64)]
    while piece := file.piece(start, line):
        data = np.frombuffer(piece, np.uint8)
        begins, ends = line_edges(data)
        filled = np.flatnonzero(np.logical_or.reduceat(~_BLANK[data], begins))
        found.append(np.stack([start + begins[filled], start + ends[filled], line + 1 + filled]))
        start, line = start + len(piece), line + len(ends)
    begins, ends, lines = np.concatenate(found, axis=1)
    return begins, ends, lines
