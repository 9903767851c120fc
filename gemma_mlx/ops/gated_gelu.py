"""gelu_tanh(gate) · x, the middle of every MLP, with a gradient that keeps little of it."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import STREAM, one_dtype, random_arrays, stream

FORWARD = Kernel("gated_gelu", ("gate", "x"), ("out",), ("gelu.h",))
BACKWARD = Kernel("gated_gelu_backward", ("gate", "x", "cotangent"), ("d_gate", "d_x"), ("gelu.h",))

_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


@partial(mx.compile, shapeless=True)
def _forward(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    # The cube as two products: a CPU's power is slow.
    tanh = mx.tanh(_SLOPE * (gate + _CUBE * (gate * gate * gate)))
    return 0.5 * gate * (1 + tanh) * x, tanh


@partial(mx.compile, shapeless=True)
def _backward(gate: mx.array, x: mx.array, tanh: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * (_SLOPE * (1 + 3 * _CUBE * (gate * gate)))
    return cotangent * x * slope, cotangent * (0.5 * gate * (1 + tanh))


def _gated_vjp(inputs: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
    # A compiled step would otherwise keep 0.5 · gate and 1 + tanh, which both passes compute, for the second one.
    gate, x, tanh = mx.depends([*inputs, outputs[1]], [cotangents[0]])
    return _backward(gate, x, tanh, cotangents[0])


_gated = custom_function(lambda gate, x: _forward(gate, x), _gated_vjp)


def reference(gate: mx.array, x: mx.array) -> mx.array:
    """`gated_gelu` in plain MLX; keeps gate, x and the tanh for the gradient."""
    return _gated(gate, x)[0]


def _launch(kernel: Kernel, *arrays: mx.array) -> list[mx.array]:
    like, outputs = arrays[0], len(kernel.outputs)
    grid, threadgroup = stream(like.size)
    made = kernel(
        [a.reshape(-1) for a in arrays],
        template={"T": like.dtype, **STREAM},
        grid=grid,
        threadgroup=threadgroup,
        shapes=[(like.size,)] * outputs,
        dtypes=[like.dtype] * outputs,
    )
    return [a.reshape(like.shape) for a in made]


_launched = custom_function(
    lambda gate, x: _launch(FORWARD, gate, x),
    lambda inputs, cotangents, outputs: _launch(BACKWARD, *inputs, cotangents[0]),
)


def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """0.5 · gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) · x, in their dtype, for arrays of one shape.

    torch's ``gelu(gate, approximate="tanh") * x``. Plain MLX would keep every step of the formula for the gradient;
    this keeps gate and x, and without a kernel the tanh.
    """
    if dispatch.runs("gated_gelu") and gate.shape == x.shape and one_dtype(gate, x):
        return _launched(gate, x)[0]
    return reference(gate, x)


OP = Op(
    name="gated_gelu",
    kernels=(FORWARD, BACKWARD),
    function=gated_gelu,
    reference=reference,
    sizes={
        "small": lambda random, dtype: random_arrays(random, dtype, [(5, 411)] * 2, 2.0),
        "real": lambda random, dtype: random_arrays(random, dtype, [(2520, 3072)] * 2, 2.0),
    },
    wrt=(0, 1),
)
