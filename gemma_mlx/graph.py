"""The operations of a lazy MLX computation, with shapes, and the memory that evaluating them would take.

Nothing is evaluated. ``trace`` lists the operations by ``mx.export_function``; ``peak`` goes through them in the order
and by the rules of MLX's evaluation (``eval_impl`` in its transforms.cpp, and the CPU backend's operations): views
share a buffer, an elementwise operation writes into an input that nobody else needs, and buffers are given back when
the operations that read them are done, which is some hundred dispatches later than they are asked for.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from gemma_mlx.ops.custom import cutting

Shape = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Value:
    """One array of a graph: its shape and, once it is evaluated, where and how it lies in memory."""

    shape: Shape
    item: int
    """Bytes an element."""
    maker: Operation | None = None
    buffer: Buffer | None = None
    strides: Shape = ()
    data_size: int = 0
    """Elements of the buffer that it spans; 1 for a broadcast scalar."""
    contiguous: bool = True
    row: bool = True
    column: bool = True
    kind: str = "activations"
    users: int = 0
    """Operations still to come that read it, and 1 while the caller holds it."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(slots=True, eq=False)
class Operation:
    """One primitive."""

    name: str
    inputs: list[Value]
    outputs: list[Value]
    arguments: Any = ()
    degree: int = 0


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory of some values: bytes, values that lie in it, and operations under way that read it."""

    bytes: int
    values: int = 0
    pending: int = 0
    kind: str = ""


@dataclass
class Graph:
    """Inputs by name, and outputs by name, of a traced function."""

    inputs: dict[str, Value]
    outputs: dict[str, Value]
    constants: list[Value] = field(default_factory=list)


def trace(function: Callable[[dict[str, mx.array]], dict[str, mx.array]], inputs: dict[str, mx.array]) -> Graph:
    """The graph of ``function``, whose arrays are all inputs, outputs or constants; the inputs are not read."""
    log: list[dict[str, Any]] = []
    names: list[str] = []
    counts: list[tuple[int, int, str]] = []

    def flat(*arrays: mx.array) -> list[mx.array]:
        with cutting() as cuts:
            outputs = function(dict(zip(inputs, arrays, strict=True)))
        names[:] = outputs
        counts[:] = [(len(inputs), len(stand_ins), kind) for inputs, _, stand_ins, kind in cuts.links]
        return [*outputs.values(), *(a for *arrays, _ in cuts.links for part in arrays for a in part)]

    mx.disable_compile()  # within a gradient compiled functions are inlined too
    try:
        mx.export_function(log.append, flat, *inputs.values())
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
    return _graph(log, list(inputs), names, counts)


def _graph(
    log: list[dict[str, Any]], inputs: list[str], outputs: list[str], links: list[tuple[int, int, str]]
) -> Graph:
    values: dict[str, Value] = {}

    def value(entry: tuple[str, Shape, mx.Dtype]) -> Value:
        name, shape, dtype = entry
        if name not in values:
            values[name] = Value(tuple(shape), dtype.size)
        return values[name]

    given, wanted, constants, operations = [], [], [], []
    for entry in log:
        kind = entry["type"]
        if kind == "inputs":
            given = [value(e) for e in entry["inputs"]]
        elif kind == "outputs":
            wanted = [value(e) for e in entry["outputs"]]
        elif kind == "constants":
            constants = [value((name, a.shape, a.dtype)) for name, a in entry["constants"]]
        elif kind == "primitive":
            made = [value(e) for e in entry["outputs"]]
            operation = Operation(entry["name"], [value(e) for e in entry["inputs"]], made, entry["arguments"])
            operations.append(operation)
            for v in made:
                v.maker = operation
    rest, same = iter(wanted[len(outputs) :]), {}
    for taken, stand_ins, kind in links:
        sources, made, targets = ([next(rest) for _ in range(n)] for n in (taken, stand_ins, stand_ins))
        if not taken:
            same[targets[0]] = made[0]
            continue
        if kind:
            _mark(list(made), set(sources), kind)
        operations.append(Operation("CustomTransforms", [*sources, *made], targets))
        for v in targets:
            v.maker = operations[-1]

    def real(v: Value) -> Value:
        while v in same:
            v = same[v]
        return v

    for operation in operations:
        operation.inputs = [real(v) for v in operation.inputs]
    return Graph(dict(zip(inputs, given, strict=True)), dict(zip(outputs, map(real, wanted), strict=False)), constants)


def _mark(values: list[Value], until: set[Value], kind: str) -> None:
    """Set the kind of what leads from some values to others."""
    while values:
        v = values.pop()
        if v not in until and v.kind != kind:
            v.kind = kind
            values += v.maker.inputs if v.maker else []


# --- order of evaluation


def _degrees(outputs: Iterable[Value]) -> None:
    """How many operations read each one's outputs, of those that the outputs need."""
    seen, stack = set(), [v.maker for v in outputs if v.maker is not None]
    for v in outputs:
        if v.maker is not None:
            v.maker.degree += 1
    while stack:
        operation = stack.pop()
        if operation in seen:
            continue
        seen.add(operation)
        for v in operation.inputs:
            v.users += 1
            if v.maker is not None:
                v.maker.degree += 1
                stack.append(v.maker)


