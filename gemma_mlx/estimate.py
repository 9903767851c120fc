"""What a training step holds in memory, from shapes alone.

The real step is traced over a model without weights (``gemma_mlx.skeleton``) and its evaluation gone through on paper
(``gemma_mlx.graph``, ``gemma_mlx.liveness``); so whatever the step does counts, for every family and option. No
weight is read and nothing of the model is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gemma_mlx.batch import Batch
from gemma_mlx.data.buckets import Buckets
from gemma_mlx.full import trained_parameters
from gemma_mlx.graph import Memory, trace
from gemma_mlx.liveness import peak
from gemma_mlx.models.media import MEDIA, module_names
from gemma_mlx.models.tables import tables_on_disk
from gemma_mlx.ops.custom import vjp
from gemma_mlx.optim import Weights
from gemma_mlx.optimizers import OPTIMIZERS, Optimizer
from gemma_mlx.step import Step
from gemma_mlx.tower_store import MEMORY_BYTES
from gemma_mlx.tower_store import Memory as OutputStore

Arrays = dict[str, mx.array]
ChooseBuckets = Callable[[Step], Buckets]
AUDIO_CONVOLUTIONS = 40_000
"""Numbers that the convolutions before an audio tower keep for a soft token."""
_PREFIXES = {"p": "weights", "w": "adapters", "m": "optimizer", "g": "gradients", "a": "batch"}
"""First letter of a traced input's name -> part of the memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the predicted peak, by part.

    Attributes:
        parts: weights (of the base), adapters (all that trains, in float32), optimizer, gradients, batch, activations,
            loss (the head's chunks).
        encoding: at most held while a frozen tower encodes a medium, before the step.
        validation: at most held in a batch of validation.
        kept: outputs of frozen towers that stay in memory across epochs.
        disk: tables that stay on disk, which take no memory.
        largest: the largest single buffer.
    """

    parts: dict[str, int]
    encoding: int = 0
    validation: int = 0
    kept: int = 0
    disk: int = 0
    largest: int = 0

    @property
    def step(self) -> int:
        """Peak of the step itself."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """What ``mx.get_peak_memory`` is to show."""
        return max(self.step, self.encoding, self.validation) + self.kept

    def describe(self) -> str:
        """The parts of the peak in words, largest first."""
        parts, most = {**self.parts, "tower cache": self.kept}, self.peak - self.kept
        for name, size in (("validation", self.validation), ("towers", self.encoding)):
            if self.step < size == most:
                parts = {k: v for k, v in parts.items() if k in ("weights", "adapters", "optimizer", "tower cache")}
                parts[name] = self.peak - sum(parts.values())
        shown = sorted((item for item in parts.items() if item[1] >= 5e6), key=lambda item: -item[1])
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in shown)


@dataclass(frozen=True)
class Kept:
    """Frozen towers' outputs that stay in memory: soft tokens by kind, and the most bytes (None: the default)."""

    slots: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None

    def bytes(self, each: Mapping[str, int]) -> int:
        """Bytes kept where a soft token of a kind takes ``each``."""
        wanted = sum(size * self.slots.get(kind, 0) for kind, size in each.items())
        return min(MEMORY_BYTES if self.limit is None else self.limit, wanted)


def estimate(
    model: Any, batch: Batch, *, recompute: int = 0, pick_labels: bool = True, chunked_loss: bool | None = None,
    clip: float = 1.0, accumulate: int = 1, lanes: int = 1, optimizer: Optimizer = OPTIMIZERS["adamw"],
    masters: bool = True, kept: Kept = Kept(), valid: Batch | None = None, compiled: bool | None = None,
    buckets: ChooseBuckets | None = None, valid_buckets: ChooseBuckets | None = None,
) -> Estimate:  # fmt: skip
    """The peak of a training step over a batch.

    Args:
        model: with adapters or modules to train, its weights unread; it is as before afterwards.
        batch: shapes, labels and places of media count; pixels and sounds do not.
        recompute, pick_labels, chunked_loss, clip, lanes, optimizer, compiled: as for ``Step``.
        accumulate: batches of an optimizer step.
        masters: whether what trains in full is kept in float32.
        kept: outputs of frozen towers that stay in memory.
        valid: a batch of validation.
        buckets, valid_buckets: what chooses the shapes of a compiled step.
    """
    step = Step(
        model, clip, compiled, lanes, pick_labels, recompute, chunked_loss, OutputStore(0), optimizer
    )  # fmt: skip
    step.buckets, step.valid_buckets = (None if choose is None else choose(step) for choose in (buckets, valid_buckets))
    encoded, each = _without_towers(step)
    side_by_side = [step.prepare(part).arrays for part in step.lay_out(batch)[:lanes]]  # the largest come first
    checked = [] if valid is None else [step.prepare(part).arrays for part in step.lay_out_valid(valid)[:lanes]]
    weights = trained_parameters(model, masters)
    if len(side_by_side) > 1 or accumulate > 1:
        each_part = [_gradients_memory(step, weights, arrays, accumulate > 1) for arrays in side_by_side]
    else:
        each_part = [_step_memory(step, weights, side_by_side[0])]
    parts = dict(each_part[0].at_peak)
    for name in ("activations", "loss", "batch"):
        parts[name] = sum(memory.at_peak.get(name, 0) for memory in each_part)
    parts["activations"] += parts.pop("constants", 0)
    held = sum(parts.get(name, 0) for name in ("weights", "adapters", "optimizer"))
    checks = [_loss_memory(step, weights, arrays).peak - held for arrays in checked]
    return Estimate(
        {name: size for name, size in parts.items() if size},
        encoding=max((held + len(side_by_side) * size for size in encoded()), default=0),
        validation=held + sum(checks) if checks else 0,
        kept=kept.bytes(each),
        disk=sum(table.nbytes for table in tables_on_disk(model).values()),
        largest=max(memory.largest for memory in each_part),
    )


def media_weights(model: Any) -> dict[str, float]:
    """Kind of medium -> what a soft token takes in its tower, if that trains, in tokens of the decoder.

    Rough, to choose a batch by: some 30 numbers are kept for each of the stream's, in every layer.
    """
    spec, weights = model.spec, {}
    for kind in MEDIA:
        tower = model.model.get(module_names(kind)[0]) if "model" in model else None
        if tower is None or not tree_flatten(tower.trainable_parameters()):
            continue
        part = spec.audio if kind == "audio" else spec.vision
        each = 30 * getattr(part, "num_hidden_layers", 0) * getattr(part, "hidden_size", 0)
        each = each + AUDIO_CONVOLUTIONS if kind == "audio" else each * getattr(part, "input_pooling", 1) ** 2
        weights[kind] = each / (30 * len(spec.text.layer_types) * spec.text.hidden_size)
    return weights


# --- the step


def _inputs(step: Step, weights: Weights, arrays: Arrays, gradients: bool) -> Arrays:
    """Everything that the step reads. What trains is held once: rounded copies for the model belong to the step."""
    parameters = tree_flatten(step.model.parameters())
    given = {f"p{name}": array for name, array in parameters if name not in weights}
    given |= {f"w{name}": array for name, array in weights.items()}
    moments = step.optimizer.init(weights)
    given |= {f"m{kind}.{name}": array for kind, group in moments.items() for name, array in group.items()}
    if gradients:
        given |= {f"g{name}": array for name, array in weights.items()}
    return given | {f"a{name}": array for name, array in arrays.items()} | {"akey": mx.random.key(0)}


def _traced_gradients(step: Step, weights: Weights, given: Arrays) -> tuple[Weights, list[mx.array]]:
    """(gradients, [loss, correct]) of the step over traced arrays."""
    names, found = list(weights), []
    step.model.update(tree_unflatten([(k[1:], v) for k, v in given.items() if k[0] == "p"]))
    arrays = {k[1:]: v for k, v in given.items() if k[0] == "a" and k != "akey"}

    def loss(*trained: mx.array) -> list[mx.array]:
        found[:] = step._training_loss(dict(zip(names, trained, strict=True)), arrays, given["akey"])
        return found[:1]

    total, gradients = vjp(loss, [given[f"w{name}"] for name in names], [mx.array(1.0)])
    return dict(zip(names, gradients, strict=True)), [*total, found[1]]


def _memory(step: Step, function: Callable[[Arrays], Arrays], given: Arrays, held: str) -> Memory:
    """Memory of an evaluation; inputs whose first letter is in ``held`` are not given back."""
    before = step.model.parameters()
    try:
        graph = trace(function, given)
    finally:
        step.model.update(before)
    for name in step.places.keys() & graph.outputs.keys():
        graph.outputs[name].kind = "gradients"
    return peak(graph, {name: _PREFIXES[name[0]] for name in given}, [name for name in given if name[0] in held])


def _step_memory(step: Step, weights: Weights, arrays: Arrays) -> Memory:
    """Gradients and update in one evaluation."""
    scalars, kinds = step.optimizer.scalars(1, 1e-4, 0.0), step.optimizer.init(weights)

    def run(given: Arrays) -> Arrays:
        gradients, sums = _traced_gradients(step, weights, given)
        trained = {name: given[f"w{name}"] for name in weights}
        moments = {kind: {name: given[f"m{kind}.{name}"] for name in group} for kind, group in kinds.items()}
        new, state, norm = step._updated(trained, moments, gradients, mx.array(1.0), scalars, given["akey"])
        made = {f"new {name}": array for name, array in new.items()}
        made |= {f"{kind} {name}": array for kind, group in state.items() for name, array in group.items()}
        return made | {"norm": norm} | dict(zip(("loss", "correct"), sums, strict=True)) | gradients

    return _memory(step, run, _inputs(step, weights, arrays, False), "pw")


def _gradients_memory(step: Step, weights: Weights, arrays: Arrays, added: bool) -> Memory:
    """Gradients alone, evaluated before others come: of a lane, or of one of several batches."""

    def run(given: Arrays) -> Arrays:
        gradients, sums = _traced_gradients(step, weights, given)
        if added:
            gradients = {name: given[f"g{name}"] + array for name, array in gradients.items()}
        return gradients | dict(zip(("loss", "correct"), sums, strict=True))

    return _memory(step, run, _inputs(step, weights, arrays, added), "pwm")


def _loss_memory(step: Step, weights: Weights, arrays: Arrays) -> Memory:
    """The loss alone, as in validation."""

    def run(given: Arrays) -> Arrays:
        step.model.update(tree_unflatten([(k[1:], v) for k, v in given.items() if k[0] == "p"]))
        trained = {name: given[f"w{name}"] for name in weights}
        found = step._loss(trained, {k[1:]: v for k, v in given.items() if k[0] == "a" and k != "akey"}, None)
        return dict(zip(("loss", "correct"), found, strict=True))

    return _memory(step, run, _inputs(step, weights, arrays, False), "pwm")


# --- frozen towers


def _without_towers(step: Step) -> tuple[Callable[[], list[int]], dict[str, int]]:
    """Let frozen towers give zeros.

    Returns:
        What tells how many bytes the largest medium of each takes to encode; kind -> bytes of a soft token, once seen.
    """
    each: dict[str, int] = {}
    largest: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    real = {kind: cache.tower for kind, cache in step.frozen.items()}

    def stand_in(kind: str) -> Callable[..., mx.array]:
        def zeros(values: np.ndarray, where: np.ndarray | None) -> mx.array:
            if kind not in largest or values.size > largest[kind][0].size:
                largest[kind] = values, where
            made = real[kind](values, where)  # lazy: for its shape
            each[kind] = made.nbytes // max(1, len(made))
            return mx.zeros(made.shape, made.dtype)

        return zeros

    for kind, cache in step.frozen.items():
        cache.tower = stand_in(kind)

    def encoded() -> list[int]:
        return [_tower_memory(step, real[kind], *medium) for kind, medium in largest.items()]

    return encoded, each


def _tower_memory(step: Step, tower: Callable[..., mx.array], values: np.ndarray, where: np.ndarray | None) -> int:
    """Bytes that encoding one medium takes above the weights."""

    def run(given: Arrays) -> Arrays:
        step.model.update(tree_unflatten([(name[1:], array) for name, array in given.items()]))
        return {"out": tower(values, where)}

    given = {f"p{name}": array for name, array in tree_flatten(step.model.parameters())}
    memory = _memory(step, run, given, "p")
    return memory.peak - memory.at_peak.get("weights", 0)
