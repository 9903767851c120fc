"""A clamp between two bounds whose gradient keeps one bit for each value, where autodiff keeps the values."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import STREAM, one_dtype, random_arrays, stream

FORWARD = Kernel("clamp", ("x", "low", "high"), ("out", "within"))
BACKWARD = Kernel("clamp_backward", ("cotangent", "within"), ("d_x",))
THREADS = 128


@partial(mx.compile, shapeless=True)
def _between(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return mx.clip(x, low.astype(x.dtype), high.astype(x.dtype))


@partial(mx.compile, shapeless=True)
def _masked(x: mx.array, low: mx.array, high: mx.array, cotangent: mx.array) -> mx.array:
    return mx.where((x >= low.astype(x.dtype)) & (x <= high.astype(x.dtype)), cotangent, mx.zeros_like(cotangent))


_plain = custom_function(
    lambda x, low, high: [_between(x, low, high)],
    lambda inputs, cotangents, _: [_masked(*inputs, cotangents[0]), *map(mx.zeros_like, inputs[1:])],
)


def reference(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """`clamp` in plain MLX; keeps x for the gradient."""
    return _plain(x, low, high)[0]


def _forward(x: mx.array, low: mx.array, high: mx.array) -> list[mx.array]:
    count = x.size
    packed = -(-count // 8)
    out, within = FORWARD(
        [x.reshape(-1), low.reshape(1), high.reshape(1)],
        template={"T": x.dtype, "THREADS": THREADS},
        grid=(-(-packed // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[(count,), (packed,)],
        dtypes=[x.dtype, mx.uint8],
    )
    return [out.reshape(x.shape), within]


def _backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
    cotangent = cotangents[0]
    grid, threadgroup = stream(cotangent.size)
    (d_x,) = BACKWARD(
        [cotangent.reshape(-1), outputs[1]],
        template={"T": cotangent.dtype, **STREAM},
        grid=grid,
        threadgroup=threadgroup,
        shapes=[(cotangent.size,)],
        dtypes=[cotangent.dtype],
    )
    return [d_x.reshape(cotangent.shape), *map(mx.zeros_like, inputs[1:])]


_launched = custom_function(_forward, _backward)


def clamp(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """max(low, min(x, high)) in the dtype of x, in which the bounds, scalars, are read. NaN stays NaN.

    The gradient of x passes between the bounds and on them, as torch's does (``mx.clip``'s stops on them). The bounds
    have none.
    """
    if dispatch.runs("clamp") and one_dtype(x) and low.size == high.size == 1:
        return _launched(x, low, high)[0]
    return reference(x, low, high)


def _sizes(*shape: int):
    return lambda random, dtype: [*random_arrays(random, dtype, [shape], 2.0), mx.array(-1.5), mx.array(2.25)]


OP = Op(
    name="clamp",
    kernels=(FORWARD, BACKWARD),
    function=clamp,
    reference=reference,
    sizes={"small": _sizes(3, 347), "real": _sizes(2520, 3072)},
    wrt=(0,),
)
