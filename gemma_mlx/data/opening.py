"""A medium as a file that decoders can read."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gemma_mlx.data.blob import Blob, Medium, described
from gemma_mlx.errors import InputError, SourceError


def as_medium(source: str | Medium) -> Medium:
    """A path given as text is a `Path`."""
    return Path(source) if isinstance(source, str) else source


def told(source: str | Medium, where: str) -> str:
    """What messages about a medium start with: ``train.csv:8: clips/7.wav``."""
    name = described(as_medium(source))
    return f"{where}: {name}" if where else name


@contextmanager
def opened(source: str | Medium, where: str, empty: str) -> Iterator[BinaryIO]:
    """The medium's bytes, at their first one.

    Raises:
        InputError: there is no such file, or it has 0 bytes (`empty` says what is then missing).
        SourceError: where it comes from failed, as its `open` says it.
    """
    medium, name = as_medium(source), told(source, where)
    with _open(medium, name, where) as file:
        if not file.seek(0, io.SEEK_END):
            raise InputError(f"{name}: {empty}: the file has 0 bytes; record, save or download it again")
        file.seek(0)
        yield file


def _open(medium: Medium, name: str, where: str) -> BinaryIO:
    if isinstance(medium, Path):
        try:
            if medium.is_file():
                return medium.open("rb")
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise InputError(f"{name}: cannot be read ({reason}); correct the path or its permissions") from None
        raise InputError(f"{name}: no such file; correct the path")
    if not isinstance(medium, Blob):
        raise InputError(f"{name}: not a medium but {type(medium).__name__}; expected a path or a blob")
    try:
        return medium.open()
    except SourceError:
        raise
    except InputError as e:
        raise InputError(str(e) if not where or str(e).startswith(where) else f"{where}: {e}") from None


def descriptor(file: BinaryIO) -> int | None:
    """The descriptor of a file that is one of this machine's own from end to end, at its first byte; else None.

    C libraries read it without calling Python back.
    """
    try:
        handle = file.fileno()
        found = os.fstat(handle)
    except (AttributeError, OSError, ValueError, TypeError):
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size != length(file):
        return None
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def length(file: BinaryIO) -> int:
    """Bytes of a file; it is left at its first one."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


class Watched:
    """A file for a library that cannot let exceptions through: the first one is kept, and reading ends there.

    Attributes:
        error: what went wrong, or None.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None

    def _try(self, call: Any, instead: Any, *args: Any) -> Any:
        try:
            return instead if self.error is not None else call(*args)
        except Exception as e:
            self.error = e
            return instead

    def read(self, count: int = -1) -> bytes:
        return self._try(self._file.read, b"", count)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._try(self._file.seek, 0, offset, whence)

    def tell(self) -> int:
        return self._try(self._file.tell, 0)
