"""Decoded rows that are too large for memory, laid out on the disk so that any of them is read at once."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemma_mlx.errors import SourceError
from gemma_mlx.files import cache_folder

if TYPE_CHECKING:
    import pyarrow as pa


def spilled(batches: Iterable[pa.RecordBatch], schema: pa.Schema, told: str) -> pa.Table:
    """The batches as one table in a mapped file without a name, which goes with the table or the process.

    Args:
        batches: written one by one.
        schema: of each.
        told: what messages call it.

    Raises:
        SourceError: the cache folder's disk has no room.
    """
    import pyarrow as pa

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as it is mapped)
    except OSError as e:
        raise SourceError(f"{told}: cannot be unpacked into {folder} ({e.strerror}); make it writable") from None
    with file:
        kept = _Kept(file, f"{told}: cannot be unpacked into {folder}")
        with pa.ipc.new_stream(kept, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                pa.default_memory_pool().release_unused()
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


class _Kept:
    """A file whose failures to write are told apart from failures to decode what is written."""

    closed = False

    def __init__(self, file: tempfile._TemporaryFileWrapper[bytes], told: str):
        self._file, self._told = file, told

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            return len(data)
        except OSError as e:
            raise SourceError(f"{self._told} ({e.strerror}); make room, or write smaller row groups") from None

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Left to who opened it."""
