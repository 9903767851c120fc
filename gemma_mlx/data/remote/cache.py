"""A bounded, content-checked folder of remote objects, shared by the processes of one user.

``index.sqlite`` says what is kept (see `gemma_mlx.data.remote.index`); a content file ``ab/ab12…`` is named by the
sha256 of its URL and version. A file that is being written is called ``….part``, and its lock (flock) is the right to
write it: whoever wants the same object waits for it, and a lock of a process that is gone is none. Readers hold a
shared lock, so that what is being read is not let go. Nothing needs to reach the disk at once: the first read of an
entry in a process compares its checksum, and what is damaged is downloaded again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from gemma_mlx.data.remote.addresses import redacted
from gemma_mlx.data.remote.index import Entry, Index, Pin, telling
from gemma_mlx.errors import InputError, SourceError
from gemma_mlx.files import cache_folder

LIMIT_BYTES = 20 << 30
PART = 8 << 20
"""Bytes that are hashed together: a checksum is the sha256 of the parts' sha256s, so parts may come in any order."""
_REMEMBERED = 1 << 19
"""Entries that a process remembers having checked; then it begins anew, so that its memory stays flat."""
_POLL_S = 0.01
_READ = 1 << 20
_CONTENT = re.compile(r"[0-9a-f]{2}")
_OURS = re.compile(_CONTENT.pattern + r"|lock|holders|index\.sqlite.*|\.DS_Store")
_FIRST_RESERVE = 1 << 16
"""Set aside for an object of unknown size, and doubled (at most `PART` more) as it comes."""


def default_folder() -> Path:
    """Where remote media are kept unless something else is said."""
    return cache_folder() / "media"


