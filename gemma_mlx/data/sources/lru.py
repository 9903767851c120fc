"""Values that are costly to make, kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLru(Generic[T]):
    """Keeps values up to a number of bytes, the one used last always; the longest unused go first.

    Safe to use from several threads: of those that want the same value at once, one makes it and the others wait.
    """

    def __init__(self, most: int, size: Callable[[T], int]):
        self._most, self._size = most, size
        self._kept: OrderedDict[Hashable, Future[T]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key; what `make` raises goes to all who wait, and the next one tries again."""
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = Future()
            else:
                self._kept.move_to_end(key)
        if mine:
            self._make(key, future, make)
        return future.result()

    def _make(self, key: Hashable, future: Future[T], make: Callable[[], T]) -> None:
        try:
            value = make()
        except BaseException as e:
            with self._lock:
                del self._kept[key]
            future.set_exception(e)
            return
        with self._lock:
            self._sizes[key] = self._size(value)
            for old in [other for other in self._kept if other != key and other in self._sizes]:
                if sum(self._sizes.values()) <= self._most:
                    break
                del self._kept[old], self._sizes[old]
        future.set_result(value)
