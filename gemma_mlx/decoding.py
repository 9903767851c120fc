"""Rows of tokens that grow: prompts are read, tokens chosen, rows that end make place for others.

A step is asked for before the tokens of the one before it are looked at, so that the device need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from gemma_mlx import machine
from gemma_mlx.batch import Batch
from gemma_mlx.lanes import edges, in_pieces, shared
from gemma_mlx.models.cache import Cache
from gemma_mlx.models.label_rows import LabelRows, label_rows
from gemma_mlx.models.media import MEDIA
from gemma_mlx.models.padding import chosen_by_model

PART = {"gpu": 2048, "cpu": 512}
"""Columns of a prompt that are read at once: what is in memory besides keys and values grows with it."""
VISION = (1, 2)
"""Token types of pictures and of frames."""


class Choose(Protocol):
    """What chooses the tokens of a batch: called with float32 logits [B, V], told which rows stay and come."""

    def __call__(self, logits: mx.array, /) -> mx.array: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def join(self, other: Any) -> None: ...


@dataclass(frozen=True)
class Stateless:
    """A function of logits alone."""

    choose: Callable[[mx.array], mx.array]

    def __call__(self, logits: mx.array) -> mx.array:
        return self.choose(logits)

    def keep(self, rows: Sequence[int]) -> None:
        """Rows are all the same to it."""

    def join(self, other: Any) -> None:
        """Rows are all the same to it."""


@dataclass
class Row:
    """One answer as it grows.

    Attributes:
        index: whose it is.
        prompt_tokens: of its prompt.
        most: tokens at most.
        ends: tokens that end it, and are no part of it.
        ids: so far.
        finish: "stop" or "length" once it has ended, else "".
        watch: called with each token; true ends the answer with it.
    """

    index: int
    prompt_tokens: int
    most: int
    ends: frozenset[int]
    watch: Callable[[int], bool] | None = None
    ids: list[int] = field(default_factory=list)
    finish: str = ""

    def take(self, token: int) -> None:
        """One more token."""
        if token in self.ends:
            self.finish = "stop"
            return
        self.ids.append(token)
        if self.watch is not None and self.watch(token):
            self.finish = "stop"
        elif len(self.ids) >= self.most:
            self.finish = "length"


class Running:
    """Rows under way: one column further at each step.

    Args:
        rows: those of the batch that was read.
        cache: with their prompts.
        choose: what chooses their tokens.
        logits: [B, V] behind the prompts.

    Attributes:
        fed: the tokens of each step that the cache holds, since rows last changed.
    """

    def __init__(self, model: Any, rows: list[Row], cache: Cache, choose: Choose, logits: mx.array):
        self.model, self.rows, self.cache, self.choose = model, rows, cache, choose
        self.fed: list[list[int]] = []
        self.tokens = choose(logits)
        mx.async_eval(self.tokens)

    def step(self) -> list[Row]:
        """Give each row its next token; returns those that ended, which leave."""
        now, ahead = self.tokens, None
        if any(len(row.ids) + 1 < row.most for row in self.rows):
            ahead = self._following(now)
            mx.async_eval(ahead)
        given = now.tolist()
        if ahead is not None:
            self.fed.append(given)
        for row, token in zip(self.rows, given, strict=True):
            row.take(token)
        ended = [row for row in self.rows if row.finish]
        self.tokens = ahead
        if ended:
            self._keep([i for i, row in enumerate(self.rows) if not row.finish])
        return ended

    def _following(self, tokens: mx.array) -> mx.array:
        with chosen_by_model():
            hidden = self.model.hidden(input_ids=tokens[:, None], cache=self.cache)
        return self.choose(self.model.logits(hidden[:, -1]))

    def _keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[i] for i in rows]
        if not rows:
            return
        self.fed.clear()  # else it would grow as long as rows come and go
        self.cache.keep(rows)
        self.choose.keep(rows)
        self.tokens = self.tokens[mx.array(np.array(rows, np.int32))]
        mx.async_eval(self.tokens, self.cache.arrays())

    def join(self, other: Running) -> None:
        """Take in the rows of another."""
        self.fed.clear()
        self.cache.join(other.cache)
        self.choose.join(other.choose)
        self.rows += other.rows
        self.tokens = mx.concatenate([self.tokens, other.tokens])
        mx.async_eval(self.tokens, self.cache.arrays())


def decode(start: Callable[[list[Any]], Running], waiting: Iterator[Any], batch_size: int) -> Iterator[Row]:
    """Rows as they end.

    Args:
        start: reads some prompts.
        waiting: the prompts.
        batch_size: rows at once. As soon as a quarter of the places are free, the next prompts take them.
    """
    running: Running | None = None
    while True:
        free = batch_size - (len(running.rows) if running else 0)
        if free >= max(1, batch_size // 4) and (fresh := list(islice(waiting, free))):
            begun = start(fresh)
            if running is None:
                running = begun
            else:
                running.join(begun)
        if running is None:
            return
        yield from running.step()
        running = running if running.rows else None


def read(model: Any, batch: Batch, cache: Cache, media: Sequence[Batch] | None = None) -> mx.array:
    """Bring a batch of prompts into the cache, and give the logits float32 [B, V] of what follows.

    Long prompts are read in parts of `PART` columns. Layers that share others' keys and values are asked for the last
    column alone.

    Args:
        batch: the prompts, padded on the right.
        cache: empty, or with what precedes them; rows are then without padding.
        media: where the media are, in the order of the batch; the batch itself by default. Media beside each other may
            be padded to a common size, which not every tower ignores.
    """
    moved = left_padded(batch)
    columns = moved.input_ids.shape[1]
    padding = columns - moved.attention_mask.sum(axis=1)
    if padding.any():
        cache.starts = padding
    soft = _Soft(model, moved, [batch] if media is None else media)
    types = (
        moved.mm_token_type_ids
        if getattr(model.spec.text, "bidirectional_vision", False)
        else np.zeros_like(moved.input_ids)
    )
    for start, stop in pairwise(cuts(types, PART[mx.default_device().type.name])):
        part = {
            name: getattr(moved, name)[:, start:stop] for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        hidden = model.hidden(**part, **soft.part(start, stop), cache=cache, labels=_last(*part["input_ids"].shape))
        if stop < columns:
            mx.eval(cache.arrays())
    return model.logits(hidden)


def cuts(types: np.ndarray, most: int) -> list[int]:
    """Where to cut columns of token types [B, T] into parts of about `most`: 0, …, T, never inside a row's picture."""
    columns = types.shape[1]
    vision = np.isin(types, VISION)
    inside = np.zeros(columns + 1, bool)
    inside[1:columns] = (vision[:, 1:] & vision[:, :-1]).any(axis=0)
    found = [0]
    while columns - found[-1] > most:
        fits = np.flatnonzero(~inside[found[-1] + 1 : found[-1] + most + 1])
        later = np.flatnonzero(~inside[found[-1] + 1 :])
        found.append(found[-1] + 1 + int(fits[-1] if fits.size else later[0]))
    return found if found[-1] == columns else [*found, columns]


