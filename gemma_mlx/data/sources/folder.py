"""Rows of a folder of media: with a metadata file, with a text beside each medium, or by class in folders."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma_mlx.data.sources.cells import MAX_TEXT_BYTES, MEDIA_KINDS, decoded, kind_of
from gemma_mlx.data.sources.table import Row, Table, stretches
from gemma_mlx.errors import InputError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ROW_BYTES = 512


class FolderTable:
    """A folder of media and everything below it, hidden files left out.

    - With ``metadata.csv``, ``.jsonl`` or ``.parquet`` (one at the top, or several in folders below, each for its own
      folder): its rows. ``file_name`` and columns that end in ``_file_name`` name files, relative to the metadata file;
      they become ``audio_path``, ``image_path`` or ``video_path`` by what they name. Lists of names stay lists.
    - Else, where there are texts: ``clip.wav`` and ``clip.txt`` are a row with ``audio_path`` and ``text`` (line breaks
      at its end taken off); ``clip.png`` beside them is the row's ``image_path``. In the byte order of paths.
    - Else, where all media lie in folders of at least two names: the folder's name is the ``label``.

    Where metadata are read by stretches, `units` and ``unit_bytes`` are those of their files.

    Media paths are relative to the folder, to be found there by `gemma_mlx.data.places.Folders`.

    Args:
        path: the folder.
        name: what messages call it; the path if None.
        base: where relative media paths start; the folder if None.

    Raises:
        InputError: here, for no folder, one without media, links to folders, names that are not UTF-8, media without
            text or texts without medium (how many, and one of them), two media of one kind beside a text, metadata
            without a ``file_name``; from a row, for a text that is not UTF-8 or lies elsewhere, and files of no known
            kind.
    """

    def __init__(self, path: Path, name: str | None = None, base: str | None = None):
        self.path, self.name = path, (name if name is not None else str(path)).rstrip("/") or "/"
        self.base = base if base is not None else str(path)
        files = _files_below(path, self.name)
        media = [file for file in files if kind_of(_suffix(file))]
        texts = [file for file in files if _suffix(file) == ".txt"]
        if not media:
            raise InputError(f"{self.name}: no audio, images or videos in this folder; expected some, with their texts")
        found = {kind_of(_suffix(file)) for file in media}
        kinds = tuple(f"{kind}_path" for kind in MEDIA_KINDS if kind in found)
        metadata = [file for file in files if file.rpartition("/")[2] in METADATA]
        self._rows: _Rows
        if metadata:
            self._rows = _Described(path, self.name, metadata, kinds)
        elif texts:
            self._rows = _Beside(path, self.name, media, texts, kinds)
        else:
            self._rows = _Classes(self.name, media, kinds)
        self.columns: tuple[str, ...] = self._rows.columns
        self.units: Sequence[int] | None = self._rows.units
        if isinstance(self._rows, _Described) and self.units is not None:
            self.unit_bytes: list[int] = self._rows.unit_bytes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._rows[index]

    def fingerprint(self) -> str:
        """sha256 of the metadata files' digests, or of all paths and the sizes of texts."""
        return hashlib.sha256(self._rows.identity()).hexdigest()


class _Rows(Protocol):
    columns: tuple[str, ...]
    units: Sequence[int] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def identity(self) -> bytes:
        """What makes these rows."""


