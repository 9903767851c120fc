"""Launches, bytes and FLOPs of an op: in plain MLX, from its traced graph, and with its kernels, from its launches.

Bytes are those of arrays: each launch reads its inputs and writes its outputs once; constants and views move nothing.
Plain MLX is counted at its best: elementwise operations that lead to each other are one launch, as ``mx.compile``
makes them but without its limits; RMS norm and its gradient are MLX's own single launches; a copy of parts (pad,
concatenate) is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.graph import Graph, Operation, Value, trace
from gemma_mlx.ops import custom, dispatch
from gemma_mlx.ops.kernel import Launch
from gemma_mlx.ops.registry import Op

VIEWS = frozenset(
    {
        "AsStrided", "Broadcast", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
        "Squeeze", "StopGradient", "Transpose", "Unflatten",
    }
)  # fmt: skip
ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "AsType", "BitwiseBinary", "Cos", "Divide", "Equal", "Erf", "Exp", "Floor", "Full", "Greater",
        "GreaterEqual", "Less", "LessEqual", "Log", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum",
        "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Select", "Sigmoid", "Sign", "Sin", "Sqrt", "Square",
        "Subtract", "Tanh",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """What an op does.

    Attributes:
        launches: of kernels.
        read, written: bytes.
        flops: of products 2 for each term; of anything else 1 for each element that comes in or out.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written

    def __add__(self, other: Count) -> Count:
        return Count(
            self.launches + other.launches, self.read + other.read, self.written + other.written,
            self.flops + other.flops,
        )  # fmt: skip


# --- kernels


@dataclass
class Recorder:
    """A backend that keeps launches and gives zeros."""

    launches: list[Launch] = field(default_factory=list)
    name: str = "recorder"

    def run(self, launch: Launch) -> list[mx.array]:
        self.launches.append(launch)
        return [mx.zeros(*made) for made in zip(launch.shapes, launch.dtypes, strict=True)]


def arguments(op: Op, size: str, dtype: mx.Dtype) -> list[Any]:
    """An op's arguments at one of its sizes."""
    return list(op.sizes[size](np.random.default_rng(0), dtype))


def listed(made: Any) -> list[mx.array]:
    return list(made) if isinstance(made, (list, tuple)) else [made]


def of_chosen(function: Callable, given: Sequence[Any], wrt: Sequence[int]) -> Callable[..., list[mx.array]]:
    """`function` of the arguments `wrt` alone; floating outputs."""

    def run(*chosen: mx.array) -> list[mx.array]:
        full = list(given)
        for i, x in zip(wrt, chosen, strict=True):
            full[i] = x
        return [a for a in listed(function(*full)) if mx.issubdtype(a.dtype, mx.floating)]

    return run


def launches_of(op: Op, size: str, dtype: mx.Dtype) -> tuple[list[Launch], list[Launch]]:
    """(launches of the forward, of all gradients)."""
    given = arguments(op, size, dtype)
    run, chosen = of_chosen(op.function, given, op.wrt), [given[i] for i in op.wrt]
    with dispatch.using(Recorder()) as recorder:
        outputs = run(*chosen)
        forward = len(recorder.launches)
        if chosen:
            recorder.launches.clear()
            mx.vjp(run, chosen, [mx.ones_like(o) for o in outputs])
    return recorder.launches[:forward], recorder.launches[forward:]


def of_launch(launch: Launch) -> Count:
    """Inputs once, or as often as the kernel says, and outputs once.

    A placeholder of one element for an input or output that is not used counts too.
    """
    read = launch.kernel.read(launch) if launch.kernel.read else sum(a.nbytes for a in launch.inputs)
    written = sum(mx.zeros(shape, dtype).nbytes for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True))
    return Count(1, read, written)


def of_launches(launches: Iterable[Launch]) -> Count:
    return sum(map(of_launch, launches), Count())


# --- plain MLX


@contextmanager
def _own_norms():
    """Within the block ``mx.fast.rms_norm`` is one operation, and so is its gradient."""
    held = mx.fast.rms_norm

    def gradient(inputs: Sequence, cotangents: Sequence, outputs: Sequence) -> list[mx.array]:
        x, weight = inputs  # no op has an arc tangent: it stands for the launch
        d_x = mx.arctan2(x, cotangents[0])
        return [d_x, d_x.reshape(-1, x.shape[-1]).sum(0).reshape(weight.shape) if weight.size > 1 else weight]

    norm = custom.custom_function(lambda x, weight: [mx.softmax(x, axis=-1)], gradient)

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return norm(x, mx.ones((1,), x.dtype) if weight is None else weight)[0]

    mx.fast.rms_norm = rms_norm
    try:
        yield
    finally:
        mx.fast.rms_norm = held


