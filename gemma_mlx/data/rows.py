"""Rows of all sources as examples, by number."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from gemma_mlx.data.blob import Blob
from gemma_mlx.data.examples import Example, Prompts, RowReader
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.opening import Shards, open_parts
from gemma_mlx.data.sources.table import Table, stretches
from gemma_mlx.data.tuner.layout import PatchedTable, patching
from gemma_mlx.data.walks import SHARD_BITS, SHARDS, ByStretches, Mixture, Shuffle, Stream, Walk
from gemma_mlx.errors import InputError

OPEN_SHARDS = 2 * SHARDS
"""Shards that stay open, beside those that are in use."""
_LOOKED_AT = 16
"""Rows of each part that tell whether media lie far away."""
_ALONE = 1 << 8
"""Bytes that a row takes, roughly, where every row is read alone."""


class Rows:
    """What the user named as data: rows of one or several tables, each made an example when it is asked for.

    Rows are numbered through all tables in order; those of shards far away, which are counted only when they are
    reached, by shard and row (`gemma_mlx.data.walks.SHARD_BITS`). Safe to read from several threads.

    Args:
        source: see `gemma_mlx.data.sources.opening.open_parts`.
        media_roots: further places that media may lie in.
        columns: standard name -> column; see `gemma_mlx.data.examples`.
        prompts: what the user says in rows without a prompt.
        need_answer: false to accept rows without an answer, for prediction.
        fetcher: reads what lies far away; None where nothing may.
        split: of data sets that have several.
        lines: what is a row of plain text.
        patches: a folder of corrections; see `gemma_mlx.data.tuner`.
        language_mode: see `gemma_mlx.data.tuner.languages`.

    Raises:
        InputError: nothing there, or not in order.
    """

    def __init__(
        self,
        source: str | Path,
        media_roots: Iterable[str | Path] = (),
        columns: Mapping[str, str] | None = None,
        *,
        prompts: Prompts | None = None,
        need_answer: bool = True,
        fetcher: Any = None,
        split: str = "train",
        lines: str = "line",
        patches: str | None = None,
        language_mode: str | None = None,
    ):
        self.source, self.fetcher = str(source), fetcher
        self._roots, self._columns = list(media_roots), dict(columns or {})
        self._prompts, self._need_answer = prompts or Prompts(), need_answer
        self._patched = patching(patches, language_mode)
        parts = open_parts(self.source, fetcher, split=split, lines=lines)
        streams = [part for part in parts if isinstance(part.tables, Shards)]
        if streams and len(parts) > 1:
            raise InputError(f"{source}: shards far away cannot be mixed with other data; fetch them first")
        if streams and streams[0].weight != 1:
            raise InputError(f"{source}: shards far away have no weight; fetch them first")
        self._shards: Shards | None = streams[0].tables if streams else None
        self._shard_options = streams[0].options if streams else {}
        self._open: OrderedDict[int, Future[tuple[Table, RowReader]]] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._parts = [] if streams else parts
        self._tables = [self._with_reader(t, part.options) for part in self._parts for t in part.tables]
        self._first = [0, *accumulate(len(table) for table, _ in self._tables)]
        if not streams and not self._first[-1]:
            if any(len(part) for of_part in parts for part in of_part.tables):
                raise InputError(f"{source}: the corrections leave no row; see {patches}")
            raise InputError(f"{source}:2: no rows below the header; add at least one")

    def _with_reader(self, table: Table, options: Mapping[str, Any]) -> tuple[Table, RowReader]:
        mapping = {**self._columns, **options.get("columns", {})}
        table = self._patched(table, mapping)
        folders = Folders(table.base, [*options.get("media_root", ()), *self._roots], self.fetcher)
        return table, RowReader(table.columns, folders, table.name, mapping, self._prompts, self._need_answer)

    @property
    def n(self) -> int | None:
        """How many there are; None for shards far away."""
        return None if self._shards else self._first[-1]

    def __len__(self) -> int:
        if self.n is None:
            raise InputError(
                f"{self.source}: how many rows these shards hold is known when they are read; leave out --check all"
            )
        return self.n

    def __getitem__(self, index: int) -> Example:
        if self._shards:
            with self.staying(index):
                table, reader = self._shard(index >> SHARD_BITS)
                return reader.example(table[index & (1 << SHARD_BITS) - 1])
        table, reader, at = self._place(index)
        return reader.example(table[at])

    def _place(self, index: int) -> tuple[Table, RowReader, int]:
        """(table, its reader, the row's number in it)."""
        if not 0 <= index < self._first[-1]:
            raise IndexError(index)
        at = bisect_right(self._first, index) - 1
        return *self._tables[at], index - self._first[at]

    def cells(self, index: int) -> tuple[str, dict[str, Any]]:
        """(the table's name, column -> cell) of a row, under the table's own names and, where those are mapped, the
        standard ones; of rows that are counted."""
        table, reader, at = self._place(index)
        return table.name, reader.cells(table[at])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @contextmanager
    def staying(self, index: int) -> Iterator[None]:
        """As long as this is open, what a row's media are read from stays."""
        if not self._shards:
            yield
            return
        shard = index >> SHARD_BITS
        with self._lock:
            self._users[shard] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[shard] -= 1
                self._let_go()

    def _shard(self, shard: int) -> tuple[Table, RowReader]:
        """One thread opens it, others that want it wait."""
        with self._lock:
            mine = shard not in self._open
            found = self._open.setdefault(shard, Future())
            self._open.move_to_end(shard)
        if mine:
            try:
                opened = self._with_reader(self._shards.open(self._shards.names[shard]), self._shard_options)
            except BaseException as error:
                with self._lock:
                    del self._open[shard]
                found.set_exception(error)
                raise
            with self._lock:
                self._counts[shard] = len(opened[0])
                found.set_result(opened)
                self._let_go()
        return found.result()

    def _let_go(self) -> None:
        """Closes shards that nobody uses, the longest unused first, but never the last one that was asked for."""
        idle = [shard for shard in list(self._open)[:-1] if self._open[shard].done() and not self._users[shard]]
        for shard in idle[: max(0, len(self._open) - OPEN_SHARDS)]:
            del self._open[shard], self._users[shard]
            self._shards.close(self._shards.names[shard])

    def count(self, shard: int) -> int:
        """Rows of a shard, which is fetched if they have not been counted yet."""
        if shard not in self._counts:
            self._shard(shard)
        return self._counts[shard]

    def _fetch(self, shard: int) -> None:
        """Begins to fetch a shard."""
        if shard not in self._open:
            self._shards.fetch(self._shards.names[shard])

    def walk(self, seed: int = 0, shuffle: bool = True) -> Walk:
        """The order of an epoch's rows, as the sources allow: any, or within few stretches of a table at a time."""
        if self._shards:
            return Stream(len(self._shards.names), self.count, seed, shuffle, ahead=self._fetch)
        if not shuffle:
            return Shuffle(len(self), seed, False)
        if all(part.weight == 1 for part in self._parts):
            return _walk([table for table, _ in self._tables], seed)
        tables = iter(table for table, _ in self._tables)
        walks = [_walk([next(tables) for _ in part.tables], seed + i) for i, part in enumerate(self._parts)]
        return Mixture(walks, [part.weight for part in self._parts], seed)

    def fingerprint(self) -> str:
        """A digest of what the rows are, as `gemma_mlx.data.sources.table.Table.fingerprint`."""
        if len(self._tables) == 1:
            return self._tables[0][0].fingerprint()
        each = [*self._shards.names] if self._shards else [table.fingerprint() for table, _ in self._tables]
        if any(part.weight != 1 for part in self._parts):
            each += [f"{len(part.tables)} of weight {part.weight}" for part in self._parts]
        return hashlib.sha256("\n".join(each).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What corrections did to the rows, a line each."""
        return [line for table, _ in self._tables if isinstance(table, PatchedTable) for line in table.report()]

    def remote_media(self) -> bool:
        """Whether the first rows' media are fetched from elsewhere; a row that is not in order says nothing."""
        if self._shards:
            return False
        tables = iter(zip(self._tables, self._first, strict=False))
        for part in self._parts:
            firsts = [range(first, first + len(table)) for (table, _), first in islice(tables, len(part.tables))]
            for i in islice(chain(*firsts), _LOOKED_AT):
                try:
                    media = self[i].media()
                except InputError:
                    continue
                if any(isinstance(part.path, Blob) and hasattr(part.path, "url") for part in media):
                    return True
        return False


def _walk(tables: list[Table], seed: int) -> Walk:
    found = stretches(tables, _ALONE)
    return Shuffle(sum(map(len, tables)), seed) if found is None else ByStretches(*found, seed)
