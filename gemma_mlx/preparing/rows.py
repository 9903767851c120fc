"""What the user named, as prepare reads it: tables end to end, each with the reader of its columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.examples import MEDIA, STANDARD, Example, Prompts, RowReader
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.opening import Shards, open_parts
from gemma_mlx.data.sources.table import Row, Table
from gemma_mlx.data.tuner.layout import patching
from gemma_mlx.data.values import filled, first_medium, medium_of
from gemma_mlx.errors import InputError
from gemma_mlx.preparing.cells import Address, media_cells, normal
from gemma_mlx.preparing.nemo import KEY, Manifest

Change = Callable[[Row], Row]


@dataclass(frozen=True)
class Source:
    """One table with its reader; safe to use from several threads.

    Attributes:
        table: where rows come from.
        reader: row -> example.
        folders: where media are.
        names: standard name -> column.
        change: what is done to a row before it is read, such as fetching its medium; None for nothing.
    """

    table: Table
    reader: RowReader
    folders: Folders
    names: Mapping[str, str]
    change: Change | None = None

    def row(self, index: int) -> Row:
        """A row of the table.

        Raises:
            InputError: it cannot be read, or its medium cannot be fetched.
        """
        row = self.table[index]
        return self.change(row) if self.change else row

    def example(self, row: Row) -> Example:
        """What the row is to the model."""
        return self.reader.example(row)

    def text(self, row: Row, name: str) -> str:
        """The cell of a standard column as text; "" where there is none."""
        value = row.values.get(self.names[name])
        return "" if value is None else str(value).strip()

    def media_columns(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Column -> kind, of those whose media a row's example has; where there are several, as `RowReader` chooses."""
        found = {}
        for kind, names in MEDIA.items():
            columns = [self.names[name] for name in names]
            column = first_medium({name: values[name] for name in columns if filled(values.get(name))})
            if column is not None:
                found[column] = kind
        return found

    def media(self, row: Row) -> list[tuple[Address, str, Medium]]:
        """(address in the `normal` row, kind, medium) of every medium of a row."""
        columns = self.media_columns(row.values)
        cells = media_cells(normal(row.values, columns), columns)
        return [(at, kind, medium_of(cell, self.folders, str(at[0]), row.where)) for at, kind, cell in cells]


class Rows:
    """Sources end to end.

    Attributes:
        name: what the user called them.
        sources: in order.
        columns: those of all tables.
    """

    def __init__(self, name: str, sources: list[Source]):
        self.name, self.sources = name, sources
        self.columns = tuple(dict.fromkeys(column for source in sources for column in source.table.columns))
        self._starts = [0]
        for source in sources:
            self._starts.append(self._starts[-1] + len(source.table))
        if not len(self):
            raise InputError(f"{name}: no rows; add at least one")

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, index: int) -> tuple[Source, int]:
        """(the source of a row, its place there)."""
        number = bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


def open_rows(
    name: str,
    media_roots: Iterable[Any] = (),
    columns: Mapping[str, str] | None = None,
    prompts: Prompts | None = None,
    *,
    nemo: bool = False,
    fetcher: Any = None,
    change: Change | None = None,
    patches: str | None = None,
    language_mode: str | None = None,
    **opening: Any,
) -> Rows:
    """The rows behind a name; of a mixture each row once.

    Args:
        name: as for `gemma_mlx.data.sources.opening.open_parts`.
        media_roots, columns, prompts: as for `gemma_mlx.data.dataset.Dataset`.
        nemo: it is a NeMo manifest; one with ``audio_filepath`` is taken for one anyway.
        fetcher: reads what is far away.
        change: see `Source`.
        patches, language_mode: as for `gemma_mlx.data.rows.Rows`.
        opening: of `open_parts`.

    Raises:
        InputError: no rows, no column to learn from, or a manifest that cannot be read.
    """
    patched, sources = patching(patches, language_mode), []
    for part in open_parts(name, fetcher, **opening):
        roots = [*part.options.get("media_root", ()), *media_roots]
        mapping = {**(columns or {}), **part.options.get("columns", {})}
        shards = part.tables if isinstance(part.tables, Shards) else None
        tables = map(shards.open, shards.names) if shards else part.tables
        for table in tables:
            folders = Folders(table.base, roots, fetcher)
            if nemo or (KEY in table.columns and KEY not in mapping.values()):
                table = Manifest(table, folders)
            table = patched(table, mapping)
            reader = RowReader(table.columns, folders, table.name, mapping, prompts or Prompts())
            names = {standard: mapping.get(standard, standard) for standard in STANDARD}
            sources.append(Source(table, reader, folders, names, change))
    return Rows(name, sources)
