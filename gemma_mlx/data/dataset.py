"""Rows as a sequence of samples."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.batches import FEWEST_LOOKED_AT, MAX_BAD_ROWS, KnownBadRow
from gemma_mlx.data.buckets import TOKENS, of_sample
from gemma_mlx.data.examples import Example, Prompts
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.rows import Rows
from gemma_mlx.data.template import Sample
from gemma_mlx.data.walks import Shuffle, Walk
from gemma_mlx.errors import InputError, SourceError

CACHE_BYTES = 1 << 30
NO_SIZES = np.zeros(12, np.int32)
"""Of a bad row, which is in no batch."""
_MEASURERS = 4


class Dataset:
    """Rows, decoded when they are asked for.

    Unless told otherwise, opening looks at every row: it maps its columns, looks for its media (inside the data's
    folder and the media roots), for towers that read them and for control tokens in the text; no medium is decoded.
    Samples are kept in memory up to a limit, since small data are read again every epoch. Safe to read from several
    threads.

    Attributes:
        examples: the rows as `gemma_mlx.data.rows.Rows`.
        lengths, sizes: tokens of each row, and its line of `gemma_mlx.data.buckets`, once they have been counted.
        bad: row -> what is wrong with it, of the rows that are known to be bad; reading one raises it again.
        prefetch: told of a row that will be read soon; None where media are on this machine.

    Args:
        rows: a `Rows`, or what one is made of: a file, a folder, a URL, …; relative media paths start from its folder.
        processor: makes samples of examples.
        media_roots, columns, prompts, need_answer: as for `Rows`.
        cache_bytes: the most memory that kept samples may take; 0 keeps none.
        check: false to look at rows only when they are read.
        on_bad_row: "stop" at bad rows, or "skip" them: keep them in `bad`.
        max_bad_rows: the part of the rows that may be bad where they are skipped.

    Raises:
        InputError: naming file:line of the first bad row, and how many more there are; or that there are no rows.
    """

    def __init__(
        self,
        rows: Rows | str | Path,
        processor: Processor,
        media_roots: Iterable[str | Path] = (),
        columns: Mapping[str, str] | None = None,
        *,
        prompts: Prompts | None = None,
        need_answer: bool = True,
        cache_bytes: int = CACHE_BYTES,
        check: bool = True,
        on_bad_row: str = "stop",
        max_bad_rows: float = MAX_BAD_ROWS,
    ):
        if not isinstance(rows, Rows):
            rows = Rows(rows, media_roots, columns, prompts=prompts, need_answer=need_answer)
        self.examples, self.processor = rows, processor
        self.on_bad_row, self.max_bad_rows = on_bad_row, max_bad_rows
        _ = processor.tokenizer.control_tokens  # a missing tokenizer is no row's fault
        self.lengths: list[int] | None = None
        self.sizes: np.ndarray | None = None
        self.bad: dict[int, str] = {}
        self.prefetch: Callable[[int], None] | None = self._fetch if rows.remote_media() else None
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cache_bytes, self._cached, self._lock = cache_bytes, 0, threading.Lock()
        self._survey: Survey | None = None
        if check:
            self.look_at_all()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise KnownBadRow(self.bad[index])
        with self._lock:
            if (kept := self._cache.get(index)) is not None:
                self._cache.move_to_end(index)
                return kept
        with self.examples.staying(index):
            sample = self.processor.sample(self.examples[index])
        self._keep(index, sample)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def walk(self, seed: int, shuffle: bool = True) -> Walk:
        """The order of an epoch's rows."""
        return self.examples.walk(seed, shuffle)

    @property
    def seen(self) -> Dataset | Survey:
        """The rows that were measured: all of them, or some that stand for them."""
        return self if self._survey is None else self._survey

    def look_at_all(self) -> None:
        """Looks at every row, as described above.

        Raises:
            InputError: see above.
        """
        self._look_at_all(map(self._looked_at, range(len(self))))

    def measure_all(self, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> None:
        """Fills `lengths` and `sizes`: texts are rendered, headers of media are read.

        Raises:
            InputError: see `look_at_all`.
        """
        with ThreadPoolExecutor(_MEASURERS) as pool:
            found = progress(pool.map(self._measured, range(len(self))))
            self.sizes = np.stack(self._look_at_all(found))
        self.lengths = self.sizes[:, TOKENS].tolist()

    def measure(self, indices: Sequence[int]) -> list[int]:
        """Tokens of these rows, where not all are counted; 0 of bad ones, which are told when they are read."""
        for index in indices if self.prefetch else ():
            self.prefetch(index)
        with ThreadPoolExecutor(_MEASURERS) as pool:
            found = pool.map(self._measured, indices)
            return [0 if isinstance(sizes, InputError) else int(sizes[TOKENS]) for sizes in found]

    def look_at_some(self, count: int, seed: int = 0) -> None:
        """Measures the first rows of an epoch; they stand for the others, see `seen`.

        Raises:
            InputError: a bad row, or where they are skipped all of them.
        """
        chosen = [i for i, _ in zip(self.walk(seed).walk(0), range(count), strict=False)]
        with ThreadPoolExecutor(_MEASURERS) as pool:
            found = list(zip(chosen, pool.map(self._measured, chosen), strict=True))
        bad = [sizes for _, sizes in found if isinstance(sizes, InputError)]
        good = [(i, sizes) for i, sizes in found if not isinstance(sizes, InputError)]
        if bad and (self.on_bad_row != "skip" or not good):
            raise bad[0]
        chosen, sizes = zip(*good, strict=True)
        self._survey = Survey(Some(self.examples, chosen), np.stack(sizes), self.processor)

    def _looked_at(self, index: int) -> InputError | None:
        try:
            self.processor.check(self.examples[index])
        except SourceError:
            raise
        except InputError as error:
            return error
        return None

    def _measured(self, index: int) -> np.ndarray | InputError:
        if index in self.bad:
            return InputError(self.bad[index])
        try:
            with self.examples.staying(index):
                return of_sample(self.processor.sample(self.examples[index], with_features=False))
        except SourceError:
            raise
        except InputError as error:
            return error

    def _look_at_all(self, found: Iterable[Any]) -> list[Any]:
        """What was found of each row, in order; `NO_SIZES` for bad ones where they are skipped."""
        out, bad = [], {}
        for index, one in enumerate(found):
            if isinstance(one, InputError):
                bad[index] = one
            out.append(NO_SIZES if isinstance(one, InputError) else one)
        if not bad:
            return out
        first = next(iter(bad.values()))
        if self.on_bad_row != "skip":
            raise _with_count(first, len(bad) - 1)
        if len(bad) > self.max_bad_rows * max(len(out), FEWEST_LOOKED_AT) or len(bad) == len(out):
            raise InputError(
                f"{len(bad)} of {len(out)} rows are bad, more than {self.max_bad_rows:.0%} (--max-bad-rows); the first "
                f"one: {first}"
            )
        self.bad |= {index: str(error) for index, error in bad.items()}
        return out

    def _fetch(self, index: int) -> None:
        """Begins to fetch a row's media."""
        try:
            media = self.examples[index].media()
        except InputError:  # told when the row is read
            return
        for part in media:
            if hasattr(part.path, "url"):
                self.examples.fetcher.prefetch(part.path)

    def _keep(self, index: int, sample: Sample) -> None:
        """Keeps a sample, and lets the longest unused ones go to make room."""
        with self._lock:
            if sample.nbytes > self._cache_bytes or index in self._cache:
                return
            self._cache[index] = sample
            self._cached += sample.nbytes
            while self._cached > self._cache_bytes:
                self._cached -= self._cache.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class Some(Sequence[Example]):
    """Some of the rows, each read when it is asked for: what an example's media lie in may be let go meanwhile."""

    rows: Rows
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:
        return self.rows[self.chosen[index]]


@dataclass(frozen=True)
class Survey:
    """Some measured rows; attributes as of a `Dataset`."""

    examples: Some
    sizes: np.ndarray
    processor: Processor

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.sizes[:, TOKENS].tolist()

    @property
    def seen(self) -> Survey:
        """Itself."""
        return self

    def walk(self, seed: int, shuffle: bool = True) -> Walk:
        """The order of an epoch, if these were all rows."""
        return Shuffle(len(self), seed, shuffle)


def read_examples(
    source: Rows | str | Path,
    media_roots: Iterable[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    *,
    prompts: Prompts | None = None,
    need_answer: bool = True,
    check: Callable[[Example], None] | None = None,
    **options: Any,
) -> list[Example]:
    """All rows as examples; arguments and errors as `Rows` and `Dataset`, and `check` sees every example."""
    rows = source
    if not isinstance(source, Rows):
        rows = Rows(source, media_roots, columns, prompts=prompts, need_answer=need_answer, **options)
    examples: list[Example] = []
    first: InputError | None = None
    more = 0
    for index in range(len(rows)):
        try:
            examples.append(rows[index])
            if check is not None:
                check(examples[-1])
        except InputError as e:
            more += first is not None
            first = first or e
    if first is not None:
        raise _with_count(first, more)
    return examples


def _with_count(first: InputError, more: int) -> InputError:
    """The first bad row, and how many more there are."""
    return InputError(f"{first} ({more} more bad row{'s' if more != 1 else ''} in this file)" if more else str(first))