def plain_graph(op: Op, size: str, dtype: mx.Dtype) -> Graph:
    """The graph of an op's reference with its gradients; its outputs are called ``out 0`` …, ``gradient 0`` …"""
    wrt = op.wrt
    given = arguments(op, size, dtype)
    places = [i for i, a in enumerate(given) if isinstance(a, mx.array)]

    def run(inputs: dict[str, mx.array]) -> dict[str, mx.array]:
        full = list(given)
        for i in places:
            full[i] = inputs[f"{i}"]
        if not wrt:
            return {f"out {i}": a for i, a in enumerate(listed(op.reference(*full)))}
        pulls = [a for name, a in inputs.items() if name.startswith("pull")]
        outputs, found = custom.vjp(of_chosen(op.reference, full, wrt), [full[i] for i in wrt], pulls)
        made = {f"out {i}": a for i, a in enumerate(outputs)}
        return made | {f"gradient {i}": a for i, a in zip(wrt, found, strict=True)}

    inputs = {f"{i}": given[i] for i in places}
    if wrt:
        outputs = of_chosen(op.reference, given, wrt)(*(given[i] for i in wrt))
        inputs |= {f"pull {i}": mx.ones_like(a) for i, a in enumerate(outputs)}
    with _own_norms():
        return trace(run, inputs)


def _needed(outputs: Iterable[Value]) -> dict[int, Operation]:
    """The operations that some values need, by id."""
    seen: dict[int, Operation] = {}
    stack = [v.maker for v in outputs]
    while stack:
        operation = stack.pop()
        if operation is not None and id(operation) not in seen:
            seen[id(operation)] = operation
            stack += [v.maker for v in operation.inputs]
    return seen


def _behind(value: Value) -> Value:
    """What lies in memory behind a view that shows all of it: of a broadcast the smaller array."""
    while value.maker is not None and value.maker.name in VIEWS and value.maker.name not in ("Slice", "Split"):
        before, made = value.maker.inputs, value.maker.outputs
        if value.maker.name == "CustomTransforms":  # its last inputs are what its function made
            value = before[made.index(value) - len(made)]
        else:
            value = before[made.index(value)]
    return value


def _root(value: Value) -> Value:
    """The array that a view, a slice too, lies in."""
    value = _behind(value)
    while value.maker is not None and value.maker.name in ("Slice", "Split"):
        value = _behind(value.maker.inputs[0])
    return value


class _Groups:
    """Operations that are one launch."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}

    def of(self, operation: Operation) -> int:
        at = id(operation)
        while self.parents.setdefault(at, at) != at:
            at = self.parents[at]
        return at

    def join(self, a: Operation, b: Operation) -> None:
        self.parents[self.of(a)] = self.of(b)


def _flops(operation: Operation) -> int:
    out = sum(v.size for v in operation.outputs)
    if operation.name == "Matmul":
        return 2 * out * operation.inputs[0].shape[-1]
    if operation.name == "Convolution":
        kernel = operation.inputs[1]
        return 2 * out * kernel.size // kernel.shape[0]
    return max(out, *(v.size for v in operation.inputs)) if operation.inputs else 0


def of_graph(graph: Graph) -> tuple[Count, Count]:
    """(what the graph's ``out`` values need, with what is kept for the rest; the rest), elementwise operations fused.

    The two are not fused with each other: in a step all other layers lie between them.
    """
    first = _needed(v for name, v in graph.outputs.items() if name.startswith("out"))
    operations = [o for o in _needed(graph.outputs.values()).values() if o.name not in VIEWS]
    groups = _Groups()
    for operation in operations:
        makers = [_root(v).maker for v in operation.inputs] if operation.name in ELEMENTWISE else []
        for maker in makers:
            same_side = maker is not None and (id(maker) in first) == (id(operation) in first)
            if same_side and maker.name in ELEMENTWISE:
                groups.join(maker, operation)
    members: dict[int, list[Operation]] = {}
    used_in: dict[int, set[int]] = {}
    for operation in operations:
        members.setdefault(groups.of(operation), []).append(operation)
        for v in operation.inputs:
            used_in.setdefault(id(_root(v)), set()).add(groups.of(operation))
    wanted = {id(_root(v)) for v in graph.outputs.values()}
    sides = [Count(), Count()]
    for at, those in members.items():
        sides[id(those[0]) not in first] += _of_group(at, those, used_in, wanted)
    return sides[0], sides[1]


def _of_group(at: int, those: list[Operation], used_in: dict[int, set[int]], wanted: set[int]) -> Count:
    """One launch: what it reads from outside, and what others, or the caller, read of what it makes."""
    made = {id(v): v for o in those for v in o.outputs}
    read: dict[int, int] = {}
    for operation in those:
        for v in operation.inputs:
            root, seen = _root(v), _behind(v)
            is_constant = root.maker is None and root.size == 1
            if id(root) in made or is_constant:
                continue
            read[id(root)] = min(root.size * root.item, read.get(id(root), 0) + min(seen.size, root.size) * root.item)
    kept = [v for key, v in made.items() if key in wanted or used_in.get(key, set()) - {at}]
    written = sum(v.size * v.item for v in kept)
    if all(o.name == "Full" for o in those):
        return Count()
    return Count(1, sum(read.values()), written, sum(map(_flops, those)))


def plain(op: Op, size: str, dtype: mx.Dtype) -> tuple[Count, Count]:
    """(forward, all gradients) of an op's reference."""
    return of_graph(plain_graph(op, size, dtype))


def with_kernels(op: Op, size: str, dtype: mx.Dtype) -> tuple[Count, Count]:
    """(forward, all gradients) of an op's kernels."""
    forward, gradients = launches_of(op, size, dtype)
    return of_launches(forward), of_launches(gradients)