def _last(rows: int, columns: int) -> LabelRows:
    """The last column of each row."""
    flat = np.arange(1, rows + 1) * columns - 1
    found = label_rows(flat, rows, (rows, columns))
    return LabelRows(mx.array(flat.astype(np.int32)), **{name: mx.array(value) for name, value in found.items()})


class _Soft:
    """The soft tokens of a batch's media, by the columns that they belong to."""

    def __init__(self, model: Any, batch: Batch, media: Sequence[Batch]):
        self._tokens: dict[str, mx.array] = {}
        found = [encoded(model, each.inputs()) for each in media]
        for name in {name for each in found for name in each}:
            self._tokens[name] = mx.concatenate([each[name] for each in found if name in each])
        ids, spec = batch.input_ids, model.spec
        self._slots = {name: ids == getattr(spec, name.replace("soft_tokens", "token_id")) for name in self._tokens}

    def part(self, start: int, stop: int) -> dict[str, mx.array]:
        """Those of the slots in columns `start` to `stop`, in reading order; whole where that is all."""
        chosen = {}
        for name, slots in self._slots.items():
            if slots[:, start:stop].sum() == slots.sum():
                chosen[name] = self._tokens[name]
            elif slots[:, start:stop].any():
                order = np.cumsum(slots.reshape(-1)).reshape(slots.shape) - 1
                index = order[:, start:stop][slots[:, start:stop]]
                chosen[name] = self._tokens[name][mx.array(index.astype(np.int32))]
        return chosen


def encoded(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, mx.array]:
    """Soft tokens of the media among the inputs, shared out to the threads that the machine can use."""
    soft: dict[str, list[mx.array]] = {}
    for names in ([n for n in pair if n in inputs] for pair in MEDIA.values()):
        if not names:
            continue
        count = len(inputs[names[0]])
        lanes = machine.lanes(count)
        parts = [{n: inputs[n][a:b] for n in names} for a, b in pairwise(edges(count, lanes))]
        for part in _side_by_side(model, parts) if lanes > 1 else [model.encode(**parts[0])]:
            for name, tokens in part.items():
                soft.setdefault(name, []).append(tokens)
    return {name: mx.concatenate(parts) for name, parts in soft.items()}


def _side_by_side(model: Any, parts: list[dict[str, np.ndarray]]) -> list[dict[str, mx.array]]:
    def encode(part: dict[str, np.ndarray]) -> dict[str, mx.array]:
        with in_pieces():
            tokens = model.encode(**part)
        mx.eval(tokens)
        return tokens

    mx.eval(model.parameters())
    return shared(len(parts)).map(encode, parts)


def left_padded(batch: Batch) -> Batch:
    """The same rows with their padding in front, so that every row's last position is its newest token."""
    width = batch.input_ids.shape[1]
    shifts = width - batch.attention_mask.sum(axis=1)

    def rolled(rows: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)])

    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
    return replace(batch, **{name: rolled(getattr(batch, name)) for name in names})
