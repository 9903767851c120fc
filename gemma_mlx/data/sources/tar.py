"""Rows of a WebDataset shard: a tar archive whose neighbouring members with the same key are one sample."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.blob import Member
from gemma_mlx.data.sources.cells import MAX_TEXT_BYTES, cell, decoded, kind_of, parsed
from gemma_mlx.data.sources.digests import ends_digest
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.sources.tar_members import members
from gemma_mlx.errors import InputError

_LOOKED_AT = 100
"""Samples whose JSON fields are the table's columns."""
_MOST_EXTENSIONS = 10_000
_TEXT = {"txt": "text", "text": "text", "transcript": "text", "transcription": "text", "cls": "label"}
_TEXT |= {
    name: name
    for name in (
        "answer",
        "response",
        "completion",
        "caption",
        "question",
        "prompt",
        "system",
        "language",
        "id",
        "label",
    )
}
"""Extension -> column of what is read as text."""


class TarTable:
    """One WebDataset shard (``.tar``, not packed).

    A member's key is its path up to the first dot of the last part, its extension what follows, in lower case:

    - ``wav``, ``flac``, …: `gemma_mlx.data.blob.Member` in the column ``audio``; ``png``, … in ``image``; ``mp4``, … in
      ``video``. Several of one kind in a sample (``7.0.png``, ``7.1.png``) are a list, in the archive's order.
    - ``txt``: text, in the column ``text``; ``cls``: in ``label``; ``caption``, ``question``, ``answer`` and the like
      in their own. ``question.txt`` is ``question``. Line breaks at the end are taken off.
    - ``json``: the object's fields are columns, unless another member gives that column. ``meta.json`` is one column,
      ``meta``.
    - anything else: a `Member` under its extension, which nothing opens (``pyd``, ``npy``, ``pth``).

    Hidden files (``._7.wav``), names without a dot and names that begin with ``__`` are left out, and ``__key__`` holds
    the key. Opening reads the headers; 20 bytes of memory a member and the keys.

    Args:
        path: the archive.
        name: what messages call it; the path if None.
        base: where relative media paths in JSON start; the archive's folder if None.

    Raises:
        InputError: here, what `members` refuses, no samples, a key at two places, a member twice; from a row, naming
            ``shard.tar:key``, text that is not UTF-8 or too long, and what is not JSON.
    """

    units = None

    def __init__(self, path: Path, name: str | None = None, base: str | None = None):
        self.path, self.name = path, name if name is not None else str(path)
        self.base = base if base is not None else str(path.parent)
        self._read_index()
        if len(self) == 0:
            raise InputError(f"{self.name}: no samples; expected members such as 0001.flac and 0001.txt")
        self._check_keys()
        self.columns: tuple[str, ...] = self._columns()

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = self._key(index).decode()
        where = f"{self.name}:{key}"
        fields: dict[str, Any] = {}
        values: dict[str, Any] = {"__key__": key}
        media: dict[str, list[Member]] = {}
        for extension, member in self._members(index, where):
            column, form = _place(extension)
            if form == "fields":
                fields = _fields(member)
            elif form == "media":
                media.setdefault(column, []).append(member)
            else:
                _put(values, column, _value(member, form, column), where)
        for column, found in media.items():
            _put(values, column, found[0] if len(found) == 1 else found, where)
        return Row(fields | values, where)

    def fingerprint(self) -> str:
        """`ends_digest` with every member's key, extension, place and size."""
        index = (self._first, self._ends, self._extensions, self._offsets, self._sizes)
        names = "\n".join(self._names).encode()
        return ends_digest(self.path, self._keys, names, *(np.ascontiguousarray(part).tobytes() for part in index))

    def _key(self, index: int) -> bytes:
        return self._keys[self._ends[index] : self._ends[index + 1]]

    def _members(self, index: int, where: str) -> Iterator[tuple[str, Member]]:
        """(extension, member) of a sample, in order."""
        for i in range(self._first[index], self._first[index + 1]):
            extension = self._names[self._extensions[i]]
            suffix = f".{extension.rpartition('.')[2]}"
            yield (
                extension,
                Member(self.path, int(self._offsets[i]), int(self._sizes[i]), f"{where}.{extension}", suffix),
            )

    def _read_index(self) -> None:
        """Fills the index: members' extension, offset and size; samples' first member and key."""
        extensions, offsets, sizes = array("i"), array("q"), array("q")
        first, ends, keys = array("q"), array("q", [0]), bytearray()
        numbers: dict[str, int] = {}
        key, seen = None, set()
        try:
            with self.path.open("rb") as file:
                for path, offset, size in members(file, self.name):
                    folder, _, last = path.rpartition("/")
                    stem, _, extension = last.partition(".")
                    if not stem or not extension or stem.startswith("__"):
                        continue
                    new = f"{folder}/{stem}" if folder else stem
                    if new != key:
                        key, seen = new, set()
                        first.append(len(sizes))
                        keys += new.encode()
                        ends.append(len(keys))
                    number = numbers.setdefault(extension.lower(), len(numbers))
                    if number in seen:
                        raise InputError(f"{self.name}:{key}: the member .{extension} stands twice; keep one")
                    if len(numbers) > _MOST_EXTENSIONS:
                        raise InputError(
                            f"{self.name}: more than {_MOST_EXTENSIONS} extensions, such as .{extension}; a key ends "
                            "at the first dot of the name: rename the members"
                        )
                    seen.add(number)
                    extensions.append(number)
                    offsets.append(offset)
                    sizes.append(size)
        except OSError as e:
            raise InputError(f"{self.name}: cannot be read ({e.strerror}); give the path of a tar archive") from None
        first.append(len(sizes))
        self._names, self._keys = list(numbers), bytes(keys)
        self._extensions = np.array(extensions, np.int32)
        self._offsets, self._sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
        self._first, self._ends = np.array(first, np.int64), np.array(ends, np.int64)

    def _check_keys(self) -> None:
        hashes = np.fromiter((hash(self._key(i)) for i in range(len(self))), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        for at in np.flatnonzero(np.diff(hashes[order]) == 0):
            one, other = (self._key(int(order[at + i])) for i in (0, 1))
            if one == other:
                raise InputError(
                    f"{self.name}:{one.decode()}: this key stands at two places; all members of a sample must follow "
                    "each other: sort the archive by name (tar --sort=name)"
                )

    def _columns(self) -> tuple[str, ...]:
        placed = [_place(extension) for extension in self._names]
        found = dict.fromkeys(["__key__", *(column for column, form in placed if form != "fields")])
        if any(form == "fields" for _, form in placed):
            for index in range(min(len(self), _LOOKED_AT)):
                try:
                    found |= dict.fromkeys(self[index].values)
                except InputError:  # told when the row is read
                    continue
        return tuple(found)


def _place(extension: str) -> tuple[str, str]:
    """(column, what it is read as: "media", "text", "json", "fields" or "bytes")."""
    stem, _, last = extension.rpartition(".")
    if kind := kind_of(f".{last}"):
        return kind, "media"
    if last == "json":
        return (stem, "json") if stem else ("", "fields")
    if last in _TEXT:
        return stem or _TEXT[last], "text"
    return extension, "bytes"


def _value(member: Member, form: str, column: str) -> Any:
    if form == "text":
        return decoded(_bytes(member), member.name).rstrip("\r\n")
    if form == "json":
        return cell(parsed(_bytes(member), member.name), member.name, column)
    return member


def _fields(member: Member) -> dict[str, Any]:
    found = parsed(_bytes(member), member.name)
    if not isinstance(found, dict):
        raise InputError(f"{member.name}: expected a JSON object, whose fields are columns")
    return {key: cell(value, member.name, key) for key, value in found.items() if value is not None}


def _bytes(member: Member) -> bytes:
    if member.length > MAX_TEXT_BYTES:
        raise InputError(f"{member.name}: {member.length} bytes of text; at most {MAX_TEXT_BYTES} are read: split it")
    return member.open().read()


def _put(values: dict[str, Any], column: str, value: Any, where: str) -> None:
    if column in values:
        raise InputError(f"{where}: two members give {column!r}; keep one")
    values[column] = value
