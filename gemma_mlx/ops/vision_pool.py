"""Patches -> soft tokens: the mean of each cell, scaled and standardised, in one pass.

The norm that follows in ``embed_vision`` is not part of it: between them lies the choice of what is no padding, and
soft tokens of frozen towers are kept as they are here. The gradient is elementwise, and left to MLX.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

FORWARD = Kernel("vision_pool", ("x", "bias", "scale", "constants"), ("out",))
THREADS = 128


def reference(
    x: mx.array, cell: int, factor: float, bias: mx.array | None = None, scale: mx.array | None = None
) -> mx.array:
    """`vision_pool` in plain MLX."""
    n, p, d = x.shape
    dtype = x.dtype
    x = x.reshape(n, p // cell, cell, d).astype(mx.float32).mean(axis=2)
    x = x.astype(dtype).astype(mx.float32) * factor  # transformers rounds between mean and scale
    if bias is not None:
        x = (x - mx.stop_gradient(bias).astype(mx.float32)) * mx.stop_gradient(scale).astype(mx.float32)
    return x.astype(dtype)


def _launched(cell: int, factor: float, standard: bool):
    """The op of x, bias and scale (or what stands in for them); it keeps none of x."""
    constants = mx.array([factor], mx.float32)

    def forward(x: mx.array, bias: mx.array, scale: mx.array) -> list[mx.array]:
        n, p, d = x.shape
        cells = n * p // cell
        (out,) = FORWARD(
            [x.reshape(-1, d), bias, scale, constants],
            template={"T": x.dtype, "CELL": cell, "THREADS": THREADS, "STANDARD": standard},
            grid=(-(-d // THREADS) * THREADS, cells, 1),
            threadgroup=(THREADS, 1, 1),
            shapes=[(cells, d)],
            dtypes=[x.dtype],
        )
        return [out.reshape(n, p // cell, d)]

    def backward(inputs: tuple, cotangents: tuple, _outputs: tuple) -> list[mx.array]:
        x, bias, scale = inputs
        pull = cotangents[0].astype(mx.float32) * (factor / cell)
        pull = (pull * scale.astype(mx.float32) if standard else pull).astype(x.dtype)
        n, cells, d = pull.shape
        d_x = mx.broadcast_to(pull[:, :, None], (n, cells, cell, d)).reshape(x.shape)
        return [d_x, mx.zeros_like(bias), mx.zeros_like(scale)]

    return custom_function(forward, backward)


def vision_pool(
    x: mx.array, cell: int, factor: float, bias: mx.array | None = None, scale: mx.array | None = None
) -> mx.array:
    """(factor · mean of each cell − bias) · scale, [N, P / cell, width] in the dtype of x, float32 inside.

    Args:
        x: [N, P, width], the patches of a cell one after the other.
        cell: patches of a cell; P a multiple.
        factor: of the mean, which is rounded to the dtype of x before it.
        bias, scale: [width] in the dtype of x (``std_bias``, ``std_scale``), without gradients, or None.
    """
    given = [x, *(a for a in (bias, scale) if a is not None)]
    if not (dispatch.runs("vision_pool") and one_dtype(*given)):
        return reference(x, cell, factor, bias, scale)
    one = mx.ones((1,), x.dtype)
    bias, scale = (one, one) if bias is None else map(mx.stop_gradient, (bias, scale))
    return _launched(cell, factor, len(given) > 1)(x, bias, scale)[0]


def _sizes(patches: int, width: int):
    def make(random, dtype: mx.Dtype) -> list:
        x, bias, scale = random_arrays(random, dtype, [(1, patches, width), (width,), (width,)])
        return [x, 9, width**0.5, bias, scale]

    return make


OP = Op(
    name="vision_pool",
    kernels=(FORWARD,),
    function=vision_pool,
    reference=reference,
    sizes={"small": _sizes(27, 129), "real": _sizes(2520, 1152)},
    wrt=(0,),
)
