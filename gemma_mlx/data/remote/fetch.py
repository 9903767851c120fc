"""Remote objects as blobs and files: downloaded once, kept in the cache, one version of each in a run."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gemma_mlx.data.blob import Blob, suffix_of
from gemma_mlx.data.remote import stores
from gemma_mlx.data.remote.addresses import host_of as host_of
from gemma_mlx.data.remote.addresses import redacted, scheme_of, split_url
from gemma_mlx.data.remote.cache import PART, Cache, Draft
from gemma_mlx.data.remote.index import Pin
from gemma_mlx.data.remote.patterns import expanded
from gemma_mlx.data.remote.stores import Stat, Store
from gemma_mlx.data.remote.workers import Budget, Workers
from gemma_mlx.errors import InputError, SourceError

MAX_OBJECT_BYTES = 2 << 30
AHEAD_BYTES = 256 << 20
AHEAD_OBJECTS = 1024
"""How many objects may wait to be prefetched; further ones are fetched when they are opened."""
RANGED_BYTES = 32 << 20
"""Larger objects of Cloud Storage are read in `LANES` ranges at a time. Over HTTP they are not: a server that knows no
ranges would send the beginning again for each."""
LANES = 4
_UNVERSIONED = "unversioned "
"""Marks the version of an object whose server gives none: its bytes serve the run that read them, and no other."""
_CLOSE_S = 2.0


def is_remote(text: str) -> bool:
    """Whether a cell or an argument is a URL that a `Fetcher` reads."""
    return "://" in text and scheme_of(text) in ("http", "https", "gs")


@dataclass(frozen=True, slots=True)
class RemoteBlob:
    """An object far away, see `Blob`; nothing is asked of its server before `size` or `open`."""

    url: str
    name: str
    suffix: str
    fetcher: Fetcher = field(repr=False, compare=False)

    def size(self) -> int:
        return self.fetcher.size(self.url)

    def open(self) -> BinaryIO:
        return self.fetcher.open(self.url)

    def __str__(self) -> str:
        return self.name


@dataclass
class Stats:
    """What a `Fetcher` has done: objects and bytes downloaded, objects opened that were there already."""

    objects: int = 0
    bytes: int = 0
    hits: int = 0


class Fetcher:
    """Fetches remote objects into a cache; safe to use from several threads, not after a fork.

    A run sees one version of every object: the first access asks the server which it is, later ones (also in a
    later process of the same run) ask nothing while the object is cached, and download that very version if it is not.

    Args:
        cache: where objects are kept; not closed by this.
        run: the run's name, for its versions; "" for one that is never resumed.
        allowed_hosts: hosts that the user named, which may have private addresses.
        workers: downloads at a time in the background; as many threads read ranges of large objects.
        max_object_bytes: the largest object that is read.
        ahead_bytes: what `prefetch` may be downloading at a time (or one object alone).
        store_of: URL, allowed hosts -> its `Store`.

    Attributes:
        stats: counts so far.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        run: str = "",
        allowed_hosts: Iterable[str] = (),
        workers: int = 16,
        max_object_bytes: int = MAX_OBJECT_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
        store_of: Callable[..., Store] = stores.store_of,
    ):
        self.cache, self.stats, self._max = cache, Stats(), max_object_bytes
        self._once = not run
        self._run = run or f"once {uuid.uuid4().hex}"
        self._store_of, self._hosts = store_of, tuple(allowed_hosts)
        self._workers, self._lanes = Workers(workers, "fetch"), Workers(workers, "range")
        self._ahead: dict[str, Future] = {}
        self._budget = Budget(ahead_bytes)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._holder = cache.holder()

    # What others use.

    def blob(self, url: str) -> Blob:
        """An object, not asked for yet.

        Raises:
            InputError: not a proper ``https://``, ``http://`` or ``gs://`` URL.
        """
        url = _checked(url)
        return RemoteBlob(url, redacted(url), suffix_of(url), self)

    def size(self, url: str) -> int:
        """Bytes of an object; errors as for `open`."""
        size = self._pin(url)[0].size
        if size is None:
            with self.open(url) as file:
                size = os.fstat(file.fileno()).st_size
        return size

    def open(self, url: str) -> BinaryIO:
        """The whole object as a file of this machine.

        Raises:
            InputError: no such object, no permission, or it is too large.
            SourceError: its server fails, it changed during the run, or the cache cannot be written.
        """
        with self._lock:
            future = self._ahead.pop(url, None)
        if future is not None and not future.cancel():
            future.result()
        pin, first = self._pin(url)
        if (file := self.cache.open(url, pin.version)) is not None:
            with self._lock:
                self.stats.hits += 1
            return file
        return self._fetch(url, pin, first)

    def file(self, url: str) -> Path:
        """The path of a whole object, which stays until `release` or `close`; for manifests and shards.

        Raises:
            InputError: it finds no room in the cache; and as for `open`.
        """
        url = _checked(url)
        pin, first = self._pin(url)
        file = self._fetch(url, pin, first, only_kept=True)
        if file is not None:
            with file:  # read, it is not let go
                if path := self._holder.hold(url, pin.version):
                    return path
        size = "its bytes find" if pin.size is None else f"{pin.size:,} bytes find"
        raise InputError(
            f"{redacted(url)}: {size} no room in the cache {self.cache.folder}, which may take "
            f"{self.cache.limit_bytes:,} bytes and is in use; raise its limit"
        )

    def release(self, url: str) -> None:
        """Ends the stay of a `file`, for shards that are read one after the other."""
        url = _checked(url)
        if pin := self.cache.pinned(self._run, url):
            self._holder.release(url, pin.version)

    def list(self, pattern: str) -> list[str]:
        """The URLs that a pattern stands for, in order: braces first (see `expanded`), then, in Cloud Storage, ``*``,
        ``?``, ``[…]`` and folders (``…/``).

        Raises:
            InputError: nothing matches, or as for `blob`.
        """
        urls: list[str] = []
        for name in expanded(_checked(pattern)):
            if scheme_of(name) != "gs" or not (name.endswith("/") or re.search(r"[*?[]", name)):
                urls.append(name)
                continue
            # Names that end with a slash stand for empty folders.
            found = [(url, stat) for url, stat in self._store(name).list(name) if not url.endswith("/")]
            if not found:
                raise InputError(f"{name}: no object matches; check the name and the permission to list")
            self.cache.index.pin(self._run, [(url, _pin_of(stat)) for url, stat in found])
            urls += [url for url, _ in found]
        return urls

    def prefetch(self, blob: Blob) -> None:
        """Begins to fetch a blob in the background, if it is remote and not too many are waiting.

        What is prefetched lies in the cache until it is opened, so the cache should have room for it; what does not fit
        is fetched when it is opened. An error is kept for whoever opens the blob.
        """
        if not isinstance(blob, RemoteBlob) or self._closed.is_set():
            return
        if blob.fetcher is not self:
            return blob.fetcher.prefetch(blob)
        with self._lock:
            if blob.url in self._ahead:
                return
            if len(self._ahead) >= AHEAD_OBJECTS:
                failed = next((url for url, future in self._ahead.items() if future.done()), None)
                if failed is None:
                    return
                del self._ahead[failed]  # fails again when it is opened
            future = self._ahead[blob.url] = self._workers.submit(self._fetch_ahead, blob.url)
        future.add_done_callback(lambda done: self._ahead_done(blob.url, done))

    def close(self) -> None:
        """Ends downloads in the background and lets held files go."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            waiting = list(self._ahead.values())
        for future in waiting:
            future.cancel()
        self._workers.close(_CLOSE_S)
        self._lanes.close(_CLOSE_S)
        self._holder.close()
        if self._once:
            self.cache.forget(self._run)

    # How it is done.

    def _store(self, url: str) -> Store:
        return self._store_of(url, self._hosts)

    def _pin(self, url: str) -> tuple[Pin, bool]:
        """The version that this run reads, and whether that has been found out just now."""
        pin = self.cache.pinned(self._run, url)
        first = pin is None
        if pin is None:
            new = _pin_of(self._store(url).stat(url))
            pin = self.cache.pin(self._run, url, new.version, new.size)
        if pin.size is not None:
            self._check_size(url, pin.size)
        return pin, first

    def _check_size(self, url: str, size: int) -> None:
        if size > self._max:
            raise InputError(
                f"{redacted(url)}: has {size:,} bytes (or more), the limit for one object is {self._max:,}; leave it "
                "out or raise the limit"
            )

    def _fetch(self, url: str, pin: Pin, first: bool, only_kept: bool = False) -> BinaryIO | None:
        """The object from the cache or its server; None if it finds no room and must be kept."""

        def fill(draft: Draft) -> None:
            self._download(url, pin, first, draft)
            with self._lock:
                self.stats.objects += 1

        return self.cache.get(url, pin.version, pin.size, fill, only_kept=only_kept)

    def _fetch_ahead(self, url: str) -> None:
        pin, first = self._pin(url)
        file = self.cache.open(url, pin.version)
        if file is None:
            with self._budget.taking(PART if pin.size is None else pin.size):
                file = self._fetch(url, pin, first, only_kept=True)
        if file is not None:
            file.close()

    def _ahead_done(self, url: str, future: Future) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        with self._lock:
            if self._ahead.get(url) is future:
                del self._ahead[url]

    def _download(self, url: str, pin: Pin, first: bool, draft: Draft) -> None:
        versioned = not pin.version.startswith(_UNVERSIONED)
        stat = Stat(pin.size, pin.version if versioned else "")
        if scheme_of(url) == "gs" and versioned and pin.size is not None and pin.size > RANGED_BYTES:
            self._read_in_lanes(url, stat, first, draft)
        else:
            self._read(url, stat, first, draft)
        if not versioned:
            checksum = draft.checksum()
            if self.cache.index.pin_content(self._run, url, checksum) != checksum:
                raise SourceError(f"{redacted(url)}: has changed since this run first read it; start a new run")

    def _read(self, url: str, stat: Stat, first: bool, draft: Draft, start: int = 0, end: int | None = None) -> None:
        """Bytes [start, end) into a draft."""
        at = start
        with closing(self._chunks(url, stat, first, start, end)) as chunks:
            for chunk in chunks:
                self._check_size(url, at + len(chunk))
                draft.write(at, chunk)
                at += len(chunk)
                with self._lock:
                    self.stats.bytes += len(chunk)
        if end is not None and at != end:
            raise SourceError(f"{redacted(url)}: gives {at - start} bytes where it has {end - start}; try again")

    def _chunks(self, url: str, stat: Stat, first: bool, start: int, end: int | None) -> Iterator[bytes]:
        try:
            for chunk in self._store(url).read(url, stat, start, end):
                if self._closed.is_set():
                    raise SourceError(f"{redacted(url)}: the download was ended")
                yield chunk
        except SourceError:
            raise
        except InputError as e:
            if first:
                raise
            # It was there, so no row is to blame.
            raise SourceError(f"{e} (it was there when this run first read it)") from None

    def _read_in_lanes(self, url: str, stat: Stat, first: bool, draft: Draft) -> None:
        """As `_read`, of the whole object, several parts at a time."""
        starts, lock, failed = iter(range(0, stat.size or 0, PART)), threading.Lock(), threading.Event()

        def lane() -> None:
            while not failed.is_set():
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                try:
                    self._read(url, stat, first, draft, start, min(start + PART, stat.size or 0))
                except BaseException:
                    failed.set()
                    raise

        lanes = [self._lanes.submit(lane) for _ in range(LANES)]
        try:
            for future in lanes:
                future.result()
        finally:
            failed.set()
            wait(lanes)  # none may write into a draft that is given up


def _pin_of(stat: Stat) -> Pin:
    return Pin(stat.version or _UNVERSIONED + uuid.uuid4().hex, stat.size)


def _checked(url: str) -> str:
    """A URL with its scheme in lower case."""
    scheme = scheme_of(url)
    if scheme == "gs":
        if not re.fullmatch(r"gs://[^/\x00-\x20]+/[^\x00-\x1f\x7f]+", url, re.IGNORECASE):
            raise InputError(f"{url!r} is not a proper URL; expected one such as gs://bucket/folder/file.flac")
    elif scheme in ("http", "https"):
        split_url(url)
    else:
        raise InputError(f"{redacted(url)!r} is not a URL that can be read; expected https://, http:// or gs://")
    return scheme + url[len(scheme) :]
