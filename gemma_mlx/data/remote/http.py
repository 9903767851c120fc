"""Objects behind ``https://`` and ``http://``.

Plain ``http://`` is read if a URL says so, but a redirect never leads from https to it. Compressed transfer is never
asked for: sizes and ranges are those of the object as it lies there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from gemma_mlx.data.remote.addresses import HostGate, redacted
from gemma_mlx.data.remote.retry import RETRIED_STATUS, RetryPolicy, TransientError, resumed, retried
from gemma_mlx.data.remote.stores import Stat
from gemma_mlx.data.remote.wire import Wire, reason_of, retry_after
from gemma_mlx.errors import InputError, SourceError

CHUNK = 1 << 16
"""Bytes read at once; what a broken connection had delivered of it is asked for again."""
_NO_HEAD = (400, 403, 405, 501)
"""Answers to HEAD of servers that answer GET, such as those of links that are signed for GET alone."""
_COMPRESSED_NAMES = (".gz", ".tgz", ".zst", ".br", ".bz2", ".xz")


class HttpStore:
    """A `gemma_mlx.data.remote.stores.Store` over HTTP.

    A URL's user and password are sent to its own host as basic authentication.

    Args:
        allowed_hosts: ``host`` or ``host:port`` that may have private addresses.
        policy: how long to go on trying.
    """

    def __init__(self, allowed_hosts: Iterable[str] = (), policy: RetryPolicy | None = None):
        self.policy = policy or RetryPolicy()
        self.wire = Wire(HostGate.of(allowed_hosts), self.policy)

    def stat(self, url: str) -> Stat:
        """See `Store`."""
        return retried(lambda: self._stat(url), self.policy, redacted(url))

    def _stat(self, url: str) -> Stat:
        with self.wire.answer("HEAD", url, {}) as response:
            if response.status not in _NO_HEAD:
                _check(response, url, None)
                found = _stat_of(response, url)
                if found.size is not None:
                    return found
        with self.wire.answer("GET", url, {"Range": "bytes=0-0"}) as response:
            if response.status != 416:  # of an empty object there is no first byte
                _check(response, url, None)
            return _stat_of(response, url)

    def read(self, url: str, stat: Stat | None = None, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Store`."""
        reading = _Reading(self, url, stat, end)
        return resumed(reading.chunks, start, self.policy, redacted(url))

    def list(self, pattern: str) -> Iterator[tuple[str, Stat]]:
        """Always raises `InputError`: web servers have no listing."""
        raise InputError(f"{redacted(pattern)}: files on a web server cannot be listed; name each one, or use gs://")


class _Reading:
    """One read of [start, end), perhaps by several requests."""

    def __init__(self, store: HttpStore, url: str, stat: Stat | None, end: int | None):
        self._store, self._url, self._told = store, url, redacted(url)
        self._stat, self._end = stat, end

    def _stop(self) -> int | None:
        """The byte after the last one that is wanted; None if only the server knows."""
        known = [n for n in (self._end, self._stat.size if self._stat else None) if n is not None]
        return min(known, default=None)

    def _headers(self, at: int) -> dict[str, str]:
        headers = {}
        if at or self._end is not None:
            headers["Range"] = f"bytes={at}-" + ("" if self._end is None else str(self._end - 1))
        kind, _, version = (self._stat.version if self._stat else "").partition(" ")
        if kind == "ETag" and re.fullmatch(r'"[!#-~]*"', version):  # a weak one never matches
            headers["If-Match"] = version
        elif kind == "Last-Modified":
            headers["If-Unmodified-Since"] = version.rpartition(";")[0]
        return headers

    def chunks(self, at: int) -> Iterator[bytes]:
        """The bytes from `at`, by one request."""
        if self._done(at):
            return
        with self._store.wire.answer("GET", self._url, self._headers(at)) as response:
            if response.status == 412:
                raise self._changed(self._version_now())
            if response.status != 416:
                _check(response, self._url, self._stat)
            self._hold_to(_stat_of(response, self._url))
            if self._done(at):
                return
            first = 0 if response.status == 200 else _content_range(response)[0]
            if first is None or first > at:
                what = "refuses" if response.status == 416 else "sent others for"
                raise SourceError(f"{self._told}: the server {what} the bytes from {at} on; use another server")
            if self._stop() is None and not response.chunked:
                raise SourceError(
                    f"{self._told}: the server does not say how long it is (no Content-Length), so that a broken "
                    "download would not be noticed; use another server"
                )
            yield from self._body(response, at - first, at)

    def _done(self, at: int) -> bool:
        stop = self._stop()
        return stop is not None and at >= stop

    def _hold_to(self, found: Stat) -> None:
        """Compares with what was seen first.

        Raises:
            SourceError: another version.
        """
        before = self._stat or found
        if (None not in (before.size, found.size) and before.size != found.size) or _differ(before, found):
            raise self._changed(_named(found))
        size = found.size if before.size is None else before.size
        self._stat = Stat(size, before.version or found.version)

    def _version_now(self) -> str:
        try:
            return _named(self._store.stat(self._url))
        except InputError:
            return "gone"

    def _changed(self, now: str, before: str = "") -> SourceError:
        before = before or _named(self._stat or Stat(None, ""))
        return SourceError(
            f"{self._told} changed during the run ({before} before, now {now}); start again, and leave it as it is"
        )

    def _body(self, response: urllib3.BaseHTTPResponse, skip: int, at: int) -> Iterator[bytes]:
        """The answer's bytes without the first `skip`, up to the last one that is wanted."""
        stop = self._stop()
        try:
            for chunk in response.stream(CHUNK, decode_content=False):
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                wanted = chunk if stop is None else chunk[: stop - at]
                if len(wanted) < len(chunk) and self._stat and stop == self._stat.size:
                    raise self._changed("more", f"{stop} bytes")
                if wanted:
                    at += len(wanted)
                    yield wanted
                elif chunk:
                    return  # the server sends more than was asked for
        except (HTTPError, OSError) as e:
            raise TransientError(reason_of(e, self._store.policy)) from None
        if skip or (stop is not None and at < stop):
            raise TransientError("the answer ended early")


