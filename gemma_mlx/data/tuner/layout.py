"""The existing tuner's folders: where a split's rows are, which column holds the audio, and rows with their patches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.examples import ANSWERS
from gemma_mlx.data.sources.table import Row, Table
from gemma_mlx.data.tuner.languages import LanguageMode
from gemma_mlx.data.tuner.patches import DELETE, OVERRIDES, PROTECT, Patches, normal_id
from gemma_mlx.errors import InputError, SourceError

AUDIO_COLUMNS = ("audio_path", "audio", "audio_url")
"""Columns that may name a row's clip; the first that the table has counts, even where its cell is empty.

``audio_url`` is last: there it names what ``prepare`` downloads into ``audio_path``, or reads in place.
"""


def find_dataset(root: Path, name: str, split: str) -> Path:
    """``data/datasets/NAME/SPLIT.csv`` under `root`, else ``NAME_prepared.csv`` beside it.

    Args:
        root: the tuner's project folder.
        name: the data set's name; a folder's, not a path.
        split: ``train`` or ``validation``.

    Raises:
        InputError: neither file exists, or the name leads elsewhere.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise InputError(f"dataset {name!r}: expected the name of a folder in {root / 'data' / 'datasets'}")
    folder = root / "data" / "datasets" / name
    tries = [folder / f"{split}.csv", folder / f"{name}_prepared.csv"]
    found = next((path for path in tries if path.is_file()), None)
    if found is None:
        raise InputError(f"dataset {name}: neither {tries[0]} nor {tries[1].name} is there; put the rows' CSV there")
    return found


def audio_column(columns: Sequence[str]) -> str | None:
    """The column that names a row's clip, by the rule of `AUDIO_COLUMNS`; None where there is none."""
    return next((name for name in AUDIO_COLUMNS if name in columns), None)


