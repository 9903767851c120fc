"""What a person sees while something takes time: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
LINE_SECONDS = 10.0
"""Where there is no terminal: seconds between lines about the same thing."""


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def megabytes(say: Reporter, what: str, total: int) -> Callable[[int], None]:
    """A function that is told of so many bytes more, and shows how many megabytes of `total` are done."""
    count, done = say.counter(f"megabytes {what}"), 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        count(max(1, done // 10**6), max(1, total // 10**6))

    return told


class Reporter:
    """Tells about a run's stages on stderr; ``quiet`` says nothing but warnings."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._told = 0.0
        self._started, self._first = time.monotonic(), 0

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line that is said even when quiet."""
        quiet, self.quiet = self.quiet, False
        self.say(f"warning: {text}")
        self.quiet = quiet

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A function of (done, total): after two seconds it shows them, on a terminal in place, elsewhere as lines."""
        started = told = time.monotonic()
        tty = sys.stderr.isatty() and not self.quiet

        def count(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if tty and done == total:
                print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            elif now - started > 2.0 and now - told > (0.2 if tty else LINE_SECONDS) and not self.quiet:
                told = now
                text = f"{what}: {done}/{total}, {duration((now - started) / done * (total - done))} left"
                print(f"\r\x1b[2K{text}" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)

        return count

    def each(self, items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
        """Pass items on, counted as by ``counter``."""
        count = self.counter(what)
        for i, item in enumerate(items):
            yield item
            count(i + 1, total)

    def begin(self, step: int, total: int) -> None:
        """Start the bar of training steps at ``step``."""
        self._started, self._first = time.monotonic(), step
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=step, told="")
        self._bar.start()

    def step(self, record: dict[str, Any], total: int) -> None:
        """One logged step, as in metrics.jsonl."""
        text = (
            f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, {record['peak_memory_gb']:.2f} GB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], told=text)
            return
        now, step = time.monotonic(), record["step"]
        if now - self._told >= LINE_SECONDS or step == total or step == self._first + 1:
            self._told = now
            left = (now - self._started) / max(step - self._first, 1) * (total - step)
            self.say(f"step {step}/{total}: {text}, {duration(left)} left")

    def end(self) -> None:
        """Take the bar down; it stays on the screen as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
