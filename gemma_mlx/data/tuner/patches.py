"""Corrections that lie beside a data set: texts to learn instead, rows to leave out, rows to keep in any case.

A folder ``data_patches/<source>`` of the existing tuner holds four folders of CSV files, all keyed by ``id``:

==========================  ==================  ================================================================
folder                      columns             a line says
==========================  ==================  ================================================================
``override_text_perfect``   id, text_perfect    the row's text is this
``override_text_verbatim``  id, text_verbatim   the row's text is this
``delete``                  id                  leave the row out, unless ``do_not_blacklist`` names it too
``do_not_blacklist``        id                  keep the row whatever ``delete`` says
==========================  ==================  ================================================================

- Ids are compared as `normal_id` writes them: ``12.0``, ``012`` and `` 12 `` are 12, as where a column of numbers is
  read as numbers.
- A text replaces the row's cell in the column of its own name, where the row has that column, and always the cell that
  the model learns (the text column). ``override_text_perfect`` comes first, so where both name a row, the verbatim
  text is learnt.
- Of several lines for one id the last counts; files of a folder are read in the order of their names.
- Rows and lines without an id are left alone, other columns are ignored, and so are other folders and files, with a
  note. A CSV without the columns above is skipped with a note, as there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError

OVERRIDES = {"override_text_perfect": "text_perfect", "override_text_verbatim": "text_verbatim"}
"""Folder -> its column, in the order in which they are applied."""
DELETE, PROTECT = "delete", "do_not_blacklist"
_FOLDERS = (*OVERRIDES, PROTECT, DELETE)
_WHOLE = re.compile(r"([+-]?)0*([1-9][0-9]*|0)(?:\.0*)?")


def normal_id(value: Any) -> str:
    """An id as it is compared: text without spaces around it; a whole number without zeros that say nothing.

    "" where there is no id (None, NaN, an empty cell).
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    text = str(value).strip()
    if text[:1] in "123456789" and text.isdecimal() and text.isascii():  # the usual, for the sake of a million of them
        return text
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        return text
    return f"-{whole[2]}" if whole[1] == "-" and whole[2] != "0" else whole[2]


@dataclass(frozen=True)
class Patches:
    """What a folder of patches says, by normal id; the table that it is about is never held.

    Attributes:
        folder: where it was read.
        texts: column (``text_perfect``, ``text_verbatim``) -> id -> text.
        delete, protect: ids of the folders ``delete`` and ``do_not_blacklist``.
        text_columns: the table's columns that the model may learn; of a row the first with something in it counts.
        id_column: the table's column of ids.
        notes: lines about what was not read, for a report.
    """

    folder: Path
    texts: Mapping[str, Mapping[str, str]]
    delete: frozenset[str]
    protect: frozenset[str]
    text_columns: tuple[str, ...] = ("text",)
    id_column: str = "id"
    notes: tuple[str, ...] = ()
    _blank: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder: str | Path, text_column: str = "text", id_column: str = "id") -> Patches:
        """Reads a folder ``data_patches/<source>``.

        Raises:
            InputError: no such folder, one whose folders hold such folders, or, naming file:line, a broken CSV.
        """
        folder = Path(folder)
        notes = list(_strangers(folder))
        texts: dict[str, dict[str, str]] = {column: {} for column in OVERRIDES.values()}
        blank: dict[str, str] = {}
        for name, column in OVERRIDES.items():
            for key, row in _lines(folder / name, column, notes):
                texts[column][key] = text = row.values[column]
                if not text.strip():
                    blank[f"{column} {key}"] = row.where
        ids = {name: frozenset(key for key, _ in _lines(folder / name, None, notes)) for name in (DELETE, PROTECT)}
        return cls(folder, texts, ids[DELETE], ids[PROTECT], (text_column,), id_column, tuple(notes), blank)

    @property
    def deleted(self) -> frozenset[str]:
        """Ids of the rows to leave out."""
        return self.delete - self.protect

    @property
    def named(self) -> frozenset[str]:
        """Ids of all rows that something is said about."""
        return self.delete.union(self.protect, *self.texts.values())

    def __bool__(self) -> bool:
        """False where there is nothing to apply."""
        return bool(self.deleted) or any(self.texts.values())

    def leaves_out(self, cell: Any) -> bool:
        """True of a row with this id."""
        key = normal_id(cell)
        return key in self.delete and key not in self.protect

    def apply(self, values: dict[str, Any], where: str = "") -> dict[str, Any] | None:
        """A row's cells as patched (the same object where nothing changes), or None where the row is left out.

        Raises:
            InputError: naming `where`, the row's file:line: a patch replaces the text that is learnt with nothing.
        """
        key = normal_id(values.get(self.id_column))
        if self.leaves_out(key):
            return None
        new, source = values, ""
        filled = (column for column in self.text_columns if str(values.get(column) or "").strip())
        learnt = next(filled, self.text_columns[0])
        for column, texts in self.texts.items():
            if (text := texts.get(key)) is None:
                continue
            new = {**new, learnt: text, **({column: text} if column in values else {})}
            source = column
        if source and not new[learnt].strip():
            raise InputError(
                f"{where}: empty text: {self._blank[f'{source} {key}']} replaces the text of id {key} with nothing; "
                f"write the text there, or list the id in {self.folder / DELETE}"
            )
        return new

    def counts(self) -> dict[str, int]:
        """Folder -> ids that it names."""
        found = {name: len(self.texts[column]) for name, column in OVERRIDES.items()}
        return {**found, PROTECT: len(self.protect), DELETE: len(self.delete)}

    def fingerprint(self) -> str:
        """A digest of what the patches say and to which columns, whichever files say it."""
        said = [sorted(self.texts.items()), sorted(self.delete), sorted(self.protect)]
        said += [self.text_columns, self.id_column]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=dict).encode()).hexdigest()


def _lines(folder: Path, column: str | None, notes: list[str]) -> Iterator[tuple[str, Row]]:
    """(normal id, row) of every line of a folder's CSV files that has an id."""
    if not folder.is_dir():
        return
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        if path.suffix != ".csv":
            notes.append(f"{path}: not read; patches are *.csv files")
            continue
        rows = CsvTable(path)
        missing = [name for name in ("id", column) if name and name not in rows.columns]
        if missing:
            notes.append(f"{path}:1: skipped: no column {missing[0]!r}; found {', '.join(rows.columns)}")
            continue
        for row in map(rows.__getitem__, range(len(rows))):
            if key := normal_id(row.values["id"]):
                yield key, row


def _strangers(folder: Path) -> Iterator[str]:
    """Notes about what lies in a folder of patches and is none.

    Raises:
        InputError: there is no such folder, or it is the one above.
    """
    known = ", ".join(_FOLDERS)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; patches lie in data_patches/SOURCE, in folders {known}")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not any(path.name in _FOLDERS for path in inside):
        below = [str(path) for path in inside if any((path / name).is_dir() for name in _FOLDERS)]
        if below:
            raise InputError(f"{folder}: holds no patches itself; name one of the folders in it: {', '.join(below)}")
    for path in inside:
        if path.name not in _FOLDERS:
            yield f"{path}: not read; patches lie in folders {known}"
