"""Work done ahead in threads, given out in order, with a bound on how far ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
BLOCK = 16
"""Rows handed to a thread at a time: fewer would cost more in handing over than a row of text takes to read."""


def default_workers() -> int:
    """Threads where the user names no number."""
    return max(1, min(8, os.cpu_count() or 1))


def in_order(work: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """``work(0)`` … ``work(count - 1)`` in this order, at most 3 blocks a thread ahead of what was taken.

    What `work` raises is raised here, and whatever ends the iteration early stops the threads after the row at hand.
    """
    stop = threading.Event()

    def block(start: int) -> list[Result]:
        return [work(i) for i in range(start, min(start + BLOCK, count)) if not stop.is_set()]

    with ThreadPoolExecutor(workers, "prepare") as pool:
        ahead: deque[Future[list[Result]]] = deque()
        try:
            for start in range(0, count, BLOCK):
                ahead.append(pool.submit(block, start))
                if len(ahead) >= 3 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