class _Names:
    """Many texts in one piece of memory."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode() for name in names]
        self.blob = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.blob[self._ends[index] : self._ends[index + 1]].decode()


class _Described:
    """Rows of metadata files."""

    def __init__(self, folder: Path, name: str, metadata: list[str], kinds: tuple[str, ...]):
        self._folders = [file.rpartition("/")[0] for file in metadata]
        twice = next((at for at in self._folders if self._folders.count(at) > 1), None)
        if twice is not None:
            both = [file for file in metadata if file.rpartition("/")[0] == twice]
            raise InputError(f"{name}: {both[0]} and {both[1]} stand side by side; keep one")
        self._tables = [_metadata_table(folder / file, f"{name}/{file}") for file in metadata]
        self._first = [0, *accumulate(map(len, self._tables))]
        columns = dict.fromkeys(column for table in self._tables for column in table.columns)
        self.columns = (*kinds, *(c for c in columns if not _is_reference(c) and c not in kinds))
        self.units, self.unit_bytes = stretches(self._tables, _ROW_BYTES) or (None, [])

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Row:
        number = bisect_right(self._first, index) - 1
        row = self._tables[number][index - self._first[number]]
        values: dict[str, Any] = {key: value for key, value in row.values.items() if not _is_reference(key)}
        found: dict[str, list[str]] = {}
        for column in filter(_is_reference, row.values):
            cell = row.values[column]
            for file in cell if isinstance(cell, list) else [cell]:
                if not isinstance(file, str):
                    raise InputError(f"{row.where}: {column} holds no name of a file; write its path")
                if file.strip():
                    found.setdefault(_column_of(file.strip(), column, row.where), []).append(
                        _below(self._folders[number], file.strip())
                    )
        for column, files in found.items():
            if values.get(column):
                raise InputError(f"{row.where}: {column} and a file name both give a medium; keep one")
            values[column] = files[0] if len(files) == 1 else files
        return Row(values, row.where)

    def identity(self) -> bytes:
        parts = [f"{at}\0{table.fingerprint()}" for at, table in zip(self._folders, self._tables, strict=True)]
        return "\0".join(parts).encode()


def _metadata_table(path: Path, name: str) -> Table:
    from gemma_mlx.data.sources.jsonl import JsonlTable
    from gemma_mlx.data.sources.local import CsvTable
    from gemma_mlx.data.sources.parquet import ParquetTable

    kind = {".csv": CsvTable, ".jsonl": JsonlTable, ".parquet": ParquetTable}[path.suffix]
    table: Table = kind(path, name)
    if not any(map(_is_reference, table.columns)):
        raise InputError(f"{name}: no column file_name; found {', '.join(table.columns)}: name each row's medium by it")
    return table


def _is_reference(column: str) -> bool:
    return column in ("file_name", "file_names") or column.endswith(("_file_name", "_file_names"))


def _column_of(file: str, column: str, where: str) -> str:
    kind = kind_of(_suffix(file))
    if not kind:
        raise InputError(f"{where}: {column} {file[:100]!r} is no known kind of audio, image or video; convert it")
    return f"{kind}_path"


def _below(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder and "://" not in file and not file.startswith("/") else file


class _Beside:
    """Media with texts of the same name."""

    units = None

    def __init__(self, folder: Path, name: str, media: list[str], texts: list[str], kinds: tuple[str, ...]):
        self._folder, self._name, self.columns = folder, name, (*kinds, "text")
        self._real = os.path.realpath(folder)
        text_of = {_stem(text): text for text in texts}
        if len(text_of) < len(texts):
            raise InputError(f"{name}: two texts differ in .txt and .TXT alone; keep one")
        media_of: dict[str, list[str]] = {}
        for medium in media:
            media_of.setdefault(_stem(medium), []).append(medium)
        _check_pairs(name, text_of, media_of)
        rows = sorted(("\0".join((*found, text_of[stem])) for stem, found in media_of.items()), key=str.encode)
        self._rows = _Names(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        *media, text = self._rows[index].split("\0")
        values = {f"{kind_of(_suffix(medium))}_path": medium for medium in media}
        return Row(values | {"text": self._text(text)}, f"{self._name}/{media[0]}")

    def _text(self, file: str) -> str:
        path, where = self._folder / file, f"{self._name}/{file}"
        if path.is_symlink() and not os.path.realpath(path).startswith(self._real.rstrip("/") + "/"):
            raise InputError(f"{where}: a link to outside the folder; put the text here")
        try:
            with path.open("rb") as opened:
                return decoded(opened.read(MAX_TEXT_BYTES + 1), where).rstrip("\r\n")
        except OSError as e:
            raise InputError(f"{where}: cannot be read ({e.strerror})") from None

    def identity(self) -> bytes:
        try:
            sizes = [(self._folder / self._rows[i].rpartition("\0")[2]).stat().st_size for i in range(len(self))]
        except OSError as e:
            raise InputError(f"{self._name}: a text cannot be read any more ({e.strerror}): {e.filename}") from None
        return self._rows.blob + np.array(sizes, np.int64).tobytes()


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()  # in a file's name, # and ? are letters


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _check_pairs(name: str, text_of: dict[str, str], media_of: dict[str, list[str]]) -> None:
    alone = [found[0] for stem, found in media_of.items() if stem not in text_of]
    lost = [text for stem, text in text_of.items() if stem not in media_of]
    told = [f"{len(alone)} media without a text, such as {alone[0]!r}"] if alone else []
    told += [f"{len(lost)} texts without a medium, such as {lost[0]!r}"] if lost else []
    if told:
        raise InputError(
            f"{name}: {' and '.join(told)}; put clip.txt beside clip.wav, or write a metadata.csv with a column "
            "file_name"
        )
    for found in media_of.values():
        if len({kind_of(_suffix(medium)) for medium in found}) < len(found):
            raise InputError(f"{name}: {' and '.join(found)} belong to the same text; keep one of a kind")


class _Classes:
    """Media in folders that are named by what they show."""

    units = None

    def __init__(self, name: str, media: list[str], kinds: tuple[str, ...]):
        self._name, self.columns = name, (*kinds, "label")
        if len({_parent(file) for file in media}) < 2 or not all(map(_parent, media)):
            raise InputError(
                f"{name}: {len(media)} media and no texts; put clip.txt beside clip.wav, write a metadata.csv with a "
                "column file_name, or put them into folders named by class"
            )
        self._rows = _Names(media)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        file = self._rows[index]
        return Row({f"{kind_of(_suffix(file))}_path": file, "label": _parent(file)}, f"{self._name}/{file}")

    def identity(self) -> bytes:
        return self._rows.blob


def _parent(file: str) -> str:
    return file.rpartition("/")[0].rpartition("/")[2]


def _files_below(folder: Path, name: str) -> list[str]:
    """Relative paths of all files but hidden ones, in byte order."""
    files, waiting = [], [""]
    try:
        while waiting:
            at = waiting.pop()
            with os.scandir(folder / at) as entries:
                for entry in entries:
                    path = f"{at}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        files.append(path)
                    elif entry.is_symlink():
                        raise InputError(
                            f"{name}/{path}: a link to a folder, which is not followed; move the folder here, or name "
                            "its files in a metadata.csv elsewhere and its place with --media-root"
                        )
                    else:
                        waiting.append(f"{path}/")
        return sorted(files, key=str.encode)
    except UnicodeEncodeError as e:
        raise InputError(f"{name}: the name {os.fsencode(e.object)!r} is not UTF-8; rename the file") from None
    except NotADirectoryError:
        raise InputError(f"{name}: not a folder; give the path of one") from None
    except OSError as e:
        raise InputError(f"{name}: cannot be read ({e.strerror}); give the path of a folder") from None
