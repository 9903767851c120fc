"""One training step: batch in, gradients of what trains out, compiled where it can be.

The functions that are compiled take everything that changes as arguments (trained weights, arrays of the batch, the
dropout key) and have no hidden state. What needs concrete values (where the soft tokens lie, which positions have a
label) is counted in numpy beforehand and passed as index arrays of few lengths.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.data.buckets import LABELS, ROW_LABELS, TOKENS, Buckets
from gemma_mlx.flops import DecoderCost, Picked
from gemma_mlx.full import trained_places
from gemma_mlx.lanes import shared
from gemma_mlx.layout import EXACT, FEW, Laid, Lengths, lay_out, lay_out_in, sizes
from gemma_mlx.lora import dropout_keys, lora_layers
from gemma_mlx.loss import at_positions, loss_sum
from gemma_mlx.models.label_rows import LabelRows, label_rows
from gemma_mlx.models.media import MEDIA, module_names, reads_padding, soft_token_index
from gemma_mlx.models.tables import DiskTable, tables_on_disk
from gemma_mlx.optim import Weights, clip_by_norm
from gemma_mlx.optimizers import OPTIMIZERS, Optimizer, State, update
from gemma_mlx.parts import split
from gemma_mlx.tower_cache import TowerCache, tower_identity
from gemma_mlx.tower_store import Memory, Store

COMPILE_VARIABLE = "GEMMA_MLX_COMPILE"
"""``off`` runs every step uncompiled."""
WORTH_PICKING = 0.9
"""Layers above the line see label positions alone if that leaves at most this part of their FLOPs: below it gathering
rows and masks costs more than it saves."""

Arrays = dict[str, mx.array]
_MEDIA = {kind: (*names, f"{kind}_index") for kind, names in MEDIA.items()}
_ALONGSIDE = ("mm_token_type_ids", "segment_ids", "per_layer_rows")


@dataclass
class Prepared:
    """A batch as the step takes it: MLX arrays, and what was counted on the way."""

    arrays: Arrays
    labels: int
    tokens: int
    positions: int


@dataclass
class Sums:
    """Of one or more batches: loss and correct argmaxes (lazy float32 scalars), label positions, tokens, and positions
    with padding."""

    loss: Any = 0.0
    correct: Any = 0.0
    labels: int = 0
    tokens: int = 0
    positions: int = 0

    def add(self, loss: Any, correct: Any, counted: Laid | Sums) -> None:
        """Add one batch's."""
        self.loss, self.correct = self.loss + loss, self.correct + correct
        self.labels, self.tokens = self.labels + counted.labels, self.tokens + counted.tokens
        self.positions += counted.positions


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


def prepare(laid: Laid, frozen: dict[str, TowerCache] | None = None, table: DiskTable | None = None) -> Prepared:
    """A laid-out batch moved to MLX arrays; media whose tower is frozen become that tower's outputs."""
    arrays = {name: mx.array(value) for name, value in laid.arrays.items()}
    for kind, media in laid.media.items():
        made = frozen[kind].encode(media)
        arrays[f"{kind}_features"] = mx.pad(made, [(0, laid.soft_tokens[kind] - len(made)), (0, 0)])
    if laid.table is not None:
        arrays["per_layer_rows"] = table.unpacked(laid.table)
    arrays = dict(sorted(arrays.items()))  # another order of the same names would be compiled again
    return Prepared(arrays, laid.labels, laid.tokens, laid.positions)