WIDTH = 20
"""Of the breadth-first order, before it goes down a level."""


def order(outputs: Sequence[Value]) -> list[Operation]:
    """Operations as MLX evaluates them; counts ``users`` on the way."""
    _degrees(outputs)
    end = Operation("Synchronize", list(outputs), [])
    tape, stack, i = [end], [], 0
    while i < len(tape) or stack:
        if i >= len(tape):
            operation, start = stack.pop()
        else:
            operation, start, i = tape[i], 0, i + 1
        for j in range(start, len(operation.inputs)):
            maker = operation.inputs[j].maker
            if maker is None:
                continue
            if len(tape) - i >= WIDTH:
                stack.append((operation, j))
                break
            maker.degree -= 1
            if maker.degree == 0:
                tape.append(maker)
    return tape[:0:-1]


# --- memory


DISPATCHES, TASKS = 10, 10
"""A task of MLX's scheduler is so many dispatches; more than so many tasks under way make the caller wait."""


class Memory:
    """Buffers in use while operations are dispatched, far ahead of their end."""

    def __init__(self) -> None:
        self.active = self.peak = self.largest = 0
        self.dispatched = 0
        self.under_way: deque[tuple[int, list[Buffer]]] = deque()
        self.at_peak: dict[str, int] = {}
        self.kinds: dict[str, int] = {}

    def allocate(self, size: int, kind: str) -> Buffer:
        """A new buffer."""
        self.active, self.largest = self.active + size, max(self.largest, size)
        self.kinds[kind] = self.kinds.get(kind, 0) + size
        if self.active > self.peak:
            self.peak, self.at_peak = self.active, dict(self.kinds)
        return Buffer(size, kind=kind)

    def give_back(self, buffer: Buffer) -> None:
        """Free it if nothing lies in it or reads it."""
        if buffer.values == 0 and buffer.pending == 0:
            self.active -= buffer.bytes
            self.kinds[buffer.kind] -= buffer.bytes

    def put(self, value: Value, buffer: Buffer) -> None:
        """Place a value in a buffer."""
        value.buffer = buffer
        buffer.values += 1

    def drop(self, value: Value) -> None:
        """Nobody needs the value any longer."""
        value.buffer.values -= 1
        self.give_back(value.buffer)

    def dispatch(self, count: int, buffers: Iterable[Buffer]) -> None:
        """So many dispatches that read buffers; older ones end."""
        held = list(buffers)
        for buffer in held:
            buffer.pending += 1
        self.dispatched += count
        self.under_way.append((self.dispatched, held))
        self.finish(self.dispatched - self.dispatched % DISPATCHES - DISPATCHES * TASKS)

    def finish(self, until: float = math.inf) -> None:
        """End what was dispatched up to there."""
        while self.under_way and self.under_way[0][0] <= until:
            for buffer in self.under_way.popleft()[1]:
                buffer.pending -= 1
                self.give_back(buffer)
