"""A CSV file as a sequence of samples."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma_mlx.data.examples import Example, Prompts, RowReader
from gemma_mlx.data.places import Folders
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.sources.local import CsvRows
from gemma_mlx.data.template import Sample
from gemma_mlx.errors import InputError

CACHE_BYTES = 1 << 30


class Dataset:
    """Rows of a CSV, checked when it is opened, decoded when they are asked for.

    Opening reads the whole file, maps its columns and looks for every medium (inside the data folder and the media
    roots), for towers that read them and for control tokens in the text; no medium is decoded.
    Samples are kept in memory up to a limit, since small data are read again every epoch. Safe to read from several
    threads.

    Attributes:
        lengths, sizes: tokens of each row, and its line of `gemma_mlx.data.buckets`, once they have been counted.

    Args:
        path: the CSV; relative media paths start from its folder. See `gemma_mlx.data.examples` for the columns.
        processor: makes samples of examples.
        media_roots: further folders that media may lie in.
        columns: standard name -> column of the file.
        prompts: what the user says in rows without a prompt.
        need_answer: false to accept rows without an answer, for prediction.
        cache_bytes: the most memory that kept samples may take; 0 keeps none.

    Raises:
        InputError: naming file:line of the first bad row, and how many more there are; or that there are no rows.
    """

    def __init__(
        self,
        path: str | Path,
        processor: Processor,
        media_roots: Iterable[str | Path] = (),
        columns: Mapping[str, str] | None = None,
        *,
        prompts: Prompts | None = None,
        need_answer: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.path, self.processor = Path(path), processor
        _ = processor.tokenizer.control_tokens  # a missing tokenizer is no row's fault
        self.examples = read_examples(
            path, media_roots, columns, prompts=prompts, need_answer=need_answer, check=processor.check
        )
        self.lengths: list[int] | None = None
        self.sizes: np.ndarray | None = None
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cache_bytes, self._cached, self._lock = cache_bytes, 0, threading.Lock()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:
        with self._lock:
            if (kept := self._cache.get(index)) is not None:
                self._cache.move_to_end(index)
                return kept
        sample = self.processor.sample(self.examples[index])
        self._keep(index, sample)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _keep(self, index: int, sample: Sample) -> None:
        """Keeps a sample, and lets the longest unused ones go to make room."""
        with self._lock:
            if sample.nbytes > self._cache_bytes or index in self._cache:
                return
            self._cache[index] = sample
            self._cached += sample.nbytes
            while self._cached > self._cache_bytes:
                self._cached -= self._cache.popitem(last=False)[1].nbytes


def read_examples(
    path: str | Path,
    media_roots: Iterable[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    *,
    prompts: Prompts | None = None,
    need_answer: bool = True,
    check: Callable[[Example], None] | None = None,
) -> list[Example]:
    """All rows of a CSV as examples; arguments and errors as `Dataset`, and `check` sees every example."""
    source = CsvRows(path)
    folders = Folders(Path(path).parent, media_roots)
    reader = RowReader(source.columns, folders, str(path), columns or {}, prompts or Prompts(), need_answer)
    examples: list[Example] = []
    first: InputError | None = None
    more = 0
    for row in source:
        try:
            examples.append(reader.example(row))
            if check is not None:
                check(examples[-1])
        except InputError as e:
            more += first is not None
            first = first or e
    if first is not None:
        raise InputError(
            f"{first} ({more} more bad row{'s' if more != 1 else ''} in this file)" if more else str(first)
        )
    if not examples:
        raise InputError(f"{path}:2: no rows below the header; add at least one")
    return examples
