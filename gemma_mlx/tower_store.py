"""Where the outputs of frozen towers are kept: in memory for a run, or on disk for all runs of a user."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.files import cache_folder

MEMORY_BYTES = 1_000_000_000
"""The most that is kept in memory by default: 2,300 pictures of 280 soft tokens for E2B in bfloat16."""
DISK_BYTES = 20_000_000_000
"""The most that is kept on disk by default."""
_DIGEST = 16
_SLACK = 32
"""The disk is looked at again once this part of the limit has been written."""
_ABANDONED = 3600
"""Seconds after which a file that is being written belongs to a process that ended."""


class Store(Protocol):
    """Arrays by key. Used from several threads; whoever misses makes the array and puts it."""

    def get(self, key: bytes) -> mx.array | np.ndarray | None:
        """The array, evaluated; bfloat16 in NumPy as uint16."""

    def put(self, key: bytes, value: mx.array) -> None:
        """Keep an evaluated array; the least recently used go when the limit is passed."""

    @property
    def nbytes(self) -> int:
        """Bytes kept."""


class Memory:
    """Arrays of this process; ``limit`` bytes at most, 0 keeps none."""

    def __init__(self, limit: int = MEMORY_BYTES):
        self.limit = limit
        self._kept: OrderedDict[bytes, mx.array] = OrderedDict()
        self._bytes = 0
        self._changing = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._bytes

    def get(self, key: bytes) -> mx.array | None:
        """The array of this key, if it is kept."""
        with self._changing:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: bytes, value: mx.array) -> None:
        """Keep an array unless it alone is over the limit."""
        with self._changing:
            if key not in self._kept and value.nbytes <= self.limit:
                self._kept[key] = value
                self._bytes += value.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


class Disk:
    """Arrays as files of a folder that several processes may share.

    A file is written under another name and renamed, and starts with a hash of all that follows, so a reader meets a
    whole array or none: a damaged file counts as missing and is written again. The time of last use is the file's
    modification time. Files and folder are readable by their owner alone. A disk that is full costs what would have
    been kept, nothing more.

    Args:
        folder: made if it does not exist.
        limit: bytes kept at most; one process passes it by less than a thirty-second.

    Raises:
        InputError: a folder that cannot be written.
    """

    def __init__(self, folder: Path, limit: int = DISK_BYTES):
        self.folder, self.limit = folder, limit
        self._bytes = self._written = 0
        self._changing = Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(
                f"tower_cache_dir {folder}: cannot be written ({error.strerror}); name another folder, or use "
                "tower_cache memory"
            ) from None
        self._trim()

    @property
    def nbytes(self) -> int:
        """Bytes kept, as far as this process knows."""
        return self._bytes + self._written

    def get(self, key: bytes) -> np.ndarray | None:
        """The array of this key, if there is a whole file of it."""
        path = self.folder / key.hex()
        try:
            found = _unpacked(path.read_bytes())
            os.utime(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def put(self, key: bytes, value: mx.array) -> None:
        """Write an array's file, and remove the longest unused where there are too many."""
        data = _packed(value)
        if len(data) > self.limit:
            return
        with suppress(OSError):
            self._write(self.folder / key.hex(), data)
            with self._changing:
                self._written += len(data)
                if self._written > self.limit / _SLACK:
                    self._trim()

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(prefix=".", dir=self.folder)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _trim(self) -> None:
        """Count what is there; down to a slack below the limit if that is passed."""
        files, abandoned = [], time.time() - _ABANDONED
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process removes too
                stat = entry.stat()
                if entry.name.startswith(".") and stat.st_mtime < abandoned:
                    os.unlink(entry.path)
                elif entry.is_file():
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        self._bytes, self._written = sum(size for _, size, _ in files), 0
        room = self.limit - self.limit / _SLACK
        for _, size, path in sorted(files):
            if self._bytes <= room:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._bytes -= size


def _packed(value: mx.array) -> bytes:
    """Hash, a line with shape and type, bytes."""
    name = str(value.dtype).removeprefix("mlx.core.")
    raw = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    head = json.dumps({"dtype": name, "shape": raw.shape}).encode() + b"\n"
    content = head + raw.tobytes()
    return blake2b(content, digest_size=_DIGEST).digest() + content


def _unpacked(data: bytes) -> np.ndarray:
    """Raises ValueError for bytes that are not whole."""
    digest, content = data[:_DIGEST], memoryview(data)[_DIGEST:]
    if blake2b(content, digest_size=_DIGEST).digest() != digest:
        raise ValueError
    start = data.index(b"\n", _DIGEST) + 1
    head: dict[str, Any] = json.loads(data[_DIGEST:start])
    kind = "uint16" if head["dtype"] == "bfloat16" else head["dtype"]
    return np.frombuffer(data, kind, offset=start).reshape(head["shape"])


def default_folder() -> Path:
    """Where soft tokens are kept unless a run names a folder."""
    return cache_folder() / "soft_tokens"


def open_store(kind: str, gigabytes: float | None = None, folder: str | Path | None = None) -> Store:
    """The store that the options ``tower_cache``, ``tower_cache_gb`` and ``tower_cache_dir`` ask for."""
    limit = None if gigabytes is None else int(gigabytes * 1e9)
    if kind == "disk":
        return Disk(Path(folder).expanduser() if folder else default_folder(), DISK_BYTES if limit is None else limit)
    if kind == "off":
        return Memory(0)
    return Memory(MEMORY_BYTES if limit is None else limit)
