"""What evaluating a graph holds in memory at its peak: MLX's rules for which operation writes where."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gemma_mlx.graph import Buffer, Graph, Memory, Operation, Shape, Value, order

DONATION_EXTRA = 16_384
"""An input's buffer may be so many bytes larger than what is written into it."""
_UNARY = """Abs ArcCos ArcSin ArcTan Ceil Cos Cosh Erf ErfInv Exp Expm1 Floor Log Log1p LogicalNot Negative Round
Rsqrt Sigmoid Sign Sin Sinh Sqrt Square Tan Tanh BitwiseInvert Real"""
_BINARY = """Add ArcTan2 BitwiseBinary Divide Equal Greater GreaterEqual Less LessEqual LogAddExp LogicalAnd LogicalOr
Maximum Minimum Multiply NotEqual Power Remainder Subtract"""
UNARY, BINARY = frozenset(_UNARY.split()), frozenset(_BINARY.split())
"""Names of elementwise operations of one and two inputs."""
MATMUL = {"Matmul": 2, "AddMM": 2, "GatherMM": 2, "QuantizedMatmul": 4, "GatherQMM": 4}
"""Name -> inputs that are copied where they lie in no order that the product takes."""
INTO_FIRST = {"Scatter", "ScatterAxis", "SliceUpdate", "MaskedScatter", "Partition", "ArgPartition", "Sort"}
"""They change a copy of their first input, or that itself."""