def _named(stat: Stat) -> str:
    """A version for messages."""
    return stat.version or (f"{stat.size} bytes" if stat.size is not None else "of an unknown version")


def _differ(a: Stat, b: Stat) -> bool:
    """Whether two versions are of one kind and not the same; the size in a date's version is compared elsewhere."""
    one, two = a.version.partition(";")[0], b.version.partition(";")[0]
    if a.version.startswith("ETag"):
        one, two = a.version, b.version
    return one.partition(" ")[0] == two.partition(" ")[0] and one != two


def _check(response: urllib3.BaseHTTPResponse, url: str, pinned: Stat | None) -> None:
    """Passes an answer that has the object.

    Raises:
        InputError: it has not, and never will.
        SourceError: no longer, though it had.
        TransientError: perhaps later.
    """
    status, told = response.status, redacted(url)
    if status in (200, 206):
        return
    if status in RETRIED_STATUS:
        raise TransientError(f"HTTP {status}", wait=retry_after(response))
    if pinned is not None and status in (401, 403, 404, 410):
        raise SourceError(f"{told} changed during the run (it can no longer be read: HTTP {status}); start again")
    if status in (404, 410):
        raise InputError(f"{told}: no such object (HTTP {status}); check the URL")
    if status in (401, 403, 407):
        raise InputError(f"{told}: no permission (HTTP {status}); the link may have expired, or it needs a login")
    if status >= 500:
        raise SourceError(f"{told}: the server failed (HTTP {status}); try another")
    raise InputError(f"{told}: the server refuses the request (HTTP {status}); check the URL")


def _content_range(response: urllib3.BaseHTTPResponse) -> tuple[int | None, int | None]:
    """(first byte, size of the whole object) of a partial or refused answer, None where it does not say."""
    found = re.match(
        r"\s*bytes\s+(?:([0-9]{1,18})-[0-9]+|\*)/([0-9]{1,18}|\*)", response.headers.get("Content-Range", "")
    )
    if not found:
        return None, None
    first, total = found.groups()
    return int(first) if first else None, None if total == "*" else int(total)


def _stat_of(response: urllib3.BaseHTTPResponse, url: str) -> Stat:
    """Size and version by an answer's head.

    Raises:
        InputError: the bytes are compressed on the way, though that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    # Some servers call a file that is an archive by itself "encoded".
    if encoding not in ("", "identity") and not urlsplit(url).path.lower().endswith(_COMPRESSED_NAMES):
        raise InputError(
            f"{redacted(url)}: the server sends it compressed (Content-Encoding: {encoding[:20]}), so that its bytes "
            "cannot be counted; turn this off there"
        )
    if response.status in (206, 416):
        size = _content_range(response)[1]
    else:
        length = "" if "Transfer-Encoding" in response.headers else response.headers.get("Content-Length", "")
        size = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    etag, date = _plain(response.headers.get("ETag", "")), _plain(response.headers.get("Last-Modified", ""))
    if etag:
        return Stat(size, f"ETag {etag}")
    return Stat(size, f"Last-Modified {date}; {size} bytes" if date else "")


def _plain(value: str) -> str:
    """A header's value that can be shown; a digest in the place of an odd one."""
    value = value.strip()
    return value if re.fullmatch(r"[ -~]{0,200}", value) else "sha256:" + sha256(value.encode()).hexdigest()
