"""One training step: batch in, gradients of the adapter out, compiled where it can be.

The functions that are compiled take everything that changes as arguments (adapter weights, arrays of the batch, the
dropout key) and have no hidden state. What needs concrete values (where the soft tokens lie, which positions have a
label) is counted in numpy beforehand and passed as index arrays of few lengths.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.errors import InputError
from gemma_mlx.lora import dropout_keys, lora_layers, lora_parameters
from gemma_mlx.loss import label_positions, loss_sum
from gemma_mlx.models.media import MEDIA, module_names, soft_token_counts, soft_token_index
from gemma_mlx.optim import Weights, adamw_update, clip_by_norm

COMPILE_VARIABLE = "GEMMA_MLX_COMPILE"
"""``off`` runs every step uncompiled."""
SOFT_BUCKET = 64
"""Soft-token lists are padded to a multiple of this in compiled steps."""

Arrays = dict[str, mx.array]
_MEDIA = {kind: (*names, f"{kind}_index") for kind, names in MEDIA.items()}
_VISION_TYPES = (1, 2)


@dataclass
class Prepared:
    """A batch as the step takes it: MLX arrays, and what was counted on the way."""

    arrays: Arrays
    labels: int
    tokens: int
    rows: int


@dataclass
class Sums:
    """Of one or more batches: loss and correct argmaxes (lazy float32 scalars), label positions, tokens."""

    loss: Any = 0.0
    correct: Any = 0.0
    labels: int = 0
    tokens: int = 0

    def add(self, loss: Any, correct: Any, counted: Prepared | Sums) -> None:
        """Add one batch's."""
        self.loss, self.correct = self.loss + loss, self.correct + correct
        self.labels, self.tokens = self.labels + counted.labels, self.tokens + counted.tokens


def add(a: Weights, b: Weights) -> Weights:
    """Sums by name."""
    return {name: value + b[name] for name, value in a.items()}


def can_compile() -> bool:
    """Whether MLX can compile here: on a GPU always, on a CPU it calls a C++ compiler."""
    return mx.default_device().type == mx.gpu or bool(shutil.which("g++") or shutil.which("clang++"))


def should_compile() -> bool:
    """Whether steps are compiled: on a GPU by default. On a CPU a minute of g++ is not earned back by a short run, so
    there only if asked for. The environment's ``on`` or ``off`` decides where it is set."""
    asked = os.environ.get(COMPILE_VARIABLE, "").lower()
    return can_compile() if asked == "on" else asked != "off" and mx.default_device().type == mx.gpu