def row_strides(shape: Shape) -> Shape:
    """Strides of a contiguous array."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _ordered(value: Value) -> bool:
    """Whether the last two axes are a matrix, or a transposed one, without gaps."""
    (rows, columns), (a, b) = value.shape[-2:], value.strides[-2:]
    return (a == columns and b == 1) or (a == 1 and b == rows)


class Evaluation:
    """Goes through operations and keeps account."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.temporaries: list[Buffer] = []
        self.dispatches = 0

    # --- where outputs go

    def fresh(self, out: Value) -> None:
        """Memory of its own."""
        self.memory.put(out, self.memory.allocate(out.size * out.item, out.kind))
        self._lay(out, row_strides(out.shape), out.size)

    def _lay(self, out: Value, strides: Shape, data_size: int) -> None:
        out.strides, out.data_size, out.contiguous, out.row = strides, data_size, True, True
        out.column = out.size == max(out.shape, default=1)

    def like(self, out: Value, a: Value) -> None:
        """Memory of its own, laid out as an input."""
        self.memory.put(out, self.memory.allocate(a.data_size * out.item, out.kind))
        self._as(out, a)

    def _as(self, out: Value, a: Value) -> None:
        out.strides, out.data_size = a.strides, a.data_size
        out.contiguous, out.row, out.column = a.contiguous, a.row, a.column

    def share(self, out: Value, a: Value) -> None:
        """The buffer of an input."""
        self.memory.put(out, a.buffer)
        self._as(out, a)

    def donates(self, a: Value, out: Value) -> bool:
        """Whether an output may be written into an input: nobody else needs that one or its buffer."""
        alone = a.users == 1 and a.buffer.values == 1 and a.buffer.pending == 0
        return alone and a.item == out.item and a.buffer.bytes <= out.size * out.item + DONATION_EXTRA

    def temporary(self, size: int) -> None:
        """Memory until the operation is done."""
        buffer = self.memory.allocate(size, "activations")
        self.temporaries.append(buffer)
        self.dispatches += 1

    # --- operations

    def run(self, operation: Operation) -> None:
        """Evaluate one."""
        self.dispatches, self.temporaries = 1, []
        name, inputs, outputs = operation.name, operation.inputs, operation.outputs
        if name in _VIEWS:
            _VIEWS[name](self, operation)
        else:
            self.dispatches += 1
            self._compute(operation)
        mine = {v.buffer for v in outputs[:1]}
        buffers = {v.buffer for v in [*inputs, *outputs[1:]]} - mine
        self.memory.dispatch(self.dispatches, [*buffers, *self.temporaries])
        for v in outputs:
            if v.users == 0:
                self.memory.drop(v)
        for v in inputs:
            v.users -= 1
            if v.users == 0:
                self.memory.drop(v)

    def _compute(self, operation: Operation) -> None:
        name, inputs, outputs = operation.name, operation.inputs, operation.outputs
        out = outputs[0]
        if name in UNARY:
            self._unary(inputs[0], out)
        elif name in BINARY:
            self._binary(*inputs, out)
        elif name == "Select":
            self._select(*inputs, out)
        elif name == "AsType":
            self._copied(inputs[0], out, inputs[0].contiguous)
        elif name in INTO_FIRST:
            first = inputs[0]
            self._copied(first, out, first.contiguous and first.data_size == first.size)
        elif name == "Softmax":
            self._softmax(inputs[0], out)
        else:
            for v in outputs:
                self.fresh(v)
            for v in inputs[: MATMUL.get(name, 0)]:
                if len(v.shape) > 1 and not (_ordered(v) if name in ("Matmul", "AddMM", "GatherMM") else v.row):
                    self.temporary(v.size * v.item)
            self.dispatches += len(inputs) - 1 if name == "Concatenate" else name == "Pad"

    def _unary(self, a: Value, out: Value) -> None:
        if not a.contiguous:
            self.fresh(out)
        elif self.donates(a, out):
            self.share(out, a)
        else:
            self.like(out, a)

    def _binary(self, a: Value, b: Value, out: Value) -> None:
        if a.data_size == 1 and b.data_size == 1:
            self.memory.put(out, self.memory.allocate(out.item, out.kind))
            self._as(out, a)
        elif a.data_size == 1 and b.contiguous:
            self.share(out, b) if self.donates(b, out) else self.like(out, b)
        elif b.data_size == 1 and a.contiguous:
            self.share(out, a) if self.donates(a, out) else self.like(out, a)
        elif (a.row and b.row) or (a.column and b.column):
            donor = next((v for v in (a, b) if self.donates(v, out)), None)
            self.like(out, a) if donor is None else self.share(out, donor)
        else:
            self._into(out, (a, b))

    def _into(self, out: Value, candidates: tuple[Value, ...]) -> None:
        donor = next((v for v in candidates if v.row and v.size == out.size and self.donates(v, out)), None)
        self.fresh(out) if donor is None else self.share(out, donor)

    def _select(self, a: Value, b: Value, c: Value, out: Value) -> None:
        if a.data_size == b.data_size == c.data_size == 1:
            self.memory.put(out, self.memory.allocate(out.item, out.kind))
            self._as(out, b)
        else:
            self._into(out, (a, b, c))

    def _copied(self, a: Value, out: Value, vector: bool) -> None:
        if not vector:
            self.fresh(out)
        elif self.donates(a, out):
            self.share(out, a)
        else:
            self.like(out, a)

    def _softmax(self, a: Value, out: Value) -> None:
        if a.contiguous and a.strides[-1] == 1:
            alone = a.users == 1 and a.buffer.values == 1 and a.buffer.pending == 0
            self.share(out, a) if alone else self.like(out, a)
        else:
            self.fresh(out)
            self.dispatches += 1

    # --- views

    def _copy(self, operation: Operation) -> None:
        self.share(operation.outputs[0], operation.inputs[0])

    def _depends(self, operation: Operation) -> None:
        for out, a in zip(operation.outputs, operation.inputs, strict=False):
            self.share(out, a)

    def _custom(self, operation: Operation) -> None:
        outputs = operation.outputs
        for out, a in zip(outputs, operation.inputs[-len(outputs) :], strict=True):
            self.share(out, a)

    def _broadcast(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        self.share(out, a)
        new = len(out.shape) - len(a.shape)
        out.strides = (0,) * new + tuple(0 if n == 1 else s for n, s in zip(a.shape, a.strides, strict=True))
        if out.size > a.size:
            out.row = out.column = False

    def _expand(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        self.share(out, a)
        strides = list(a.strides)
        for axis in _numbers(operation.arguments):
            strides.insert(axis, 1)
        out.strides = tuple(strides)

    def _squeeze(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        self.share(out, a)
        axes = {axis % len(a.shape) for axis in _numbers(operation.arguments)}
        out.strides = tuple(s for i, s in enumerate(a.strides) if i not in axes)

    def _transpose(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        self.share(out, a)
        out.strides = tuple(a.strides[axis] for axis in _numbers(operation.arguments))
        if a.contiguous and a.data_size == a.size:
            out.row, out.column = _row_contiguous(out), _column_contiguous(out)

    def _slice(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        if out.size == 0:
            return self.fresh(out)
        self.share(out, a)
        steps = operation.arguments[2]
        out.strides = tuple(s * step for s, step in zip(a.strides, steps, strict=True))
        self._cut(out)

    def _cut(self, out: Value) -> None:
        out.data_size = 1 + sum(abs(s) * (n - 1) for n, s in zip(out.shape, out.strides, strict=True))
        spanned = math.prod(n for n, s in zip(out.shape, out.strides, strict=True) if s)
        out.row, out.column = _row_contiguous(out), _column_contiguous(out)
        out.contiguous = spanned == out.data_size

    def _split(self, operation: Operation) -> None:
        for out in operation.outputs:
            self.share(out, operation.inputs[0])
            self._cut(out)

    def _strided(self, operation: Operation) -> None:
        out = operation.outputs[0]
        self.share(out, operation.inputs[0])
        out.strides = tuple(operation.arguments[1])
        self._cut(out)

    def _reshape(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        strides = row_strides(out.shape) if a.row else _reshaped(a, out.shape)
        if strides is None:
            self.dispatches += 1
            self.fresh(out)
            return
        self.share(out, a)
        out.strides = strides
        if a.row:
            out.column = out.size == max(out.shape, default=1)

    def _contiguous(self, operation: Operation) -> None:
        a, out = operation.inputs[0], operation.outputs[0]
        if a.row and a.buffer.bytes <= out.size * out.item + DONATION_EXTRA:
            self.share(out, a)
        else:
            self.dispatches += 1
            self.fresh(out)

    def _full(self, operation: Operation) -> None:
        self.dispatches += 1
        a, out = operation.inputs[0], operation.outputs[0]
        self.fresh(out) if a.data_size == 1 else self._copied(a, out, a.contiguous)


_VIEWS = {
    "Copy": Evaluation._copy,
    "StopGradient": Evaluation._copy,
    "Depends": Evaluation._depends,
    "CustomTransforms": Evaluation._custom,
    "Broadcast": Evaluation._broadcast,
    "BroadcastAxes": Evaluation._broadcast,
    "ExpandDims": Evaluation._expand,
    "Squeeze": Evaluation._squeeze,
    "Transpose": Evaluation._transpose,
    "Slice": Evaluation._slice,
    "Split": Evaluation._split,
    "AsStrided": Evaluation._strided,
    "Reshape": Evaluation._reshape,
    "Flatten": Evaluation._reshape,
    "Unflatten": Evaluation._reshape,
    "Contiguous": Evaluation._contiguous,
    "Full": Evaluation._full,
}


def _numbers(arguments: list) -> list[int]:
    """The axes, given one by one or as a list."""
    first = arguments[0] if arguments else []
    return list(first) if isinstance(first, list | tuple) else list(arguments)


def _row_contiguous(v: Value) -> bool:
    return all(n == 1 or s == r for n, s, r in zip(v.shape, v.strides, row_strides(v.shape), strict=True))


def _column_contiguous(v: Value) -> bool:
    step = 1
    for n, s in zip(v.shape, v.strides, strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def _reshaped(a: Value, shape: Shape) -> Shape | None:
    """Strides of the same buffer in another shape, or None where it must be copied."""
    if not a.shape:
        return (0,) * len(shape)
    sizes, steps = [], []
    for n, s in zip(a.shape, a.strides, strict=True):
        if n == 1:
            continue
        if sizes and steps[-1] == s * n:
            sizes[-1], steps[-1] = sizes[-1] * n, s
        else:
            sizes.append(n)
            steps.append(s)
    strides, j = [], 0
    for n in shape:
        if j < len(sizes) and sizes[j] % n == 0:
            sizes[j] //= n
            strides.append(sizes[j] * steps[j])
            j += sizes[j] == 1
        elif n == 1 and strides:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)


def peak(graph: Graph, kinds: dict[str, str], held: Iterable[str] = ()) -> Memory:
    """The memory of an evaluation of the graph's outputs.

    Args:
        kinds: input's name -> kind of memory that it is counted as.
        held: inputs that the caller holds on to; the others' buffers are free once they have been read.
    """
    memory = Memory()
    evaluation = Evaluation(memory)
    operations = order(list(graph.outputs.values()))
    for v in graph.outputs.values():
        v.users += 1
    for name, v in graph.inputs.items():
        v.users += name in held
        if v.users:
            _place(memory, evaluation, v, kinds[name])
    for v in graph.constants:
        v.users += 1
        _place(memory, evaluation, v, "constants")
    for operation in operations:
        evaluation.run(operation)
    return memory


def _place(memory: Memory, evaluation: Evaluation, v: Value, kind: str) -> None:
    memory.put(v, memory.allocate(v.size * v.item, kind))
    evaluation._lay(v, row_strides(v.shape), v.size)
