"""A fetcher that is made when something far away is first named, so that local work leaves no cache behind."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class LazyFetcher:
    """Makes a `gemma_mlx.data.remote.fetch.Fetcher` when it is first used, and is it from then on.

    Args:
        named: what the user named as data and media roots: hosts of URLs among them may have private addresses.
        hosts: further such hosts.
        folder: the cache's; None for the default.
        limit_bytes: of the cache.
        run: the run's name, for the versions of objects that it has seen.
        resumed: false to forget what a run of this name has seen before.
    """

    def __init__(
        self, named: Iterable[str] = (), *, hosts: Iterable[str] = (), folder: str | Path | None = None,
        limit_bytes: int = 20 << 30, run: str = "", resumed: bool = False,
    ):  # fmt: skip
        self._named, self._hosts = list(named), list(hosts)
        self._folder, self._limit = folder, limit_bytes
        self._run, self._resumed = run, resumed
        self._made: Any = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetcher(), name)

    def _fetcher(self) -> Any:
        from gemma_mlx.data.remote.cache import Cache
        from gemma_mlx.data.remote.fetch import Fetcher, host_of

        with self._lock:
            if self._made is None:
                cache = Cache(None if self._folder is None else Path(self._folder), self._limit)
                if self._run and not self._resumed:
                    cache.forget(self._run)
                    self._resumed = True  # if one is made again, it is the same run
                named = [host_of(name) for name in self._named if name.startswith(("http://", "https://"))]
                self._made = Fetcher(cache, run=self._run, allowed_hosts=[*named, *self._hosts])
            return self._made

    def __enter__(self) -> LazyFetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is being fetched."""
        with self._lock:
            if self._made is not None:
                self._made.close()
                self._made.cache.close()
                self._made = None