def learnt_columns(columns: Sequence[str], mapping: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The columns of a table that the model may learn, the first before the others; patches of texts go there.

    Args:
        columns: the table's.
        mapping: standard name -> column, as for `gemma_mlx.data.examples`.
    """
    sources = ((mapping or {}).get(name, name) for name in ANSWERS)
    return tuple(dict.fromkeys(column for column in sources if column in columns)) or ("text",)


def patching(folder: str | Path | None, language_mode: str | None) -> Callable[[Table, Mapping[str, str]], Table]:
    """What puts patches and a language mode on tables; it takes a table and its column mapping.

    Args:
        folder: of patches (``data_patches/SOURCE``), read once, here; None for none.
        language_mode: as for `PatchedTable`.

    Raises:
        InputError: as `Patches.read`; no such mode. From the result, as `PatchedTable`.
    """
    if folder is None and language_mode is None:
        return lambda table, mapping: table
    patches = None if folder is None else Patches.read(folder)
    if language_mode is not None:
        LanguageMode.parse(language_mode)

    def put(table: Table, mapping: Mapping[str, str]) -> PatchedTable:
        texts, key = learnt_columns(table.columns, mapping), mapping.get("id") or "id"
        here = patches and dataclasses.replace(patches, text_columns=texts, id_column=key)
        told = language_mode if mapping.get("language", "language") else None
        return PatchedTable(table, here, told, language_column=mapping.get("language", "language"))

    return put


class PatchedTable:
    """The rows of a table that patches leave, with their texts and languages as patches and language mode say.

    Rows are patched as they are read and keep their `Row.where` and id; only which rows are left is held, 4 bytes a
    row, and nothing where no row goes. To know it, opening goes over the ids once; a row that cannot be read then stays
    in, so that reading it says what is wrong. Stretches (`Table.units`, and ``unit_bytes`` where the table has it) of
    which nothing is left are gone.

    Args:
        table: the rows.
        patches: None or an empty one changes nothing.
        language_mode: see `gemma_mlx.data.tuner.languages`; None leaves the language as it is.
        language_column: the column with the rows' languages; ``override:XX`` adds it where it is missing.
        ids: the id cells in the table's order, where they can be had faster than row by row (a CSV read straight
            through); None in place of a row that cannot be read.

    Raises:
        InputError: the table has no column of ids, or there is no such mode.
    """

    def __init__(
        self,
        table: Table,
        patches: Patches | None = None,
        language_mode: str | None = None,
        *,
        language_column: str = "language",
        ids: Iterable[Any] | None = None,
    ):
        self._table, self._patches, self._mode_name = table, patches or None, language_mode
        self._notes = [] if patches is None else list(patches.notes)
        self._mode = None if language_mode is None else LanguageMode.parse(language_mode)
        self._language = language_column
        self.name, self.base, self.columns = table.name, table.base, table.columns
        if self._mode and self._mode.forced and language_column not in self.columns:
            self.columns = (*self.columns, language_column)
        self._kept: np.ndarray | None = None
        self._found: dict[str, int] = {}
        if self._patches:
            self._scan(self._patches, ids)
        self.units = table.units
        if table.units is not None and self._kept is not None:
            counts = np.diff(np.searchsorted(self._kept, np.cumsum(table.units)), prepend=0).tolist()
            self.units = [n for n in counts if n]
            if (sizes := getattr(table, "unit_bytes", None)) is not None:
                self.unit_bytes = [size for size, n in zip(sizes, counts, strict=True) if n]
        elif hasattr(table, "unit_bytes"):
            self.unit_bytes = table.unit_bytes

    def _scan(self, patches: Patches, ids: Iterable[Any] | None) -> None:
        """Which rows are left, and what happens to how many."""
        if patches.id_column not in self._table.columns:
            raise InputError(
                f"{self.name}: missing column {patches.id_column!r}, by which the patches in {patches.folder} name "
                f"rows; found {', '.join(self._table.columns)}"
            )
        total, named, deleted = len(self._table), patches.named, patches.deleted
        left = np.ones(total, bool)
        found = dict.fromkeys((DELETE, PROTECT, *OVERRIDES), 0)
        cells = (self._id(i, patches.id_column) for i in range(total)) if ids is None else ids
        for i, cell in zip(range(total), cells, strict=True):
            if (key := normal_id(cell)) not in named:
                continue
            if key in deleted:
                left[i] = False
                found[DELETE] += 1
                continue
            found[PROTECT] += key in patches.delete
            for folder, column in OVERRIDES.items():
                found[folder] += key in patches.texts[column]
        self._found = found
        if found[DELETE]:
            self._kept = np.flatnonzero(left).astype(np.uint32)

    def _id(self, index: int, column: str) -> Any:
        try:
            return self._table[index].values.get(column)
        except SourceError:
            raise
        except InputError:
            return None

    def __len__(self) -> int:
        return len(self._table) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int, /) -> Row:
        row = self._table[index if self._kept is None else int(self._kept[index])]
        values = row.values
        if self._patches is not None:
            values = self._patches.apply(values, row.where)
            if values is None:
                raise SourceError(f"{row.where}: has another id than when the table was opened; start again")
        if self._mode is not None and self._language in self.columns:
            values = {**values, self._language: self._mode.language(values.get(self._language))}
        return row if values is row.values else Row(values, row.where)

    def fingerprint(self) -> str:
        """A digest of the table's and of all that changes its rows."""
        patches = self._patches.fingerprint() if self._patches else ""
        told = [self._table.fingerprint(), patches, self._mode_name or "", self._language]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def report(self) -> list[str]:
        """Lines about what the patches did to this table, and which of their files were not read."""
        if self._patches is None:
            return self._notes
        found = self._found
        parts = [f"{found[DELETE]} of {len(self._table)} rows left out"]
        if found[PROTECT]:
            parts.append(f"{found[PROTECT]} kept by {PROTECT}")
        parts += [f"{column} of {found[name]} replaced" for name, column in OVERRIDES.items() if found[name]]
        return [f"{self.name}: patches of {self._patches.folder}: {', '.join(parts)}", *self._notes]
