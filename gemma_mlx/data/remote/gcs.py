"""Objects of Google Cloud Storage: ``gs://bucket/name``.

Credentials are those that Google's tools use (Application Default Credentials), and none where there are none: then
public objects can be read. ``STORAGE_EMULATOR_HOST`` sends everything to an emulator, without credentials.
"""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from gemma_mlx.data.remote.retry import RETRIED_STATUS, RetryPolicy, TransientError, resumed, retried
from gemma_mlx.data.remote.stores import Stat
from gemma_mlx.data.remote.wire import reason_of
from gemma_mlx.errors import InputError, SourceError

CHUNK = 1 << 20
WINDOW = 8 << 20
"""Bytes asked for at once, and held in memory: Google's client gives a download out when it is whole."""
PAGE = 1000
"""Names in one answer to a listing; as many as the service allows."""
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_LOGIN = "gcloud auth application-default login"
_FIELDS = "name,size,generation,contentEncoding"
_COMPRESSED_NAMES = (".gz", ".tgz", ".zst", ".br", ".bz2", ".xz")


class GcsStore:
    """A `gemma_mlx.data.remote.stores.Store` over Google's client; its own retries are turned off, ours hold."""

    def __init__(self, policy: RetryPolicy | None = None):
        self.policy = policy or RetryPolicy()
        self._timeout = (self.policy.connect_timeout, self.policy.read_timeout)
        self._local = threading.local()

    def _bucket(self, name: str) -> Any:
        """A bucket of this thread's client: Google's HTTP session is not made for several threads, nor for a fork."""
        host = os.environ.get("STORAGE_EMULATOR_HOST", "")
        key = (os.getpid(), host)
        if getattr(self._local, "key", None) != key:
            self._local.client, self._local.key = _new_client(emulated=bool(host)), key
        return self._local.client.bucket(name)

    def stat(self, url: str) -> Stat:
        """See `Store`."""
        bucket, name = split_name(url)

        def ask() -> Stat:
            with _told_errors(url, self.policy):
                blob = self._bucket(bucket).blob(name)
                blob.reload(timeout=self._timeout, retry=None)
                return _stat_of(blob, url)

        return retried(ask, self.policy, url)

    def read(self, url: str, stat: Stat | None = None, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Store`; a whole object is compared with its CRC32C when its last byte has come.

        Raises:
            SourceError: also where the checksum differs: then the bytes given out before are not to be used.
        """
        pinned = stat if stat and stat.size is not None and stat.version.isdecimal() else self.stat(url)
        reading = _Reading(self, url, pinned, start, end)
        yield from resumed(reading.chunks, start, self.policy, url)
        reading.check_sum()

    def list(self, pattern: str) -> Iterator[tuple[str, Stat]]:
        """See `Store`; names that end in a slash are folders' marks and left out."""
        bucket, glob = split_name(pattern, whole=False)
        prefix = re.match(r"[^*?\[]*", glob).group()
        matches = re.compile(_regex(glob) if prefix != glob else re.escape(prefix) + ".*", re.DOTALL).fullmatch
        token = None
        while True:
            page, token = retried(lambda token=token: self._page(bucket, prefix, token), self.policy, pattern)
            for blob in page:
                if matches(blob.name) and not blob.name.endswith("/"):
                    url = f"gs://{bucket}/{blob.name}"
                    yield url, _stat_of(blob, url)
            if token is None:
                return

    def _page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Any], str | None]:
        """Objects of one page, in the order of their names, and the next page's token."""
        with _told_errors(f"gs://{bucket}/{prefix}", self.policy):
            found = self._bucket(bucket)
            pages = found.client.list_blobs(
                found,
                prefix=prefix,
                page_token=token,
                page_size=PAGE,
                fields=f"items({_FIELDS}),nextPageToken",
                timeout=self._timeout,
                retry=None,
            )
            return list(next(pages.pages, ())), pages.next_page_token

    def window(self, url: str, generation: str, start: int, stop: int, sink: _Sink) -> Any:
        """Downloads [start, stop) into a sink; returns the blob, which knows the answer's head."""
        bucket, name = split_name(url)
        try:
            with _told_errors(url, self.policy):
                blob = self._bucket(bucket).blob(name)
                blob.download_to_file(
                    sink,
                    start=start,
                    end=stop - 1,
                    raw_download=True,  # never unpacked on the way: sizes and ranges are those of the object
                    if_generation_match=int(generation),
                    timeout=self._timeout,
                    checksum=None,
                    retry=None,
                )
                return blob
        except _OtherVersionError:
            raise _changed(url, generation, self._version_now(url)) from None

    def _version_now(self, url: str) -> str:
        try:
            return self.stat(url).version
        except InputError:
            return "gone"


class _OtherVersionError(InputError):
    """The object is not there, at least not in this version."""


class _Sink:
    """What Google's client writes to; it keeps what came before a failure."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, piece: bytes) -> int:
        self.data += piece
        return len(piece)


class _Reading:
    """One read of [start, end), window by window."""

    def __init__(self, store: GcsStore, url: str, pinned: Stat, start: int, end: int | None):
        import google_crc32c

        self._store, self._url, self._pinned = store, url, pinned
        self._size = pinned.size or 0
        self._stop = self._size if end is None else min(end, self._size)
        self._whole = start == 0 and self._stop == self._size
        self._sum, self._expected = google_crc32c.Checksum(), ""

    def chunks(self, at: int) -> Iterator[bytes]:
        """The bytes from `at`; gives out what came before a failure, then raises."""
        while at < self._stop:
            stop, sink, failure = min(at + WINDOW, self._stop), _Sink(), None
            try:
                blob = self._store.window(self._url, self._pinned.version, at, stop, sink)
                self._check(blob)
                if len(sink.data) < stop - at:
                    failure = TransientError("the answer ended early")
            except TransientError as e:
                failure = e
            if len(sink.data) > stop - at:
                raise SourceError(f"{self._url}: the server sent more bytes than were asked for; use another")
            for first in range(0, len(sink.data), CHUNK):
                piece = bytes(sink.data[first : first + CHUNK])
                if self._whole:
                    self._sum.update(piece)
                at += len(piece)
                yield piece
            if failure:
                raise failure

    def _check(self, blob: Any) -> None:
        """The server has compared generations; an emulator may not have."""
        if blob.generation is not None and str(blob.generation) != self._pinned.version:
            raise _changed(self._url, self._pinned.version, str(blob.generation))
        self._expected = blob.crc32c or self._expected

    def check_sum(self) -> None:
        """Compares a whole object's bytes with the server's checksum."""
        found = base64.b64encode(self._sum.digest()).decode()
        if self._whole and self._expected and found != self._expected:
            raise SourceError(
                f"{self._url} arrived damaged (CRC32C {found}, expected {self._expected}); start again; if "
                "this stays, upload the object again"
            )


def split_name(url: str, whole: bool = True) -> tuple[str, str]:
    """Bucket and name of ``gs://bucket/name``, which may hold any character.

    Args:
        whole: false where the name may be empty.

    Raises:
        InputError: it is not such a URL.
    """
    found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/(.*)", url, re.DOTALL | re.IGNORECASE)
    name = found.group(2) if found else ""
    if not found or (whole and not name) or re.search(r"[\x00-\x1f\x7f-\x9f]", name) or len(name.encode()) > 1024:
        raise InputError(f"{url!r} is no object of Cloud Storage; expected gs://bucket/name")
    return found.group(1).lower(), name


def _regex(glob: str) -> str:
    """A regular expression of a pattern with ``*``, ``?``, ``**`` and ``[…]``."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def one(found: re.Match[str]) -> str:
        token = found.group()
        if token in tokens:
            return tokens[token]
        if len(token) > 2 and token.startswith("["):
            inside = token[1:-1].replace("\\", "\\\\").replace("[", "\\[").replace("&", "\\&").replace("~", "\\~")
            return f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]"
        return re.escape(token)

    return re.sub(r"\*\*/|\*\*|[*?]|\[[!^]?[^]/]+\]|.", one, glob, flags=re.DOTALL)


@cache
def _credentials() -> Any:
    """The user's credentials, looked for once in a process; anonymous ones if there are none."""
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return google.auth.default(scopes=[_SCOPE])[0]
    except DefaultCredentialsError:
        given = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        if given:
            raise InputError(
                f"GOOGLE_APPLICATION_CREDENTIALS={given}: no credentials can be read there; correct it, or unset it "
                f"and run {_LOGIN}"
            ) from None
        return AnonymousCredentials()


def _new_client(emulated: bool) -> Any:
    from google.auth.credentials import AnonymousCredentials

    # Else newer versions ask for the bucket too, in a thread, with retries of their own, to describe traces.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.cloud import storage

    return storage.Client(project=None, credentials=AnonymousCredentials() if emulated else _credentials())


@contextmanager
def _told_errors(url: str, policy: RetryPolicy) -> Iterator[None]:
    """Turns the exceptions of Google's client into ours."""
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError, TransportError

    try:
        yield
    except GoogleAPICallError as e:
        raise _told_status(e, url) from None
    except GoogleAuthError as e:
        # Anonymous credentials cannot be renewed either: that is how an object says that it is not public.
        if e.retryable or isinstance(e, TransportError):
            raise TransientError("the login failed") from None
        raise InputError(f"{url}: credentials are needed, or they have expired; run {_LOGIN}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
        inner = e.args[0] if e.args and isinstance(e.args[0], Exception) else e
        raise TransientError(reason_of(getattr(inner, "reason", inner), policy)) from None


def _told_status(error: Any, url: str) -> Exception:
    status = int(error.code or 0)
    if status in RETRIED_STATUS:
        return TransientError(f"HTTP {status}", wait=_retry_after(error))
    if status in (404, 412):
        return _OtherVersionError(f"{url}: no such object; check the bucket and the name")
    if status in (401, 403):
        return InputError(
            f"{url}: no permission (HTTP {status}): credentials of an account that may read it are needed; run {_LOGIN}"
        )
    why = " ".join(str(error.message).split())
    kind = SourceError if status >= 500 else InputError
    return kind(f"{url}: Cloud Storage refuses (HTTP {status}: {why[:200]})")


def _retry_after(error: Any) -> float | None:
    headers = getattr(error.response, "headers", None) or {}
    seconds = headers.get("Retry-After", "")
    return float(seconds) if seconds.isdigit() else None


def _stat_of(blob: Any, url: str) -> Stat:
    encoding = blob.content_encoding or ""
    if encoding not in ("", "identity") and not blob.name.lower().endswith(_COMPRESSED_NAMES):
        raise InputError(
            f"{url} is stored compressed (Content-Encoding: {encoding[:20]}); upload it as it is, or with a name that "
            "ends in .gz"
        )
    return Stat(blob.size, str(blob.generation))


def _changed(url: str, before: str, now: str) -> SourceError:
    return SourceError(
        f"{url} changed during the run (generation {before} before, now {now}); start again, and leave it as it is"
    )
