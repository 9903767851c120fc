"""What every source of rows looks like from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a table.

    Attributes:
        values: column -> cell. Text as written (an absent value is the empty string or missing); lists and dicts where
            the format has them (JSON, Parquet); a `gemma_mlx.data.blob.Blob` for media that lie inside the table.
        where: ``train.csv:8`` (the record's first line), ``train.parquet:8`` (the row, from 1), ``a.tar:key``: where to
            look, for messages, and the row's name where it has no ``id``.
    """

    values: dict[str, Any]
    where: str


class Table(Protocol):
    """Rows that can be read one by one, in any order, from several threads at once.

    Attributes:
        name: as the user gave it.
        base: what relative media paths start from: a folder of this machine, or a URL up to its last slash.
        columns: names of the columns; where rows differ (JSONL), those that were seen first, in order of appearance.
        units: rows of each stretch that is read whole (a row group); None where every row is read alone. Rows of a
            table with units are read in an order that stays within few stretches at a time.

    Opening a table raises `InputError` for what is wrong with the file; `table[i]` for what is wrong with the row,
    naming `Row.where`.
    """

    name: str
    base: str
    columns: tuple[str, ...]
    units: Sequence[int] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def fingerprint(self) -> str:
        """A digest of what the rows are, so that a resumed run notices another file; never reads media."""


def stretches(tables: Sequence[Table], row_bytes: int) -> tuple[list[int], list[int]] | None:
    """(rows, bytes in use) of each stretch of tables end to end; None where every row of all is read alone.

    A table whose rows are read alone is one stretch; a row of it takes `row_bytes`, roughly.
    """
    if all(table.units is None for table in tables):
        return None
    units: list[int] = []
    sizes: list[int] = []
    for table in tables:
        own = [len(table)] if table.units is None else list(table.units)
        known = None if table.units is None else getattr(table, "unit_bytes", None)
        units += own
        sizes += [rows * row_bytes for rows in own] if known is None else known
    return units, sizes
