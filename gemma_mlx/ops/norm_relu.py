"""relu(layer_norm(x) · weight), 0 where a mask says so: what follows the audio tower's strided convolutions.

2 values moved for each forward and 3 backward, where MLX's own ops move 4 (6 uncompiled) and 7; rows that the mask
leaves out are not read. The gradient of the weight is a launch of its own, that a lazy graph runs only where it trains.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

WIDEST = 256
"""Values of a row, at most: a lane holds eight."""
ROWS = 256
"""Rows of a block of the weight's gradient."""

HEADERS = ("layer_rows.h",)
FORWARD = Kernel("norm_relu", ("x", "weight", "valid", "constants"), ("out",), HEADERS)
BACKWARD = Kernel("norm_relu_backward", ("x", "weight", "valid", "constants", "cotangent"), ("d_x",), HEADERS)
WEIGHT = Kernel("norm_relu_weight", ("x", "weight", "valid", "constants", "cotangent"), ("partials",), HEADERS)


def reference(x: mx.array, weight: mx.array, eps: float = 1e-6, valid: mx.array | None = None) -> mx.array:
    """`norm_relu` in plain MLX."""
    out = nn.relu(mx.fast.layer_norm(x, weight, None, eps))
    if valid is None:
        return out
    return out * valid.reshape(*valid.shape, *[1] * (x.ndim - valid.ndim)).astype(x.dtype)


def _launched(eps: float, per_mask: int):
    """The op of x [rows, width], weight and valid (or what stands in for it, where `per_mask` is 0)."""
    constants = mx.array([eps], mx.float32)

    def launch(kernel: Kernel, inputs: list, rows: int, shape: tuple, dtype: mx.Dtype, **template) -> mx.array:
        x = inputs[0]
        template |= {"VALUES": -(-x.shape[1] // 32), "PER_MASK": max(per_mask, 1), "MASKED": per_mask > 0}
        return kernel(
            inputs,
            template={"T": x.dtype, **template},
            grid=(-(-x.shape[0] // rows) * 256, 1, 1),
            threadgroup=(256, 1, 1),
            shapes=[shape],
            dtypes=[dtype],
        )[0]

    def forward(x: mx.array, weight: mx.array, valid: mx.array) -> list[mx.array]:
        return [launch(FORWARD, [x, weight, valid, constants], 8, x.shape, x.dtype)]

    def backward(inputs: tuple, cotangents: tuple, _: tuple) -> list[mx.array]:
        x, weight, valid = inputs
        given = [*inputs, constants, cotangents[0]]
        shape = (-(-x.shape[0] // ROWS), x.shape[1])
        partials = launch(WEIGHT, given, ROWS, shape, mx.float32, ROWS=ROWS)
        d_x = launch(BACKWARD, given, 8, x.shape, x.dtype)
        return [d_x, partials.sum(axis=0).astype(weight.dtype), mx.zeros_like(valid)]

    return custom_function(forward, backward)


def norm_relu(x: mx.array, weight: mx.array, eps: float = 1e-6, valid: mx.array | None = None) -> mx.array:
    """relu((x − mean) · (variance + eps)^(−1/2) · weight) over the last axis, in the dtype of x, float32 inside.

    Args:
        x: [M, F, ..., width].
        weight: [width] in the dtype of x.
        eps: added to the (population) variance.
        valid: bool [M, F] or None; where it is false the result is 0, and so is the gradient.
    """
    fits = one_dtype(x, weight) and x.shape[-1] <= WIDEST
    if not (dispatch.runs("norm_relu") and fits):
        return reference(x, weight, eps, valid)
    rows = x.reshape(-1, x.shape[-1])
    given = mx.ones((1,), mx.bool_) if valid is None else valid.reshape(-1)
    run = _launched(eps, 0 if valid is None else rows.shape[0] // valid.size)
    return run(rows, weight, given)[0].reshape(x.shape)


def _sizes(clips: int, frames: int, bins: int, width: int):
    def make(random, dtype: mx.Dtype) -> list:
        x, weight = random_arrays(random, dtype, [(clips, frames, bins, width), (width,)])
        lengths = frames - 3 * mx.arange(clips)
        return [x, weight, 1e-6, mx.arange(frames)[None] < lengths[:, None]]

    return make


OP = Op(
    name="norm_relu",
    kernels=(FORWARD, BACKWARD, WEIGHT),
    function=norm_relu,
    reference=reference,
    sizes={"small": _sizes(2, 7, 3, 67), "real": _sizes(1, 1500, 64, 128)},
    wrt=(0, 1),
)
