"""Trying again where a server or a connection fails, and going on with a read from the byte where it broke."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from gemma_mlx.errors import SourceError

T = TypeVar("T")
log = logging.getLogger("gemma_mlx")
_JITTER = random.SystemRandom()  # a seed that somebody set is for other things, and processes must not wait alike

RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP answers that a later try may not get."""
_PROGRESS = 1 << 20
"""Bytes that must arrive before earlier failures are forgotten; else a server that breaks at every byte holds us."""


class TransientError(Exception):
    """A failure that another try may not meet; never leaves this package.

    Args:
        reason: for the message, such as ``HTTP 503``; without the URL.
        wait: seconds that the server asks for.
        known: false if this server has never answered, so that its name or port is perhaps wrong.
    """

    def __init__(self, reason: str, wait: float | None = None, known: bool = True):
        super().__init__(reason)
        self.reason, self.wait, self.known = reason, wait, known


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on trying while nothing arrives.

    Attributes:
        attempts: tries in a row; a server that has never answered gets 4 at most.
        first_wait: seconds after the first failure; doubled after each further one, then varied by half at random so
            that many readers do not come back at the same moment.
        longest_wait: seconds between two tries, also where a server asks for more.
        total: seconds from the first failure after which no further try is begun, after four at least.
        connect_timeout: seconds for a connection.
        read_timeout: seconds without a single byte.
    """

    attempts: int = 10
    first_wait: float = 0.5
    longest_wait: float = 30.0
    total: float = 300.0
    connect_timeout: float = 10.0
    read_timeout: float = 30.0


class Attempts:
    """Failures so far of one thing that is tried."""

    def __init__(self, policy: RetryPolicy, told: str):
        self._policy, self._told = policy, told
        self._arrived = 0
        self._forget()

    def _forget(self) -> None:
        self._failures, self._since = 0, 0.0

    def progress(self, size: int) -> None:
        """Notes that bytes arrived."""
        self._arrived += size
        if self._failures and self._arrived >= _PROGRESS:
            self._forget()

    def failed(self, error: TransientError) -> None:
        """Waits for the next try.

        Raises:
            SourceError: there was the last.
        """
        policy, now = self._policy, time.monotonic()
        self._failures, self._arrived = self._failures + 1, 0
        self._since = self._since or now
        wait = min(policy.first_wait * 2 ** (self._failures - 1), policy.longest_wait)
        wait *= 0.5 + _JITTER.random() / 2
        wait = min(max(wait, error.wait or 0.0), policy.longest_wait)
        tries = policy.attempts if error.known else min(policy.attempts, 4)
        # A machine that stood still between two tries has not tried for long.
        late = self._failures > 3 and now + wait > self._since + policy.total
        if self._failures >= tries or late:
            times = "once" if self._failures == 1 else f"{self._failures} times in {now - self._since:.0f} s"
            raise SourceError(
                f"{self._told}: the server failed, tried {times} ({error.reason}); check the address and the network, "
                "then start again"
            ) from None
        log.info("%s: %s; trying again in %.1f s", self._told, error.reason, wait)
        time.sleep(wait)


def retried(call: Callable[[], T], policy: RetryPolicy, told: str) -> T:
    """What `call` returns, called again after each `TransientError`.

    Raises:
        SourceError: it kept failing.
    """
    attempts = Attempts(policy, told)
    while True:
        try:
            return call()
        except TransientError as error:
            attempts.failed(error)


def resumed(opened: Callable[[int], Iterator[bytes]], start: int, policy: RetryPolicy, told: str) -> Iterator[bytes]:
    """The chunks of `opened(start)`; after each `TransientError`, those of `opened` at the byte where it broke.

    Raises:
        SourceError: it kept failing without progress.
    """
    attempts, at = Attempts(policy, told), start
    while True:
        try:
            with closing(opened(at)) as chunks:
                for chunk in chunks:
                    at += len(chunk)
                    attempts.progress(len(chunk))
                    yield chunk
            return
        except TransientError as error:
            attempts.failed(error)
