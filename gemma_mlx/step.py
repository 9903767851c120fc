"""One training step: batch in, gradients of what trains out, compiled where it can be.

The functions that are compiled take everything that changes as arguments (trained weights, arrays of the batch, the
dropout key) and have no hidden state. What needs concrete values (where the soft tokens lie, which positions have a
label) is counted in numpy beforehand and passed as index arrays of few lengths.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.errors import InputError
from gemma_mlx.flops import DecoderCost, Picked
from gemma_mlx.full import trained_places
from gemma_mlx.lanes import edges, shared
from gemma_mlx.lora import dropout_keys, lora_layers
from gemma_mlx.loss import POSITION_BUCKET, at_positions, label_positions, loss_sum
from gemma_mlx.models.label_rows import LabelRows, label_rows
from gemma_mlx.models.media import MEDIA, module_names, reads_padding, soft_token_counts, soft_token_index
from gemma_mlx.models.tables import tables_on_disk
from gemma_mlx.optim import Weights, clip_by_norm
from gemma_mlx.optimizers import OPTIMIZERS, Optimizer, State, update
from gemma_mlx.tower_cache import TowerCache

COMPILE_VARIABLE = "GEMMA_MLX_COMPILE"
"""``off`` runs every step uncompiled."""
SOFT_BUCKET = 64
"""Soft-token lists are padded to a multiple of this in compiled steps."""
WORTH_PICKING = 0.9
"""Layers above the line see label positions alone if that leaves at most this part of their FLOPs: below it gathering
rows and masks costs more than it saves."""

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
    """Sums by name, in float32."""
    return {name: value.astype(mx.float32) + b[name] for name, value in a.items()}


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
    at = edges(rows, lanes)
    given = {kind: placing(batch, kind) for kind in MEDIA}
    soft = {kind: None if a is None else soft_token_counts(spec, kind, a) for kind, a in given.items()}
    cuts = {kind: _media_edges(batch, counts, kind, at, spec) for kind, counts in soft.items()}
    return [_rows(batch, i, at, cuts) for i in range(lanes)]


def placing(batch: Batch, kind: str) -> np.ndarray | None:
    """The array that tells a medium's values from padding; the values themselves where nothing is padded."""
    values, where = (getattr(batch, name) for name in MEDIA[kind])
    return values if where is None else where


def _media_edges(batch: Batch, counts: np.ndarray | None, kind: str, at: list[int], spec: Any) -> list[int]:
    """How many media of a kind lie in the rows before each edge."""
    if counts is None:
        return [0] * len(at)
    slots = (batch.input_ids == getattr(spec, f"{kind}_token_id")).sum(1)
    ends = np.cumsum(counts)
    return [int(np.searchsorted(ends, slots[:edge].sum(), side="right")) if edge else 0 for edge in at]


def _rows(batch: Batch, lane: int, at: list[int], cuts: dict[str, list[int]]) -> Batch:
    rows = slice(at[lane], at[lane + 1])
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


def prepare(batch: Batch, spec: Any, frozen: dict[str, TowerCache] | None = None, bucket: int = 1) -> Prepared:
    """Count, check and move a batch to MLX arrays; media whose tower is frozen become that tower's outputs.

    Raises InputError where the number of slots in ``input_ids`` differs from the soft tokens that the media give.
    """
    arrays: Arrays = {"input_ids": mx.array(batch.input_ids)}
    places = label_positions(batch.labels, POSITION_BUCKET if bucket > 1 else 1)
    arrays |= {name: mx.array(value) for name, value in places.items()}
    if getattr(spec.text, "bidirectional_vision", False) and np.isin(batch.mm_token_type_ids, _VISION_TYPES).any():
        arrays["mm_token_type_ids"] = mx.array(batch.mm_token_type_ids)
    for kind, names in MEDIA.items():
        values, where = (getattr(batch, name) for name in names)
        index = np.zeros(0, np.int32) if values is None else soft_token_index(spec, kind, placing(batch, kind))
        slots = int((batch.input_ids == getattr(spec, f"{kind}_token_id")).sum())
        if slots != len(index):
            rows = ", ".join(batch.row_ids[:4])
            raise InputError(f"{rows}: {slots} {kind} slots in the text, but the media give {len(index)} soft tokens")
        if values is None:
            continue
        if frozen and kind in frozen:
            made = frozen[kind](values, where)
            arrays[f"{kind}_features"] = mx.pad(made, [(0, -len(index) % bucket), (0, 0)])
        else:
            arrays |= {name: mx.array(a) for name, a in zip(names, (values, where), strict=True) if a is not None}
            arrays[f"{kind}_index"] = mx.array(_padded(index, bucket))
    return Prepared(arrays, batch.label_count, int(batch.attention_mask.sum()), len(batch.input_ids))


