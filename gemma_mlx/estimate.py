"""What a training step holds in memory, from shapes alone.

The real step is traced over a model without weights (``gemma_mlx.skeleton``) and its evaluation gone through on paper
(``gemma_mlx.graph``, ``gemma_mlx.liveness``); so whatever the step does counts, for every family and option. No
weight is read and nothing of the model is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gemma_mlx.batch import Batch
from gemma_mlx.full import trained_parameters
from gemma_mlx.graph import Memory, trace
from gemma_mlx.liveness import peak
from gemma_mlx.models.tables import tables_on_disk
from gemma_mlx.ops.custom import vjp
from gemma_mlx.optim import Weights, adamw_init, adamw_scalars
from gemma_mlx.step import Step, split

Arrays = dict[str, mx.array]
_PREFIXES = {"p": "weights", "w": "adapters", "m": "optimizer", "g": "gradients", "a": "batch"}
"""First letter of a traced input's name -> part of the memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the predicted peak, by part.

    Attributes:
        parts: weights (of the base), adapters (all that trains, in float32), optimizer, gradients (kept from earlier
            batches of an accumulated step), batch, activations (with gradients), loss.
        encoding: at most held while a frozen tower encodes a medium, before the step.
        kept: outputs of frozen towers that stay in memory across epochs.
        disk: tables that stay on disk, which take no memory.
        largest: the largest single buffer.
    """

    parts: dict[str, int]
    encoding: int = 0
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
        return max(self.step, self.encoding) + self.kept

    def describe(self) -> str:
        """The parts of the peak in words, largest first."""
        parts = {**self.parts, "tower cache": self.kept}
        if self.encoding > self.step:
            held = {k: v for k, v in parts.items() if k in ("weights", "adapters", "optimizer", "tower cache")}
            parts = {**held, "tower": self.peak - sum(held.values())}
        shown = sorted((item for item in parts.items() if item[1] >= 5e6), key=lambda item: -item[1])
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in shown)


def estimate(
    model: Any, batch: Batch, *, recompute: int = 0, pick_labels: bool = True, chunked_loss: bool | None = None,
    clip: float = 1.0, accumulate: int = 1, lanes: int = 1, kept: int = 0,
) -> Estimate:  # fmt: skip
    """The peak of a training step over a batch.

    Args:
        model: with adapters or modules to train, its weights unread; it is as before afterwards.
        batch: shapes, labels and places of media count; pixels and sounds do not.
        recompute, pick_labels, chunked_loss, clip, lanes: as for ``Step``.
        accumulate: batches of an optimizer step.
        kept: bytes of frozen towers' outputs to keep for other batches.
    """
    step = Step(model, clip, False, pick_labels=pick_labels, recompute=recompute, chunked_loss=chunked_loss)
    encoded = _without_towers(step)
    ready = [step.prepare(part).arrays for part in split(batch, lanes, model.spec)]
    arrays = max(ready, key=lambda a: sum(v.size for v in a.values()))
    weights = trained_parameters(model)
    if lanes > 1 or accumulate > 1:
        memory = _gradients_memory(step, weights, arrays, accumulate > 1)
    else:
        memory = _step_memory(step, weights, arrays)
    parts = dict(memory.at_peak)
    for name in ("activations", "loss", "batch"):
        parts[name] = parts.get(name, 0) * len(ready)
    parts["activations"] += parts.pop("constants", 0)
    held = sum(parts.get(name, 0) for name in ("weights", "adapters", "optimizer"))
    return Estimate(
        {name: size for name, size in parts.items() if size},
        encoding=max((held + len(ready) * size for size in encoded()), default=0),
        kept=kept,
        disk=sum(table.nbytes for table in tables_on_disk(model).values()),
        largest=memory.largest,
    )


# --- the step


def _inputs(step: Step, weights: Weights, arrays: Arrays, gradients: bool) -> Arrays:
    """Everything that the step reads. What trains is held once: rounded copies for the model belong to the step."""
    parameters = tree_flatten(step.model.parameters())
    given = {f"p{name}": array for name, array in parameters if name not in weights}
    given |= {f"w{name}": array for name, array in weights.items()}
    moments = adamw_init(weights)
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
    return peak(graph, {name: _PREFIXES[name[0]] for name in given}, [name for name in given if name[0] in held])


def _step_memory(step: Step, weights: Weights, arrays: Arrays) -> Memory:
    """Gradients and update in one evaluation."""
    scalars = adamw_scalars(1, 1e-4, 0.0)

    def run(given: Arrays) -> Arrays:
        gradients, sums = _traced_gradients(step, weights, given)
        trained = {name: given[f"w{name}"] for name in weights}
        moments = {kind: {name: given[f"m{kind}.{name}"] for name in weights} for kind in ("m", "v")}
        new, state, norm = step.apply(trained, moments, gradients, 1, scalars)
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


# --- frozen towers


def _without_towers(step: Step) -> Callable[[], list[int]]:
    """Let frozen towers give zeros; the result tells what the largest medium of each takes to encode."""
    largest: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    real = {kind: cache.tower for kind, cache in step.frozen.items()}

    def stand_in(kind: str) -> Callable[..., mx.array]:
        def zeros(values: np.ndarray, where: np.ndarray | None) -> mx.array:
            if kind not in largest or values.size > largest[kind][0].size:
                largest[kind] = values, where
            made = real[kind](values, where)  # lazy: for its shape
            return mx.zeros(made.shape, made.dtype)

        return zeros

    for kind, cache in step.frozen.items():
        cache.tower = stand_in(kind)

    def encoded() -> list[int]:
        return [_tower_memory(step, real[kind], *medium) for kind, medium in largest.items()]

    return encoded


def _tower_memory(step: Step, tower: Callable[..., mx.array], values: np.ndarray, where: np.ndarray | None) -> int:
    """Bytes that encoding one medium takes above the weights."""

    def run(given: Arrays) -> Arrays:
        step.model.update(tree_unflatten([(name[1:], array) for name, array in given.items()]))
        return {"out": tower(values, where)}

    given = {f"p{name}": array for name, array in tree_flatten(step.model.parameters())}
    memory = _memory(step, run, given, "p")
    return memory.peak - memory.at_peak.get("weights", 0)