def split(batch: Batch, lanes: int, spec: Any) -> list[Batch]:
    """The batch as up to ``lanes`` batches of consecutive rows, each with its own media."""
    rows = len(batch.input_ids)
    lanes = min(lanes, rows)
    if lanes <= 1:
        return [batch]
    edges = [rows * i // lanes for i in range(lanes + 1)]
    given = {kind: _placing(batch, kind) for kind in MEDIA}
    soft = {kind: None if a is None else soft_token_counts(spec, kind, a) for kind, a in given.items()}
    cuts = {kind: _media_edges(batch, counts, kind, edges, spec) for kind, counts in soft.items()}
    return [_rows(batch, i, edges, cuts) for i in range(lanes)]


def _placing(batch: Batch, kind: str) -> np.ndarray | None:
    """The array that tells a medium's values from padding; the values themselves where nothing is padded."""
    values, where = (getattr(batch, name) for name in MEDIA[kind])
    return values if where is None else where


def _media_edges(batch: Batch, counts: np.ndarray | None, kind: str, edges: list[int], spec: Any) -> list[int]:
    """How many media of a kind lie in the rows before each edge."""
    if counts is None:
        return [0] * len(edges)
    slots = (batch.input_ids == getattr(spec, f"{kind}_token_id")).sum(1)
    ends = np.cumsum(counts)
    return [int(np.searchsorted(ends, slots[:edge].sum(), side="right")) if edge else 0 for edge in edges]


def _rows(batch: Batch, lane: int, edges: list[int], cuts: dict[str, list[int]]) -> Batch:
    rows = slice(edges[lane], edges[lane + 1])
    parts: dict[str, Any] = {"row_ids": batch.row_ids[rows]}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        parts[name] = getattr(batch, name)[rows]
    for kind, (first, second, _) in _MEDIA.items():
        a, b = cuts[kind][lane : lane + 2]
        if a < b:
            parts |= {n: array[a:b] for n in (first, second) if (array := getattr(batch, n)) is not None}
    return Batch(**parts)


def _padded(index: np.ndarray, multiple: int) -> np.ndarray:
    """``index`` filled up with its last value to a multiple; the extra soft tokens are never spliced."""
    return np.pad(index, (0, -len(index) % multiple), mode="edge") if len(index) else index


def prepare(batch: Batch, spec: Any, bucket: int = 1) -> Prepared:
    """Count, check and move a batch to MLX arrays.

    Raises InputError where the number of slots in ``input_ids`` differs from the soft tokens that the media give.
    """
    arrays: dict[str, np.ndarray] = {"input_ids": batch.input_ids, **label_positions(batch.labels)}
    indices: dict[str, np.ndarray] = {}
    if getattr(spec.text, "bidirectional_vision", False) and np.isin(batch.mm_token_type_ids, _VISION_TYPES).any():
        arrays["mm_token_type_ids"] = batch.mm_token_type_ids
    for kind, (values, where) in MEDIA.items():
        if getattr(batch, values) is not None:
            arrays |= {n: array for n in (values, where) if (array := getattr(batch, n)) is not None}
            indices[kind] = soft_token_index(spec, kind, _placing(batch, kind))
    for kind, token_id in ((kind, getattr(spec, f"{kind}_token_id")) for kind in MEDIA):
        slots, found = int((batch.input_ids == token_id).sum()), len(indices.get(kind, ()))
        if slots != found:
            rows = ", ".join(batch.row_ids[:4])
            raise InputError(f"{rows}: {slots} {kind} slots in the text, but the media give {found} soft tokens")
    arrays |= {f"{kind}_index": _padded(index, bucket) for kind, index in indices.items()}
    tokens = int(batch.attention_mask.sum())
    return Prepared({k: mx.array(v) for k, v in arrays.items()}, batch.label_count, tokens, len(batch.input_ids))


class Step:
    """The functions of one training step over a model with adapters.

    ``compiled`` defaults to ``should_compile()``. MLX runs a stream's operations on a CPU one after the other, so with
    ``lanes`` above 1 the rows of a batch are shared out to as many streams, which run side by side. Towers without an
    adapter are encoded by a function of their own, outside the one that is differentiated, where MLX's fused attention
    is available.
    """

    def __init__(self, model: Any, clip: float = 0.0, compiled: bool | None = None, lanes: int = 1):
        self.model = model
        self.streams = [mx.default_stream(mx.default_device())]
        self.streams += [mx.new_stream(mx.default_device()) for _ in range(lanes - 1)]
        self.layers = lora_layers(model)
        self.clip = clip
        self.dropout = any(layer.dropout for layer in self.layers.values())
        self.compiled = should_compile() if compiled is None else compiled
        adapted = [f"{path}." for path in self.layers]
        self.trained = {
            kind for kind in _MEDIA if any(f"{part}." in path for path in adapted for part in module_names(kind))
        }
        wrap: Callable[[Any], Any] = mx.compile if self.compiled else lambda f: f
        self._gradients = wrap(mx.value_and_grad(self._training_loss))
        self._evaluate = wrap(self._loss)
        self._apply = wrap(self._updated)
        self._encode = {kind: wrap(lambda arrays, kind=kind: self._soft_tokens(kind, arrays)) for kind in _MEDIA}

    def prepare(self, batch: Batch) -> Prepared:
        """``prepare`` with the padding that compiled steps need, soft tokens of frozen towers included."""
        ready = prepare(batch, self.model.spec, SOFT_BUCKET if self.compiled else 1)
        for kind, names in _MEDIA.items():
            if kind not in self.trained and names[0] in ready.arrays:
                ready.arrays[f"{kind}_soft_tokens"] = self._encode[kind](
                    {n: ready.arrays.pop(n) for n in names if n in ready.arrays}
                )
        return ready

    def gradients(self, weights: Weights, batch: Batch, key: mx.array) -> tuple[Weights, Sums]:
        """(gradients of the summed loss by tensor name, sums), lazy. ``key`` decides the dropout masks."""
        grads: Weights | None = None
        sums = Sums()
        for i, (stream, part) in enumerate(self._lanes(batch)):
            with mx.stream(stream):
                ready = self.prepare(part)
                lane_key = key if i == 0 else mx.random.split(key, i + 1)[i]
                (total, correct), more = self._call(self._gradients, weights, ready.arrays, lane_key)
            grads = more if grads is None else add(grads, more)
            sums.add(total, correct, ready)
        return grads, sums

    def evaluate(self, weights: Weights, batch: Batch) -> Sums:
        """Sums of a batch without dropout, lazy."""
        sums = Sums()
        for stream, part in self._lanes(batch):
            with mx.stream(stream):
                ready = self.prepare(part)
                total, correct = self._call(self._evaluate, weights, ready.arrays, None)
            sums.add(total, correct, ready)
        return sums

    def _lanes(self, batch: Batch) -> list[tuple[Any, Batch]]:
        parts = split(batch, len(self.streams), self.model.spec)
        return list(zip(self.streams, parts, strict=False))

    def apply(
        self, weights: Weights, moments: dict[str, Weights], grads: Weights, count: int, scalars: mx.array
    ) -> tuple[Weights, dict[str, Weights], mx.array]:
        """(new weights, new moments, gradient norm before clipping) from summed gradients over ``count`` labels."""
        return self._apply(weights, moments, grads, mx.array(1.0 / max(count, 1)), scalars)

    def install(self, weights: Weights) -> None:
        """Put adapter tensors into the model's layers."""
        for path, layer in self.layers.items():
            for name in layer.TENSORS:
                layer[name] = weights[f"{path}.{name}"]

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call, then put the real weights back: tracing leaves its placeholders in the model."""
        held = lora_parameters(self.model)
        try:
            return function(*arguments)
        finally:
            self.install(held)

    def _loss(self, weights: Weights, arrays: Arrays, key: mx.array | None) -> tuple[mx.array, mx.array]:
        self.install(weights)
        with dropout_keys(list(self.layers.values()), key if self.dropout else None):
            soft = {}
            for kind, names in _MEDIA.items():
                name = f"{kind}_soft_tokens"
                if name in arrays:
                    soft[name] = arrays[name]
                elif names[0] in arrays:
                    soft[name] = self._soft_tokens(kind, arrays)
            types = arrays.get("mm_token_type_ids")
            hidden = self.model.hidden(arrays["input_ids"], mm_token_type_ids=types, **soft)
            return loss_sum(self.model, hidden, arrays["positions"], arrays["targets"], arrays["weights"])

    def _training_loss(self, weights: Weights, arrays: Arrays, key: mx.array | None) -> tuple[mx.array, mx.array]:
        """The loss in train mode, in which Gemma 3n's AltUp bounds its coefficients."""
        mode = self.model.training
        self.model.train()
        try:
            return self._loss(weights, arrays, key)
        finally:
            self.model.train(mode)

    def _soft_tokens(self, kind: str, arrays: Arrays) -> mx.array:
        return self.model.model.soft_tokens(kind, *(arrays.get(name) for name in _MEDIA[kind]))

    def _updated(
        self, weights: Weights, moments: dict[str, Weights], grads: Weights, share: mx.array, scalars: mx.array
    ) -> tuple[Weights, dict[str, Weights], mx.array]:
        grads, norm = clip_by_norm({name: g * share for name, g in grads.items()}, self.clip)
        return *adamw_update(weights, moments, grads, scalars), norm