class Cache:
    """Remote objects kept on this machine, the least recently used let go where they exceed the limit.

    Safe to use from several threads and several processes at once (each with a `Cache` of its own, also after a fork).

    Args:
        folder: new, empty, or a cache; only its owner may read it. `default_folder` by default.
        limit_bytes: what content files may take together; 0 keeps nothing.

    Raises (also later):
        InputError: a negative limit, or a folder that holds something else.
        SourceError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES):
        if limit_bytes < 0:
            raise InputError(f"the cache's limit is {limit_bytes} bytes; expected 0 (keeps nothing) or more")
        self.folder = default_folder() if folder is None else Path(folder).absolute()
        self.limit_bytes = limit_bytes
        self._checked: set[int] = set()
        self._closed = threading.Event()
        with telling(self.folder), self._setting_up():
            self.index = Index(self.folder)
            if self.index.new:
                self._sweep()
        with self.index.writing():
            self._drop_stale()
            self.index.make_room(0, self.limit_bytes, self._remove)

    @contextmanager
    def _setting_up(self) -> Iterator[None]:
        """Alone in the folder, which is made or found to be a cache."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.listdir(self.folder)
        alien = sorted(name for name in found if not _OURS.fullmatch(name))
        if alien and "index.sqlite" not in found:
            raise InputError(f"cache folder {self.folder}: holds other files ({alien[0]}); give a new or empty folder")
        self.folder.chmod(0o700)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _sweep(self) -> None:
        """Removes what no index knows."""
        for name in filter(_CONTENT.fullmatch, os.listdir(self.folder)):
            shutil.rmtree(self.folder / name)
        shutil.rmtree(self.folder / "holders", ignore_errors=True)

    def close(self) -> None:
        """Ends the use of the cache; whoever waits for another process's download stops waiting."""
        if not self._closed.is_set():
            self._closed.set()
            self.index.close()

    # Content.

    def open(self, url: str, version: str) -> BinaryIO | None:
        """The whole object, checked, or None where it is not kept; the file survives that it is let go."""
        return self._open(_key(url, version))

    def get(
        self, url: str, version: str, size: int | None, fill: Callable[[Draft], None], *, only_kept: bool = False
    ) -> BinaryIO | None:
        """The whole object: kept, or written by `fill`, which runs once for all who want it at the same time.

        An object that finds no room goes into a file without a name and is not kept; None instead if `only_kept`.

        Args:
            url, version: what is to be read.
            size: bytes, if known.
            fill: writes all bytes into the draft that it is given.

        Raises:
            SourceError: more or fewer bytes than `size`; and what `fill` raises.
        """
        key, told = _key(url, version), redacted(url)
        while (file := self._open(key)) is None:
            draft = self._begin(key, told, size)
            if draft is None:
                if self._closed.wait(_POLL_S):
                    raise SourceError(f"{told}: the cache was closed")
                continue
            with draft:
                if only_kept and not draft.kept:
                    return None
                fill(draft)
                return draft.finish()
        return file

    def holder(self) -> Holder:
        """Somebody who needs entries to stay."""
        return Holder(self)

    def _open(self, key: bytes) -> BinaryIO | None:
        entry = self.index.entry(key)
        if entry is None:
            return None
        with telling(self.folder):
            try:
                file = self._path(key).open("rb")
            except FileNotFoundError:
                file = None
        try:
            if file is not None and self._whole(file, entry):
                self.index.touch(entry.id)
                return file
        except BaseException:
            file.close()
            raise
        if file is not None:
            file.close()
        with self.index.writing():
            if self.index.drop(key, entry.id):  # else another process has replaced it, or let it go
                self._path(key).unlink(missing_ok=True)
        return None

    def _whole(self, file: BinaryIO, entry: Entry) -> bool:
        """Whether a file is what was downloaded: its size always, its bytes once in this process."""
        with telling(self.folder):
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_size != entry.size:
                return False
            if entry.id in self._checked:
                return True
            try:
                found = _checksum(file)
            except OSError:  # a disk that cannot read it back
                return False
        if found != entry.checksum:
            return False
        self._remember(entry.id)
        return True

    def _remember(self, id: int) -> None:
        if len(self._checked) >= _REMEMBERED:
            self._checked.clear()
        self._checked.add(id)

    # Writing.

    def _begin(self, key: bytes, told: str, size: int | None) -> Draft | None:
        """The right to write an entry; None if somebody else has it or it is whole by now."""
        part = self._part(key)
        with telling(self.folder):
            part.parent.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            draft = None
            try:
                if not _locked(handle) or not _is(part, handle):
                    return None
                try:
                    with self.index.writing():  # waits for a publication that has moved the part already
                        whole = self.index.is_whole(key)
                    if not whole:
                        os.ftruncate(handle, 0)  # what a process that is gone has left
                        draft = Draft(self, key, told, size, handle)
                finally:
                    if draft is None:
                        part.unlink(missing_ok=True)
            finally:
                if draft is None:
                    os.close(handle)
            return draft

    def _reserve(self, key: bytes, size: int) -> bool:
        """Sets `size` bytes aside for an entry; false where there is no room."""
        with self.index.writing():
            more = size - self.index.reserved_for(key)
            room = self.index.make_room(more, self.limit_bytes, self._remove)
            if not room and self._drop_stale():
                room = self.index.make_room(more, self.limit_bytes, self._remove)
            if room:
                self.index.reserve(key, size)
            return room

    def _abandon(self, key: bytes) -> None:
        with self.index.writing():
            self.index.drop(key)
            self._part(key).unlink(missing_ok=True)
            self._path(key).unlink(missing_ok=True)  # where `_publish` failed half-way

    def _publish(self, key: bytes, size: int, checksum: bytes, handle: int) -> None:
        with self.index.writing():
            # Killed between the two: a reservation without a part, which is stale; its file goes with it.
            os.replace(self._part(key), self._path(key))
            self._remember(self.index.publish(key, size, checksum))
            fcntl.flock(handle, fcntl.LOCK_SH)

    def _remove(self, key: bytes) -> bool:
        """Unlinks an entry's file, unless somebody reads it."""
        return _unlinked(self._path(key))

    def _drop_stale(self) -> bool:
        """Drops what processes that are gone had reserved or held; whether there was any."""
        dropped = False
        for key in self.index.reserved():
            if _unlinked(self._part(key)):
                self._path(key).unlink(missing_ok=True)
                dropped |= self.index.drop(key)
        for owner in self.index.holders():
            if _unlinked(self._holder(owner)):
                self.index.release(owner)
                dropped = True
        return dropped

    # Paths.

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name

    def _part(self, key: bytes) -> Path:
        return self._path(key).with_suffix(".part")

    def _holder(self, owner: str) -> Path:
        """A file whose lock says that a `Holder` is alive."""
        return self.folder / "holders" / owner

    # Pins.

    def pinned(self, run: str, url: str) -> Pin | None:
        """The version of an object that a run reads, once it has been said."""
        return self.index.pinned(run, url)

    def pin(self, run: str, url: str, version: str, size: int | None = None) -> Pin:
        """Says which version of an object a run reads, unless that has been said; gives what holds."""
        self.index.pin(run, [(url, Pin(version, size))])
        return self.index.pinned(run, url) or Pin(version, size)

    def forget(self, run: str) -> None:
        """A run of this name begins anew: it sees every object as it is now."""
        self.index.forget(run)


