"""The next batch laid out while the current step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gemma_mlx.batch import Batch
from gemma_mlx.data.batches import Batches


class Ahead:
    """``Batches`` whose next batch ``make`` has already been called on, in a thread of its own.

    What it does ahead can be seen only in time: ``state`` names the batch after the last one handed out, and an error,
    of reading or of ``make``, is raised where its batch would have come.
    """

    def __init__(self, batches: Batches, make: Callable[[Batch], Any]):
        self.batches, self.make = batches, make
        self._state = batches.state()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: Future[tuple[Any, dict[str, int]]] | None = None

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.batches)

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        if self._pool is None or self._coming is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
            self._coming = self._pool.submit(self._one)
        try:
            made, self._state = self._coming.result()
        except BaseException:
            self.close()
            raise
        self._coming = self._pool.submit(self._one)
        return made

    def _one(self) -> tuple[Any, dict[str, int]]:
        return self.make(next(self.batches)), self.batches.state()

    def state(self) -> dict[str, int]:
        """Where the next batch starts, as ``Batches.state``."""
        return self._state

    def seek(self, state: dict[str, int]) -> None:
        """Go on from a ``state``."""
        self.close()
        self.batches.seek(state)
        self._state = self.batches.state()

    def close(self) -> None:
        """Stops the threads and forgets what was made ahead; the next batch starts them again from ``state``."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._coming = None
        self.batches.seek(self._state)
