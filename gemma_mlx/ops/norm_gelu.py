"""gelu_tanh(norm(x) · weight), what follows the wide convolutions of Gemma 3n's vision tower, in one pass.

The gradient of the weight is a launch of its own, that a lazy graph runs only where the weight trains. It adds up rows
in blocks and then the blocks: the same result in every run.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

WIDEST = 8192
"""Values of a row, at most: a thread holds eight."""
ROWS = 128
"""Rows of a block of the weight's gradient, at least; of the many pixels of a picture four times as many."""

HEADERS = ("rows.h", "gelu.h")
FORWARD = Kernel("norm_gelu", ("x", "weight", "constants"), ("out",), HEADERS)
BACKWARD = Kernel("norm_gelu_backward", ("x", "cotangent", "weight", "constants"), ("d_x", "inverses"), HEADERS)
WEIGHT = Kernel("norm_gelu_weight", ("x", "cotangent", "weight", "inverses"), ("partials",), ("gelu.h",))


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), torch's ``gelu(approximate="tanh")``.

    ``nn.gelu_approx`` with the cube as two products: a CPU takes a third less time for it and for its gradient.
    """
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def reference(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """`norm_gelu` in plain MLX."""
    return gelu_tanh(mx.fast.rms_norm(x, weight, eps))


def _rows(kernel: Kernel, inputs: list[mx.array], shapes: list, dtypes: list) -> list[mx.array]:
    """A kernel of rows: as many SIMD groups for each as leave a thread eight values; four rows or more for a weight."""
    count, width = inputs[0].shape
    simds = -(-width // 256)
    rows = max(1, 8 // simds)
    turns = -(-4 // rows)
    return kernel(
        inputs,
        template={
            "T": inputs[0].dtype, "ROWS": rows, "TURNS": turns, "SIMDS": simds, "VALUES": -(-width // (32 * simds))
        },
        grid=(-(-count // (rows * turns)) * rows * simds * 32, 1, 1),
        threadgroup=(rows * simds * 32, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )  # fmt: skip


def _weight_gradient(x: mx.array, cotangent: mx.array, weight: mx.array, inverses: mx.array) -> mx.array:
    count, width = x.shape
    rows = ROWS if count <= 256 * ROWS else 4 * ROWS
    blocks, threads = -(-count // rows), 64
    (partials,) = WEIGHT(
        [x, cotangent, weight, inverses],
        template={"ROWS": rows, "THREADS": threads},
        grid=(-(-width // threads) * threads, blocks, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(blocks, width)],
        dtypes=[mx.float32],
    )
    return partials.sum(axis=0).astype(weight.dtype)


def _launched(eps: float):
    """The op of x and the weight; it keeps no more than those."""
    constants = mx.array([eps], mx.float32)

    def forward(x: mx.array, weight: mx.array) -> list[mx.array]:
        rows = x.reshape(-1, x.shape[-1])
        (out,) = _rows(FORWARD, [rows, weight, constants], [rows.shape], [x.dtype])
        return [out.reshape(x.shape)]

    def backward(inputs: tuple, cotangents: tuple, _outputs: tuple) -> list[mx.array]:
        x, weight = inputs
        rows, cotangent = (a.reshape(-1, x.shape[-1]) for a in (x, cotangents[0]))
        shapes, dtypes = [rows.shape, rows.shape[:1]], [x.dtype, mx.float32]
        d_x, inverses = _rows(BACKWARD, [rows, cotangent, weight, constants], shapes, dtypes)
        return [d_x.reshape(x.shape), _weight_gradient(rows, cotangent, weight, inverses)]

    return custom_function(forward, backward)


def norm_gelu(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """gelu_tanh(x · (mean(x²) + eps)^(−1/2) · weight) over the last axis, in the dtype of x.

    Float32 inside, rounded once; plain MLX rounds after the norm, and keeps that and x for the gradient, where this
    keeps x alone.

    Args:
        x: [..., width].
        weight: [width] in the dtype of x.
        eps: added to the mean square.
    """
    if dispatch.runs("norm_gelu") and x.shape[-1] <= WIDEST and one_dtype(x, weight):
        return _launched(eps)(x, weight)[0]
    return reference(x, weight, eps)


def _sizes(*shape: int):
    return lambda random, dtype: [*random_arrays(random, dtype, [shape, shape[-1:]]), 1e-6]


OP = Op(
    name="norm_gelu",
    kernels=(FORWARD, BACKWARD, WEIGHT),
    function=norm_gelu,
    reference=reference,
    sizes={"small": _sizes(1, 3, 5, 264), "real": _sizes(1, 48, 48, 2560)},
    wrt=(0, 1),
)
