"""gelu_tanh(gate) · x, the middle of every MLP, with a gradient that keeps little of it."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from gemma_mlx.ops.custom import custom_function

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


def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """0.5 · gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) · x, in their dtype, for arrays of one shape.

    torch's ``gelu(gate, approximate="tanh") * x``. Plain MLX would keep every step of the formula for the gradient;
    this keeps gate, x and the tanh.
    """
    return _gated(gate, x)[0]
