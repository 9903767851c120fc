"""Writing files whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_STRETCH = 1 << 24


def file_digest(path: Path, told: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal; ``told`` is given the length of each stretch that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while data := f.read(_STRETCH):
            digest.update(data)
            if told is not None:
                told(len(data))
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Replace a file by what ``write`` leaves at the path that it is given, so that a reader never sees a part."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        write(part)
        flush(part)
        part.chmod(0o644)
        os.replace(part, path)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old bytes or the new ones, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """The user's cache folder of this library: under ``~/Library/Caches`` on macOS, else as XDG says."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = given if given.is_absolute() else Path.home() / ".cache"
    return base / "gemma_mlx"
