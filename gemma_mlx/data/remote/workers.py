"""Threads that wait for servers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from gemma_mlx.errors import SourceError


class Workers:
    """A pool of daemon threads: a server that does not answer never holds the end of the process, as
    `concurrent.futures` would, which waits for its threads there.

    Args:
        count: threads at most, started as they are needed.
        name: what debuggers call them.
    """

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False

    def submit(self, call: Callable[..., Any], *args: Any) -> Future:
        """Has `call(*args)` made; a future that can be cancelled until then.

        Raises:
            SourceError: the pool is closed.
        """
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise SourceError("downloads were ended")
            self._tasks.put((future, call, args))
            if len(self._threads) < self._count:
                name = f"{self._name} {len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call, args = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*args))
            except BaseException as e:
                future.set_exception(e)
            del task, future, call, args  # nothing is kept alive while the thread waits

    def close(self, seconds: float) -> None:
        """Ends the threads, waiting no longer than that for what they are doing."""
        end = time.monotonic() + seconds
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


class Budget:
    """A number of bytes that several threads share; one thread alone may take more than all."""

    def __init__(self, size: int):
        self._size, self._taken = size, 0
        self._freed = threading.Condition()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free, and gives them back in the end."""
        with self._freed:
            self._freed.wait_for(lambda: not self._taken or self._taken + size <= self._size)
            self._taken += size
        try:
            yield
        finally:
            with self._freed:
                self._taken -= size
                self._freed.notify_all()
