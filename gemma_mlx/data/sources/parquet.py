"""Rows of a Parquet file."""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mlx.data.sources.arrow_cells import ArrowCells, features_of, holds_bytes, microseconds
from gemma_mlx.data.sources.digests import ends_digest
from gemma_mlx.data.sources.lru import ByteLru
from gemma_mlx.data.sources.spill import spilled
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError, SourceError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

CACHE_BYTES = 256 << 20
"""Decoded row groups that are kept, of all files together; as much as rows are shuffled among, or groups would be
decoded again and again."""
WHOLE_BYTES = 128 << 20
"""A file without media whose columns take no more than this is decoded whole."""
SPILLED_BYTES = 512 << 20
"""A larger row group is decoded once, onto the disk."""
_PIECE_BYTES = 32 << 20
_BATCH = 1 << 17
"""Rows decoded at a time."""
_READ_BYTES = 1 << 20
_INDICES = 8
"""Bytes a value, as stored: less means that nearly all are references into a dictionary."""


class ParquetTable:
    """Rows of a Parquet file, by row group.

    Cells are as in `gemma_mlx.data.sources.cells.cell`; classes that `datasets` noted in the file become their names.
    A file without binary columns that is not large is decoded whole when its first row is asked for; of any other,
    row groups are decoded as they are needed and kept up to a number of bytes, and one at least. Row groups of more
    than `SPILLED_BYTES` are decoded into a file of the cache folder (see `gemma_mlx.data.sources.spill`).

    Attributes:
        units: rows of each row group, or None where the file is decoded whole.
        unit_bytes: of each row group, as decoded.

    Args:
        path: the file.
        name: what messages call it; the path if None.
        base: where relative media paths start; the file's folder if None.
        whole_bytes: the most that a file may take to be decoded whole; who opens many together divides it by them.
        cache_bytes: for row groups of this table; None to share `CACHE_BYTES` with all others.

    Raises:
        InputError: missing, truncated, damaged, encrypted or no Parquet file; no rows; a column twice or nameless;
            while reading, a damaged group or what `ArrowCells.values` refuses.
        SourceError: while reading, the file is no longer the one that was opened, or the disk has no room.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        base: str | None = None,
        *,
        whole_bytes: int = WHOLE_BYTES,
        cache_bytes: int | None = None,
    ):
        self.path, self.name = path, name if name is not None else str(path)
        self.base = base if base is not None else str(path.parent)
        self._meta, self._stamp = _metadata(path, self.name)
        schema = self._meta.schema.to_arrow_schema()
        self.columns: tuple[str, ...] = tuple(schema.names)
        self._check()
        self._cells = ArrowCells(schema, features_of(schema.metadata))
        groups = [self._meta.row_group(i) for i in range(self._meta.num_row_groups)]
        # (number, rows, bytes) of those that have rows
        self._groups = [(i, g.num_rows, g.total_byte_size) for i, g in enumerate(groups) if g.num_rows]
        self._first = [0, *accumulate(rows for _, rows, _ in self._groups)]
        self._check_groups()
        whole = sum(size for _, _, size in self._groups) <= whole_bytes
        self._whole = whole and not any(holds_bytes(field.type) for field in schema)
        self.units: Sequence[int] | None = None if self._whole else [rows for _, rows, _ in self._groups]
        self.unit_bytes: list[int] = [size for _, _, size in self._groups]
        self._dictionaries = [name for name in self.columns if self._repeats(name)]
        self._mine: _Decoded = ByteLru(sys.maxsize, _bytes_of)
        self._shared: _Decoded = _SHARED if cache_bytes is None else ByteLru(cache_bytes, _bytes_of)
        self._key = object()

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self.name}:{index + 1}"
        unit = 0 if self._whole else bisect_right(self._first, index) - 1
        cache = self._mine if self._whole or self.unit_bytes[unit] > SPILLED_BYTES else self._shared
        _, arrays = cache.get((self._key, unit), partial(self._decode, unit))
        return Row(self._cells.values(arrays, index - self._first[unit], where), where)

    def fingerprint(self) -> str:
        """`ends_digest` with the whole footer, which knows sizes and statistics of every column chunk."""
        with self.path.open("rb") as file:
            file.seek(-min(self._stamp[0], self._meta.serialized_size + 8), os.SEEK_END)
            return ends_digest(self.path, file.read())

    def _check(self) -> None:
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{self.name}: column {twice!r} stands twice; rename one of them")
        if not self.columns or "" in self.columns:
            raise InputError(
                f"{self.name}: a column without a name, or no columns; name them, such as audio_path, text"
            )
        if self._meta.num_rows <= 0:
            raise InputError(f"{self.name}: no rows; add at least one")

    def _check_groups(self) -> None:
        if len(self) != self._meta.num_rows or any(rows < 0 for _, rows, _ in self._groups):
            raise InputError(f"{self.name}: damaged: its row groups do not add up to its rows; download it again")

    def _repeats(self, column: str) -> bool:
        """Whether a text column is stored as references into a dictionary, and is best kept so."""
        import pyarrow.types as types

        kind = self._meta.schema.to_arrow_schema().field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            return False
        of_group = self._meta.row_group(0)
        chunks = [of_group.column(i) for i in range(of_group.num_columns)]
        return any(
            chunk.path_in_schema == column
            and chunk.has_dictionary_page
            and chunk.total_uncompressed_size < _INDICES * chunk.num_values
            for chunk in chunks
        )

    def _decode(self, unit: int) -> tuple[int, list[pa.ChunkedArray]]:
        """(bytes, columns) of a row group, or of the whole file."""
        numbers = [number for number, _, _ in (self._groups if self._whole else self._groups[unit : unit + 1])]
        rows = "its rows" if self._whole else f"rows {self._first[unit] + 1} to {self._first[unit + 1]}"
        try:
            table = self._read(numbers)
        except (InputError, MemoryError):
            raise
        except Exception as e:  # decoders raise anything on damaged files
            if "ecrypt" in str(e):
                raise InputError(f"{self.name}: encrypted; decrypt it first") from None
            raise InputError(f"{self.name}: {rows} are damaged ({_short(e)}); download it again") from None
        if table.num_rows != (len(self) if self._whole else self._groups[unit][1]):
            raise InputError(f"{self.name}: {rows} are damaged ({table.num_rows} found); download it again")
        return table.nbytes, table.columns

    def _read(self, numbers: list[int]) -> pa.Table:
        """Row groups by batches: decoders then need little memory beside the result, and give it back."""
        import pyarrow as pa

        file = self._file()
        rows, size = (sum(group[at] for group in self._groups if group[0] in numbers) for at in (1, 2))
        if size > SPILLED_BYTES and not self._whole:
            batches = file.iter_batches(max(1, rows * _PIECE_BYTES // size), row_groups=numbers, use_threads=False)
            table = spilled(batches, file.schema_arrow, self.name)
            del file, batches
            pa.default_memory_pool().release_unused()
            return microseconds(table)
        batches = []
        for batch in file.iter_batches(_BATCH, row_groups=numbers, use_threads=False):
            batches.append(batch)
            pa.default_memory_pool().release_unused()
        del file
        pa.default_memory_pool().release_unused()  # the reader's own
        return microseconds(pa.Table.from_batches(batches))

    def _file(self) -> pq.ParquetFile:
        """A reader of its own, since one reader is not for several threads."""
        import pyarrow.parquet as pq

        try:
            stat = self.path.stat()
        except OSError as e:
            raise SourceError(f"{self.name}: cannot be read any more ({e.strerror}); restore it and resume") from None
        if (stat.st_size, stat.st_mtime_ns) != self._stamp:
            raise SourceError(f"{self.name}: changed while it was in use; start again, or restore it and resume")
        return pq.ParquetFile(
            self.path,
            metadata=self._meta,
            read_dictionary=self._dictionaries,
            buffer_size=_READ_BYTES,
            page_checksum_verification=True,
        )


def _metadata(path: Path, name: str) -> tuple[pq.FileMetaData, tuple[int, int]]:
    """The footer, and size and time of the file that it is of."""
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            start = file.read(4)
            file.seek(max(0, stat.st_size - 4))
            end = file.read(4)
    except OSError as e:
        raise InputError(f"{name}: cannot be read ({e.strerror}); give the path of a Parquet file") from None
    if b"PARE" in (start, end):
        raise InputError(f"{name}: encrypted; decrypt it first")
    if start != b"PAR1":
        raise InputError(f"{name}: not a Parquet file; expected one that starts with PAR1")
    if end != b"PAR1" or stat.st_size < 12:
        raise InputError(f"{name}: truncated: its end is missing; download it again")
    try:
        meta = pq.read_metadata(path)
        meta.schema.to_arrow_schema()
    except Exception as e:  # see `_decode`
        raise InputError(f"{name}: its footer is damaged ({_short(e)}); download it again") from None
    return meta, (stat.st_size, stat.st_mtime_ns)


def _bytes_of(decoded: tuple[int, list[pa.ChunkedArray]]) -> int:
    return decoded[0]


_Decoded = ByteLru[tuple[int, "list[pa.ChunkedArray]"]]
_SHARED: _Decoded = ByteLru(CACHE_BYTES, _bytes_of)


def _short(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
