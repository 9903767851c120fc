"""Which rows are answered: a file that only grows, so that a killed evaluation goes on where it was.

The first line says what the answers depend on, each further line holds one finished chunk of rows: they are finished
together or not at all, so that what is left is always whole chunks, the same ones that an uninterrupted evaluation
would have made.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError

FORMAT = 1
Record = dict[str, Any]
"""What is kept of a row: its number ``i``, and what was found."""


class InMemory:
    """Finished rows that nobody else will see; as a `Ledger`."""

    def __init__(self) -> None:
        self.finished: dict[int, Record] = {}

    def add(self, chunk: Sequence[Record]) -> None:
        """Keep a finished chunk."""
        self.finished.update((record["i"], record) for record in chunk)


class Ledger(InMemory):
    """Finished rows of one evaluation; made by `opened`.

    Attributes:
        finished: row -> its record.
    """

    def __init__(self, file: Any, finished: dict[int, Record]):
        self._file, self.finished = file, finished

    def add(self, chunk: Sequence[Record]) -> None:
        """Write a finished chunk to the disk as one line."""
        self._file.write(json.dumps(chunk, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        super().add(chunk)


@contextmanager
def opened(path: Path, identity: Mapping[str, str], restart: bool = False) -> Iterator[Ledger]:
    """The ledger at ``path``, made if there is none.

    Args:
        path: the file; its folder exists.
        identity: what the answers depend on, by name, each as a digest or a value in words.
        restart: forget what was answered before.

    Raises:
        InputError: the ledger is of another evaluation, naming what differs; another process writes it; or it is
            damaged.
    """
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path}: another evaluation is writing into this folder; choose another --out") from None
        if restart:
            file.truncate(0)
        end, finished = _read(path, file, dict(identity))
        file.truncate(end)
        ledger = Ledger(file, finished)
        if not end:
            file.write(json.dumps({"format": FORMAT, "identity": dict(identity)}).encode() + b"\n")
            file.flush()
        yield ledger


def _read(path: Path, file: Any, identity: dict[str, str]) -> tuple[int, dict[int, Record]]:
    """(bytes of whole lines, finished rows); the last line may be torn, then its chunk is not finished."""
    file.seek(0)
    head = file.readline()
    if not head.endswith(b"\n"):
        return 0, {}
    _check(path, _parsed(path, head, 1), identity)
    end, finished = len(head), {}
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            break
        finished.update((record["i"], record) for record in _parsed(path, line, number))
        end += len(line)
    return end, finished


def _parsed(path: Path, line: bytes, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(f"{path}:{number}: damaged; start anew with --restart, or choose another --out") from None


def _check(path: Path, head: Any, identity: dict[str, str]) -> None:
    there = head.get("identity", {}) if isinstance(head, dict) and head.get("format") == FORMAT else None
    if there is None:
        raise InputError(f"{path}:1: not a list of finished rows that this version reads; start anew with --restart")
    names = [name for name in {**there, **identity} if there.get(name) != identity.get(name)]
    if names:
        told = ", ".join(_difference(name, there.get(name), identity.get(name)) for name in names)
        raise InputError(
            f"{path.parent}: its answers are of another evaluation ({told}); choose another --out, or answer all rows "
            "again with --restart"
        )


def _difference(name: str, there: str | None, here: str | None) -> str:
    """Digests are named alone, short values are told."""
    words = [value for value in (there, here) if value is not None]
    if any(len(word) > 40 for word in words):
        return f"other {name}"
    return f"{name} {'unset' if there is None else there}, now {'unset' if here is None else here}"
