"""How much may be made ahead."""

from __future__ import annotations

import threading


class Budget:
    """Lets workers make things one after another while what is made, and not yet taken, stays within a limit.

    How large a thing will be is not known before it is made: the largest so far is assumed, and the first is made
    alone. So the limit is kept but for what a thing is larger than all before it; and the thing that is taken next is
    always made, however large, since nothing could go on without it.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int):
        self.limit, self.peak = limit, 0
        self._held = self._running = self._largest = self._begun = 0
        self._closed, self._changed = False, threading.Condition()

    def begin(self, number: int) -> None:
        """Waits until thing `number` (0, 1, … in the order of taking) may be made.

        Raises:
            RuntimeError: closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may(number))
            if self._closed:
                raise RuntimeError("closed")
            self._running, self._begun = self._running + 1, self._begun + 1
            self._changed.notify_all()

    def _may(self, number: int) -> bool:
        if number != self._begun:  # in their order, so that what is held never waits for what is not
            return False
        if not (self._running or self._held):
            return True
        return bool(self._largest) and self._held + (self._running + 1) * self._largest <= self.limit

    def end(self, nbytes: int) -> None:
        """A thing is made and takes so many bytes."""
        with self._changed:
            self._running -= 1
            self._held += nbytes
            self._largest, self.peak = max(self._largest, nbytes), max(self.peak, self._held)
            self._changed.notify_all()

    def take(self, nbytes: int) -> None:
        """The next thing, of so many bytes, was taken."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits stops waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