class Step:
    """The functions of one training step over a model with adapters, or with modules that train in full.

    ``compiled`` defaults to ``should_compile()``. With ``lanes`` above 1 a batch is computed in parts
    (``gemma_mlx.parts``) by as many threads, which work side by side on a CPU (``gemma_mlx.lanes``). Towers in which
    nothing trains are encoded outside the function that is differentiated, where MLX's fused attention is available,
    and each medium only once while the cache holds it.

    With ``pick_labels``, the layers above the last one that owns keys and values see label positions alone, wherever
    that is exact (no dropout there) and saves FLOPs (``WORTH_PICKING``). ``recompute`` n: the gradient recomputes every
    n-th decoder layer; 0 none. ``chunked_loss`` as in ``gemma_mlx.loss.label_scores``. ``towers`` keeps what
    frozen towers made of each medium; in memory by default. ``optimizer``: what ``apply`` applies. ``buckets`` (and
    ``valid_buckets`` for ``evaluate``) bound the number of compilations; without them lists are padded to small
    multiples.
    """

    def __init__(
        self, model: Any, clip: float = 0.0, compiled: bool | None = None, lanes: int = 1, pick_labels: bool = True,
        recompute: int = 0, chunked_loss: bool | None = None, towers: Store | None = None,
        optimizer: Optimizer = OPTIMIZERS["adamw"], buckets: Buckets | None = None,
        valid_buckets: Buckets | None = None,
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
        self.table = next(iter(tables_on_disk(model).values()), None)
        self.cost = DecoderCost(model)
        self.pick_labels = pick_labels and not self._dropout_from(self.cost.line)
        self.recompute = recompute
        self.compiled = should_compile() if compiled is None else compiled
        trained = {part for name in self.places for part in name.split(".")}
        self.buckets, self.valid_buckets = buckets, valid_buckets
        self.traces = dict.fromkeys(("gradients", "evaluate", "apply"), 0)
        self.towers = Memory() if towers is None else towers
        self.frozen = {
            kind: self._tower_cache(kind)
            for kind in MEDIA
            if (tower := module_names(kind)[0]) in model.model and tower not in trained
        }
        self._gradients = self._wrap("gradients", mx.value_and_grad(self._training_loss))
        self._evaluate = self._wrap("evaluate", self._loss)
        self._apply = self._wrap("apply", self._updated)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled and its compilations counted where steps are compiled."""
        if not self.compiled:
            return function

        def traced(*arguments: Any) -> Any:
            self.traces[name] += 1  # runs only while a new shape is traced
            return function(*arguments)

        return mx.compile(traced)

    @property
    def compilations(self) -> int:
        """How many graphs were compiled so far."""
        return sum(self.traces.values())

    def _tower_cache(self, kind: str) -> TowerCache:
        name, in_memory = module_names(kind)[0], isinstance(self.towers, Memory)
        # Hashing the weights takes a second a gigabyte: only where outputs outlive the model.
        identity = name.encode() if in_memory else tower_identity(self.model, kind)
        trim = not reads_padding(self.model.spec, kind)
        return TowerCache(partial(self._features, kind), trim, self.towers, identity)

    def tower_report(self) -> dict[str, int]:
        """Media found (``hits``) and encoded (``misses``) by frozen towers, and the bytes that are kept."""
        caches = self.frozen.values()
        found = {name: sum(getattr(cache, name) for cache in caches) for name in ("hits", "misses")}
        return {**found, "bytes": self.towers.nbytes}

    def lay_out(self, batch: Batch) -> list[Laid]:
        """The part of a step that needs no weights: parts of the batch in NumPy. May run in any thread."""
        return self._lay_out(batch, self.buckets)

    def lay_out_valid(self, batch: Batch) -> list[Laid]:
        """``lay_out`` for ``evaluate``."""
        return self._lay_out(batch, self.valid_buckets)

    def _lay_out(self, batch: Batch, buckets: Buckets | None) -> list[Laid]:
        """The largest part first, so that the lanes end together."""
        parts = [self._laid(part, buckets) for part in split(batch, self.lanes, self.model.spec)]
        return sorted(parts, key=lambda part: -part.positions)

    def _laid(self, batch: Batch, buckets: Buckets | None = None) -> Laid:
        """``lay_out`` with the padding that compiled steps need, and the rows of a table on disk."""
        spec = self.model.spec
        bucket = None if buckets is None else buckets.find(sizes(batch, spec), len(batch.input_ids))
        if bucket is None:
            lengths = FEW if self.compiled else EXACT
            laid = lay_out(batch, spec, self.frozen, lengths)
        else:
            lengths = Lengths.of(bucket)
            laid = lay_out_in(bucket, buckets.rows, batch, spec, self.frozen)
        if self.table is not None:
            laid.table = self.table.read(self.model.per_layer_ids(laid.arrays["input_ids"]))
        if self.pick_labels:
            laid.arrays |= self._label_rows(laid, lengths.columns)
        return laid

    def prepare(self, part: Batch | Laid) -> Prepared:
        """``prepare`` of a batch, or of what was laid out before."""
        laid = self._laid(part, self.buckets) if isinstance(part, Batch) else part
        return prepare(laid, self.frozen, self.table)

    def _label_rows(self, laid: Laid, multiple: int) -> dict[str, np.ndarray]:
        """The index arrays of ``LabelRows`` but ``flat``; none where they do not pay."""
        shape, flat = laid.arrays["input_ids"].shape, laid.arrays["positions"]
        found = label_rows(flat, laid.labels, shape, multiple)
        return found if self._pays(shape, Picked(len(flat), found["columns"].size)) else {}

    def _pays(self, shape: tuple[int, int], picked: Picked) -> bool:
        return self.cost.upper(*shape, picked) <= WORTH_PICKING * self.cost.upper(*shape)

    def work(self, rows: int, bucket: np.ndarray) -> float:
        """FLOPs of a step over a bucket: decoder and head."""
        shape, positions = (rows, int(bucket[TOKENS])), int(bucket[LABELS])
        picked = Picked(positions, rows * int(bucket[ROW_LABELS]))
        picked = picked if self.pick_labels and self._pays(shape, picked) else None
        text = self.model.spec.text
        return self.cost.step(*shape, picked, self.recompute) + 4 * text.hidden_size * text.vocab_size * positions

    def _dropout_from(self, line: int) -> bool:
        """Whether an adapter in or above a decoder layer has dropout: its masks have the stream's shape."""
        layers = self.model.decoder.layers[line:]
        return any(adapter.dropout for layer in layers for adapter in lora_layers(layer).values())

    def gradients(self, weights: Weights, batch: Batch | list[Laid], key: mx.array) -> tuple[Weights, Sums]:
        """(gradients of the summed loss by tensor name, sums), lazy. ``key`` decides the dropout masks."""
        parts = self.lay_out(batch) if isinstance(batch, Batch) else batch
        keys = [key if i == 0 else mx.random.split(key, i + 1)[i] for i in range(len(parts))]
        grads, sums = None, Sums()
        found = self._each(self._part_gradients, weights, parts, keys)
        for (total, correct, more), part in zip(found, parts, strict=True):
            grads = more if grads is None else add(grads, more)
            sums.add(total, correct, part)
            if len(parts) > 1:
                mx.eval(grads)  # no part's gradients wait for those of the others
        return grads, sums

    def evaluate(self, weights: Weights, batch: Batch) -> Sums:
        """Sums of a batch without dropout, lazy."""
        parts, sums = self.lay_out_valid(batch), Sums()
        found = self._each(self._part_loss, weights, parts, [None] * len(parts))
        for (total, correct), part in zip(found, parts, strict=True):
            sums.add(total, correct, part)
        return sums

    def _each(self, function: Any, weights: Weights, parts: list[Laid], keys: list[Any]) -> Iterator[Any]:
        """``function`` of each part, in order; of several in the lanes, evaluated."""
        if len(parts) == 1:
            yield function(weights, parts[0], keys[0])
            return
        mx.eval(keys, weights, self.model.parameters())

        def evaluated(part: Laid, key: mx.array | None) -> Any:
            made = function(weights, part, key)
            mx.eval(made)
            return made

        yield from shared(self.lanes).each(evaluated, parts, keys)

    def _part_gradients(self, weights: Weights, part: Laid, key: mx.array) -> tuple[mx.array, mx.array, Weights]:
        ready = self.prepare(part)
        with self._tracing:
            (total, correct), grads = self._call(self._gradients, weights, ready.arrays, key)
        return total, correct, grads

    def _part_loss(self, weights: Weights, part: Laid, key: None) -> tuple[mx.array, mx.array]:
        ready = self.prepare(part)
        with self._tracing:
            return self._call(self._evaluate, weights, ready.arrays, key)

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
            given = {name: arrays[name] for name in _ALONGSIDE if name in arrays}
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
