"""Rows side by side on a CPU: threads, each with an MLX stream of its own.

MLX runs the operations of a CPU stream one after the other, most of them on one core, and works on one evaluation of a
thread at a time; so only several threads with a stream each use several cores. An array that is not evaluated yet
belongs to the streams of the thread that made it: evaluate what goes in and what comes out.

MLX also bounds the operations under way over all streams together, so a lane whose long graph is queued starves the
others; ``in_pieces`` and ``pause`` keep the graphs of a lane short.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue
from threading import Thread, local
from typing import Any

import mlx.core as mx

Task = tuple[Future, Callable[..., Any], tuple[Any, ...]]
_here = local()
PART_TOKENS = 512
"""Positions that are worth a part of their own. Where rows are that long each is computed alone: no work is spent on
the padding that a longer neighbour needs, and no more parts are in memory than there are lanes."""


@contextmanager
def in_pieces() -> Iterator[None]:
    """In a lane, ``pause`` evaluates within the block. Nothing may be traced in it: MLX refuses to compile an eval."""
    _here.pausing = getattr(_here, "lane", False)
    try:
        yield
    finally:
        _here.pausing = False


def pause(x: mx.array) -> mx.array:
    """``x``; evaluated first in a lane's ``in_pieces``, elsewhere untouched."""
    if getattr(_here, "pausing", False):
        mx.eval(x)
    return x


class Lanes:
    """``count`` threads that take calls until the interpreter ends."""

    def __init__(self, count: int):
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"lane {i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)

    def map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """``function`` of each row of arguments, in order; the first error is raised once all have ended."""
        return list(self.each(function, *arguments))

    def each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> Iterator[Any]:
        """``map`` that hands out each result, in order, as soon as it is there, and keeps none."""
        futures = deque(Future() for _ in arguments[0])
        for future, row in zip(futures, zip(*arguments, strict=True), strict=True):
            self._tasks.put((future, function, row))
        try:
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.exception()

    def _work(self) -> None:
        mx.set_default_stream(mx.new_stream(mx.default_device()))
        _here.lane = True
        while task := self._tasks.get():
            future, function, row = task
            try:
                future.set_result(function(*row))
            except BaseException as error:
                future.set_exception(error)
            del task, future, function, row  # a waiting thread holds no arrays
        mx.clear_streams()  # a stream that outlives its thread aborts the process at its end

    def _end(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()


def edges(count: int, lanes: int) -> list[int]:
    """0, …, ``count``: where to cut so many things into ``lanes`` runs of nearly equal length."""
    return [count * lane // lanes for lane in range(lanes + 1)]


@cache
def shared(count: int) -> Lanes:
    """The process's own ``count`` lanes, the same ones at every call."""
    return Lanes(count)
