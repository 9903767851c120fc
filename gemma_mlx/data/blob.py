"""A medium's bytes, wherever they lie: a file, a cell of a table, a member of an archive, an object far away."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, runtime_checkable

from gemma_mlx.errors import InputError


@runtime_checkable
class Blob(Protocol):
    """Bytes that are not (yet) a file of their own.

    Attributes:
        name: what messages call it, such as ``train.parquet:8 audio`` or ``gs://clinic/7.flac``.
        suffix: ``.flac``, lower case; "" where nothing tells.
    """

    name: str
    suffix: str

    def size(self) -> int:
        """Bytes.

        Raises:
            InputError: there is no such thing, or its source fails.
        """

    def open(self) -> BinaryIO:
        """A seekable file of the bytes, to be closed by the caller; errors as for `size`."""


Medium = Path | Blob
"""What a part of a turn refers to."""


def suffix_of(name: str) -> str:
    """``.flac`` of ``a/B.FLAC`` or of a URL without its query; lower case."""
    return PurePosixPath(name.split("?", 1)[0].split("#", 1)[0]).suffix.lower()


@dataclass(frozen=True, slots=True)
class Embedded:
    """Bytes in memory, such as a cell of a Parquet file."""

    name: str
    data: bytes = field(repr=False)
    suffix: str = ""

    def size(self) -> int:
        return len(self.data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Member:
    """A stretch of a file, such as a member of a tar archive."""

    file: Path
    offset: int
    length: int
    name: str
    suffix: str = ""

    def size(self) -> int:
        return self.length

    def open(self) -> BinaryIO:
        try:
            with self.file.open("rb") as file:
                data = os.pread(file.fileno(), self.length, self.offset)
        except OSError as e:
            raise InputError(f"{self.name}: cannot be read ({e.strerror})") from None
        if len(data) != self.length:
            raise InputError(f"{self.name}: the archive ends before this member does; download it again")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return self.name


def described(medium: Medium) -> str:
    """A medium for messages."""
    return str(medium) if isinstance(medium, Path) else medium.name