class Step:
    """The functions of one training step over a model with adapters, or with modules that train in full.

    ``compiled`` defaults to ``should_compile()``. With ``lanes`` above 1 the rows of a batch are shared out to as many
    threads, which work side by side on a CPU (see ``gemma_mlx.lanes``). Towers in which nothing trains are encoded
    outside the function that is differentiated, where MLX's fused attention is available, and each medium only once
    while the cache holds it.

    With ``pick_labels``, the layers above the last one that owns keys and values see label positions alone, wherever
    that is exact (no dropout there) and saves FLOPs (``WORTH_PICKING``). ``recompute`` n: the gradient recomputes every
    n-th decoder layer; 0 none. ``chunked_loss`` as in ``gemma_mlx.loss.label_scores``. ``optimizer``: what
    ``apply`` applies.
    """

    def __init__(
        self, model: Any, clip: float = 0.0, compiled: bool | None = None, lanes: int = 1, pick_labels: bool = True,
        recompute: int = 0, chunked_loss: bool | None = None, optimizer: Optimizer = OPTIMIZERS["adamw"],
    ):  # fmt: skip
        self.model = model
        self.chunked_loss = chunked_loss
        self.optimizer = optimizer
        self.lanes = lanes
        self._tracing = Lock()  # tracing writes into the model
        self.layers = lora_layers(model)
        self.places = trained_places(model)
        self.clip = clip
        self.dropout = any(layer.dropout for layer in self.layers.values())
        self.tables = tables_on_disk(model)
        self.cost = DecoderCost(model)
        self.pick_labels = pick_labels and not self._dropout_from(self.cost.line)
        self.recompute = recompute
        self.compiled = should_compile() if compiled is None else compiled
        trained = {part for name in self.places for part in name.split(".")}
        self.frozen = {
            kind: TowerCache(partial(self._features, kind), trim=not reads_padding(model.spec, kind))
            for kind in MEDIA
            if (tower := module_names(kind)[0]) in model.model and tower not in trained
        }
        wrap: Callable[[Any], Any] = mx.compile if self.compiled else lambda f: f
        self._gradients = wrap(mx.value_and_grad(self._training_loss))
        self._evaluate = wrap(self._loss)
        self._apply = wrap(self._updated)

    def prepare(self, batch: Batch) -> Prepared:
        """``prepare`` with the padding that compiled steps need, and the rows of a table on disk."""
        ready = prepare(batch, self.model.spec, self.frozen, SOFT_BUCKET if self.compiled else 1)
        if self.tables:
            ready.arrays["per_layer_rows"] = self.model.per_layer_rows(batch.input_ids)
        if self.pick_labels:
            ready.arrays |= self._label_rows(batch, ready)
        return ready

    def _label_rows(self, batch: Batch, ready: Prepared) -> Arrays:
        """The index arrays of ``LabelRows`` but ``flat``; none where they do not pay."""
        rows, length = batch.input_ids.shape
        flat = np.array(ready.arrays["positions"])
        found = label_rows(flat, ready.labels, (rows, length), POSITION_BUCKET if self.compiled else 1)
        picked = self.cost.upper(rows, length, Picked(len(flat), found["columns"].size))
        if picked > WORTH_PICKING * self.cost.upper(rows, length):
            return {}
        return {name: mx.array(value) for name, value in found.items()}

    def _dropout_from(self, line: int) -> bool:
        """Whether an adapter in or above a decoder layer has dropout: its masks have the stream's shape."""
        layers = self.model.decoder.layers[line:]
        return any(adapter.dropout for layer in layers for adapter in lora_layers(layer).values())

    def gradients(self, weights: Weights, batch: Batch, key: mx.array) -> tuple[Weights, Sums]:
        """(gradients of the summed loss by tensor name, sums), lazy. ``key`` decides the dropout masks."""
        parts = split(batch, self.lanes, self.model.spec)
        keys = [key if i == 0 else mx.random.split(key, i + 1)[i] for i in range(len(parts))]
        if len(parts) > 1:
            mx.eval(keys, weights, self.model.parameters())
            done = shared(self.lanes).map(lambda part, k: self._lane(weights, part, k), parts, keys)
        else:
            done = [self._lane(weights, parts[0], keys[0])]
        grads, sums = done[0]
        for more, counted in done[1:]:
            grads = add(grads, more)
            sums.add(counted.loss, counted.correct, counted)
        return grads, sums

    def _lane(self, weights: Weights, part: Batch, key: mx.array) -> tuple[Weights, Sums]:
        ready = self.prepare(part)
        with self._tracing:
            (total, correct), grads = self._call(self._gradients, weights, ready.arrays, key)
        sums = Sums()
        sums.add(total, correct, ready)
        if self.lanes > 1:
            mx.eval(grads, sums.loss, sums.correct)
        return grads, sums

    def evaluate(self, weights: Weights, batch: Batch) -> Sums:
        """Sums of a batch without dropout, lazy."""
        sums = Sums()
        ready = self.prepare(batch)
        total, correct = self._call(self._evaluate, weights, ready.arrays, None)
        sums.add(total, correct, ready)
        return sums

    def apply(
        self, weights: Weights, moments: State, grads: Weights, count: int, scalars: mx.array,
        key: mx.array | None = None,
    ) -> tuple[Weights, State, mx.array]:  # fmt: skip
        """(new weights, new moments, gradient norm before clipping) from summed gradients over ``count`` labels.

        ``key`` decides the rounding of weights that are kept in bfloat16.
        """
        return self._apply(weights, moments, grads, mx.array(1.0 / max(count, 1)), scalars, key)

    def install(self, weights: Weights) -> None:
        """Put trained tensors into the model, each in the dtype that it has there."""
        for name, place in self.places.items():
            place.put(weights[name])

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call, then put the real weights back: tracing leaves its placeholders in the model."""
        held = {name: place.get() for name, place in self.places.items()}
        try:
            return function(*arguments)
        finally:
            self.install(held)

    def _loss(
        self, weights: Weights, arrays: Arrays, key: mx.array | None, recompute: int = 0, gradient: bool = False
    ) -> tuple[mx.array, mx.array]:
        self.install(weights)
        with dropout_keys(list(self.layers.values()), key if self.dropout else None):
            kinds = [k for k, (first, *_) in _MEDIA.items() if first in arrays or f"{k}_features" in arrays]
            soft = {f"{kind}_soft_tokens": self._soft_tokens(kind, arrays) for kind in kinds}
            given = {name: arrays[name] for name in ("mm_token_type_ids", "per_layer_rows") if name in arrays}
            if "columns" in arrays:
                given["labels"] = LabelRows(arrays["positions"], *map(arrays.get, ("columns", "grid", "back")))
            hidden = self.model.hidden(arrays["input_ids"], recompute=recompute, **given, **soft)
            if "columns" not in arrays:
                hidden = at_positions(hidden, arrays["positions"])
            return loss_sum(self.model, hidden, arrays["targets"], arrays["weights"], gradient, self.chunked_loss)

    def _training_loss(self, weights: Weights, arrays: Arrays, key: mx.array | None) -> tuple[mx.array, mx.array]:
        """The loss in train mode, in which Gemma 3n's AltUp bounds its coefficients."""
        mode = self.model.training
        self.model.train()
        try:
            return self._loss(weights, arrays, key, self.recompute, gradient=True)
        finally:
            self.model.train(mode)

    def _soft_tokens(self, kind: str, arrays: Arrays) -> mx.array:
        features = arrays.get(f"{kind}_features")
        if features is None:
            return self.model.model.soft_tokens(kind, *(arrays.get(name) for name in _MEDIA[kind]))
        return self.model.model.project(kind, features)

    def _features(self, kind: str, values: np.ndarray, where: np.ndarray | None) -> mx.array:
        index = soft_token_index(self.model.spec, kind, values if where is None else where)
        return self.model.model.features(kind, values, where, mx.array(index))

    def _updated(
        self, weights: Weights, moments: State, grads: Weights, share: mx.array, scalars: mx.array,
        key: mx.array | None,
    ) -> tuple[Weights, State, mx.array]:  # fmt: skip
        grads, norm = clip_by_norm(grads, self.clip, share)
        return *update(self.optimizer, weights, moments, grads, scalars, key), norm
