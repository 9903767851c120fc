"""Where bytes far away come from: one store for each scheme of URL, all with the same three verbs.

``https://`` and ``http://`` are `gemma_mlx.data.remote.http`, ``gs://`` is `gemma_mlx.data.remote.gcs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from gemma_mlx.data.remote.addresses import redacted, scheme_of
from gemma_mlx.data.remote.retry import RetryPolicy
from gemma_mlx.errors import InputError


@dataclass(frozen=True, slots=True)
class Stat:
    """What a server says about an object before its bytes are read.

    Attributes:
        size: bytes; None where the server does not say.
        version: changes if the object does: the generation in Cloud Storage; over HTTP the ETag, else the date of the
            last change and the size; "" if nothing is known.
    """

    size: int | None
    version: str


class Store(Protocol):
    """Objects behind one scheme; safe to use from several threads and after a fork.

    Every method tries again by itself, within its `RetryPolicy`, where a server or connection fails.

    Raises (each method):
        InputError: there is no such object, no permission, or the URL is refused; names the URL.
        SourceError: the server keeps failing, or the object changed; names the URL.
    """

    def stat(self, url: str) -> Stat:
        """Size and version of an object."""

    def read(self, url: str, stat: Stat | None = None, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) of an object (cut at its end) in chunks of at most 1 MiB.

        With `stat`, an object of another version raises `SourceError`; without, the version that the first answer
        has is held to. A read that breaks goes on from the byte where it broke.
        """

    def list(self, pattern: str) -> Iterator[tuple[str, Stat]]:
        """Objects whose URL begins with `pattern`, or matches it if it has wildcards; sorted by name.

        ``*`` and ``?`` stay within one folder, ``**`` does not, ``[abc]`` is one of these characters.
        """


def store_of(url: str, allowed_hosts: Iterable[str] = (), policy: RetryPolicy | None = None) -> Store:
    """The store for a URL; the same one for the same arguments.

    Args:
        url: ``https://…``, ``http://…`` or ``gs://…``.
        allowed_hosts: ``host`` or ``host:port`` that the user named: only these may have private addresses.
        policy: how long to go on trying; None for the usual.

    Raises:
        InputError: another scheme.
    """
    scheme = scheme_of(url)
    if scheme not in ("http", "https", "gs"):
        what = f"{scheme}:" if scheme else "no scheme"
        raise InputError(f"{redacted(url)} ({what}) cannot be read; only https:// (http://) and gs:// URLs can")
    family = "gs" if scheme == "gs" else "http"
    return _store(family, frozenset(allowed_hosts), policy or RetryPolicy())


@lru_cache(maxsize=64)
def _store(family: str, allowed_hosts: frozenset[str], policy: RetryPolicy) -> Store:
    if family == "gs":
        from gemma_mlx.data.remote.gcs import GcsStore

        return GcsStore(policy)
    from gemma_mlx.data.remote.http import HttpStore

    return HttpStore(allowed_hosts, policy)
