"""Rows of a JSONL file, one JSON object a line, or of a JSON file with one list of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mlx.data.sources.lines import LineFile, plain_starts
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.values import kind_of
from gemma_mlx.errors import InputError
from gemma_mlx.files import file_digest

LOOKED_AT = 1_000
"""Rows whose keys are the table's columns."""
MOST_JSON = 256 << 20
"""Bytes of a file that is read whole."""


class JsonlTable:
    """A JSONL file as a `gemma_mlx.data.sources.table.Table`.

    UTF-8 with or without a byte-order mark; empty lines are skipped. Numbers and truth values come as their JSON text,
    as they would stand in a CSV; null as nothing; lists and objects as they are. Opening scans the file once for the
    beginnings of its lines, 12 bytes of memory each, and reads the keys of the first `LOOKED_AT` rows.

    Raises:
        InputError: here, naming file:line, for a missing or empty file and NUL characters; from a row, for what is not
            one JSON object, a key that stands twice, and bytes that are not UTF-8.
    """

    units = None

    def __init__(self, path: str | Path, name: str | None = None, base: str | None = None):
        self.path = Path(path)
        self.name, self.base = name or str(path), base or str(self.path.parent)
        self._file = LineFile(self.path, "JSONL", self.name)
        self._starts, self._lines = plain_starts(self._file)
        if not len(self._lines):
            raise InputError(f"{self.name}:1: the file is empty; expected one JSON object a line")
        self.columns = self._keys()

    def _keys(self) -> tuple[str, ...]:
        keys: dict[str, None] = {}
        first: InputError | None = None
        for index in range(min(len(self), LOOKED_AT)):
            try:
                keys |= dict.fromkeys(self[index].values)
            except InputError as error:  # told when the row is read
                first = first or error
        if first is not None and not keys:
            raise first
        return tuple(keys)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        return _row(self.written(index), self.where(index))

    def where(self, index: int) -> str:
        """``train.jsonl:8``"""
        return f"{self.name}:{int(self._lines[index])}"

    def written(self, index: int) -> Any:
        """A line's JSON as it is written: numbers as numbers, null as None."""
        where = self.where(index)
        return _parsed(self._file.text(int(self._starts[index]), int(self._starts[index + 1]), where), where)

    def fingerprint(self) -> str:
        """sha256 of the file."""
        return file_digest(self.path)


class JsonTable:
    """A JSON file that holds one list of objects, as a `gemma_mlx.data.sources.table.Table`; read whole into memory.

    Raises:
        InputError: not such a list, empty, or larger than `MOST_JSON`.
    """

    units = None

    def __init__(self, path: str | Path, name: str | None = None, base: str | None = None):
        self.path = Path(path)
        self.name, self.base = name or str(path), base or str(self.path.parent)
        file = LineFile(self.path, "JSON", self.name)
        found = _parsed(file.text(0, file.size, self.name, MOST_JSON), self.name)
        if not isinstance(found, list) or not found:
            raise InputError(f"{self.name}: expected a list of objects; for one object a line name the file .jsonl")
        self._rows: list[Any] = found
        keys = (key for row in found[:LOOKED_AT] if isinstance(row, dict) for key in row)
        self.columns = tuple(dict.fromkeys(keys))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return _row(self._rows[index], f"{self.name}:{index + 1}")

    def fingerprint(self) -> str:
        """sha256 of the file."""
        return file_digest(self.path)


def begins_a_list(path: Path) -> bool:
    """Whether the first character of a file that is no white space opens a list."""
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _row(found: Any, where: str) -> Row:
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a JSON object, found {kind_of(found)}; write one object a line")
    return Row({key: _cell(value) for key, value in found.items() if value is not None}, where)


def _parsed(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise InputError(f"{where}: the key {twice!r} stands twice in one object; keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON ({e.msg} at character {e.pos + 1}); write one object a line") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; write one flat object a line") from None
    except ValueError as e:  # a number of thousands of digits
        raise InputError(f"{where}: not JSON that can be read ({e})") from None


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | list | dict) else json.dumps(value)