class Holder:
    """Keeps entries from being let go, as long as it is open and its process lives."""

    def __init__(self, cache: Cache):
        self._cache, self._owner = cache, uuid.uuid4().hex
        path = cache._holder(self._owner)
        with telling(cache.folder):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def hold(self, url: str, version: str) -> Path | None:
        """The path of an entry, which stays from now on; None if it is not kept."""
        key = _key(url, version)
        with self._cache.index.writing():
            return self._cache._path(key) if self._cache.index.hold(self._owner, key) else None

    def release(self, url: str, version: str) -> None:
        """Lets one entry go."""
        with self._cache.index.writing():
            self._cache.index.release(self._owner, _key(url, version))

    def close(self) -> None:
        """Lets all go."""
        if self._lock < 0:
            return
        with self._cache.index.writing():
            self._cache.index.release(self._owner)
            self._cache._holder(self._owner).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1


class Draft:
    """An object on its way into the cache; several threads may write different parts of it.

    Attributes:
        told: the URL as messages show it.
        kept: it will be an entry; else its file has no name (any more).
        written: bytes so far.
    """

    def __init__(self, cache: Cache, key: bytes, told: str, size: int | None, handle: int):
        self._cache, self._key, self._handle = cache, key, handle
        self.told, self.size, self.written = told, size, 0
        self._reserved, self._hashes = 0, {}
        self._lock = threading.Lock()
        self.kept = True
        self._reserve(min(_FIRST_RESERVE, cache.limit_bytes) if size is None else size)

    def write(self, offset: int, data: bytes) -> None:
        """Puts bytes at an offset; each part of `PART` bytes is written from its beginning to its end."""
        end = offset + len(data)
        if self.size is not None and end > self.size:
            raise SourceError(f"{self.told}: sends more than the {self.size} bytes that it announced; try again")
        with self._lock:
            if end > self._reserved and self.kept:
                step = min(self._reserved + min(self._reserved, PART), self._cache.limit_bytes)
                self._reserve(max(end, step))
        rest = memoryview(data)
        while rest:
            piece = rest[: PART - offset % PART]
            self._hashes.setdefault(offset // PART, sha256()).update(piece)
            with telling(self._cache.folder):
                _write_all(self._handle, piece, offset)
            offset += len(piece)
            rest = rest[len(piece) :]
        with self._lock:
            self.written += len(data)

    def _reserve(self, size: int) -> None:
        if self._cache._reserve(self._key, size):
            self._reserved = size
        else:  # goes on without a name
            self.kept = False
            self._cache._abandon(self._key)

    def checksum(self) -> bytes:
        """Of what has been written."""
        return sha256(b"".join(self._hashes[i].digest() for i in sorted(self._hashes))).digest()

    def finish(self) -> BinaryIO:
        """The whole object, from its beginning."""
        if self.size is not None and self.written != self.size:
            raise SourceError(f"{self.told}: ends after {self.written} of {self.size} bytes; try again")
        if self.kept:
            self._cache._publish(self._key, self.written, self.checksum(), self._handle)
        handle, self._handle = self._handle, -1
        os.lseek(handle, 0, os.SEEK_SET)
        return os.fdopen(handle, "rb")

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing of a draft that was not finished."""
        if self._handle < 0:
            return
        try:
            if self.kept:
                self._cache._abandon(self._key)
        finally:
            os.close(self._handle)
            self._handle = -1


def _key(url: str, version: str) -> bytes:
    return sha256(f"{len(url)} {url} {version}".encode("utf-8", "surrogatepass")).digest()


def _checksum(file: BinaryIO) -> bytes:
    """As `Draft.checksum`, of a file; its position stays."""
    parts, offset = [], 0
    while data := os.pread(file.fileno(), min(_READ, PART - offset % PART), offset):
        if offset % PART == 0:
            parts.append(sha256())
        parts[-1].update(data)
        offset += len(data)
    return sha256(b"".join(part.digest() for part in parts)).digest()


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def _locked(handle: int) -> bool:
    """Takes the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlinked(path: Path) -> bool:
    """Unlinks a file unless somebody has a lock on it; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if _locked(handle):
            os.unlink(path)  # while locked: whoever opened it before will see that its name is gone
            return True
        return False
    finally:
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
