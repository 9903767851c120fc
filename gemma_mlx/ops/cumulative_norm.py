"""relu of Gemma 3n's cumulative group norm: each frame is normed by all that was heard up to it.

Sums of a frame, a scan over frames, the norm: three launches that move 3 values for each. The gradient of x takes three
more that move 5; that of the weight is a launch of its own, which a lazy graph runs only where it trains. A scan is one
SIMD group a clip; one pass for everything would leave all but one threadgroup of a GPU idle.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays, row_groups, row_template

WIDEST = 16384
"""Values of a frame, at most: a thread holds sixteen."""
ROWS = 256
"""Rows of a block of the weight's gradient."""

STATS = Kernel("cumulative_norm_stats", ("x",), ("sums", "squares"), ("reduce.h",))
SCAN = Kernel("cumulative_norm_scan", ("sums", "squares", "constants"), ("means", "inverses"), ("scan.h",))
APPLY = Kernel("cumulative_norm", ("x", "weight", "means", "inverses"), ("out",))
PULLS = Kernel("cumulative_norm_pulls", ("x", "cotangent", "weight", "means"), ("pulls", "leans"), ("reduce.h",))
UNSCAN = Kernel(
    "cumulative_norm_unscan",
    ("sums", "means", "inverses", "pulls", "leans", "constants"),
    ("d_squares", "d_sums"),
    ("scan.h",),
)
BACKWARD = Kernel(
    "cumulative_norm_backward", ("x", "cotangent", "weight", "means", "inverses", "d_squares", "d_sums"), ("d_x",)
)
WEIGHT = Kernel("cumulative_norm_weight", ("x", "cotangent", "weight", "means", "inverses"), ("partials",))


def reference(x: mx.array, weight: mx.array, eps: float = 1e-3) -> mx.array:
    """`cumulative_norm` in plain MLX."""
    values = x.astype(mx.float32)
    count = mx.arange(1, x.shape[1] + 1).astype(mx.float32)[None, :, None, None] * (x.shape[2] * x.shape[3])
    mean = mx.cumsum(mx.sum(values, axis=(2, 3), keepdims=True), axis=1) / count
    centred = values - mean
    variance = mx.cumsum(mx.sum(mx.square(centred), axis=(2, 3), keepdims=True), axis=1) / count
    return nn.relu((centred * mx.rsqrt(variance + eps) * weight.astype(mx.float32)).astype(x.dtype))


def _by_frame(kernel: Kernel, arrays: list[mx.array], dtype: mx.Dtype | None = None) -> list[mx.array]:
    """A launch of a group a frame: outputs shaped as x in `dtype`, or one float32 a frame."""
    x = arrays[0]
    template = row_template(x.shape[1])
    grid, threadgroup = row_groups(x.shape[0], template["THREADS"])
    count = len(kernel.outputs)
    if dtype is not None:
        template |= {"T": dtype}
    return kernel(
        arrays,
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        shapes=[x.shape[:1] if dtype is None else x.shape] * count,
        dtypes=[dtype or mx.float32] * count,
    )


def _by_clip(kernel: Kernel, arrays: list[mx.array], constants: mx.array, clips: int) -> list[mx.array]:
    """A launch of a SIMD group a clip over numbers of its frames."""
    given = [a.reshape(clips, -1) for a in arrays]
    grid, threadgroup = row_groups(clips, 32)
    shape = given[0].shape
    made = kernel(
        [*given, constants],
        template={},
        grid=grid,
        threadgroup=threadgroup,
        shapes=[shape] * 2,
        dtypes=[mx.float32] * 2,
    )
    return [a.reshape(-1) for a in made]


def _weight_gradient(x: mx.array, cotangent: mx.array, weight: mx.array, means: mx.array, inverses: mx.array):
    """float32 [channels]."""
    channels = weight.shape[0]
    rows = x.reshape(-1, channels)
    blocks, threads = -(-rows.shape[0] // ROWS), 64
    (partials,) = WEIGHT(
        [rows, cotangent.reshape(rows.shape), weight, means, inverses],
        template={"ROWS": ROWS, "PER_FRAME": x.shape[1] // channels, "THREADS": threads},
        grid=(-(-channels // threads) * threads, blocks, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(blocks, channels)],
        dtypes=[mx.float32],
    )
    return partials.sum(axis=0)


def _launched(eps: float, clips: int):
    """The op of x [frames of all clips, width] and weight; keeps four numbers a frame."""

    def forward(x: mx.array, weight: mx.array) -> list[mx.array]:
        constants = mx.array([eps, x.shape[1]], mx.float32)
        sums, squares = _by_frame(STATS, [x])
        means, inverses = _by_clip(SCAN, [sums, squares], constants, clips)
        return [_by_frame(APPLY, [x, weight, means, inverses], x.dtype)[0], sums, means, inverses]

    def backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        (x, weight), cotangent = inputs, cotangents[0]
        _, sums, means, inverses = outputs
        constants = mx.array([eps, x.shape[1]], mx.float32)
        pulls, leans = _by_frame(PULLS, [x, cotangent, weight, means])
        d_squares, d_sums = _by_clip(UNSCAN, [sums, means, inverses, pulls, leans], constants, clips)
        given = [x, cotangent, weight, means, inverses, d_squares, d_sums]
        d_weight = _weight_gradient(x, cotangent, weight, means, inverses)
        return [_by_frame(BACKWARD, given, x.dtype)[0], d_weight.astype(weight.dtype)]

    return custom_function(forward, backward)


def cumulative_norm(x: mx.array, weight: mx.array, eps: float = 1e-3) -> mx.array:
    """relu((x − mean) · (variance + eps)^(−1/2) · weight), in the dtype of x, float32 inside.

    The mean at time t is that of all values up to t; the variance at t is the mean of the squared differences, each
    from the mean at its own time (transformers' ``Gemma3nAudioCumulativeGroupNorm``, then relu).

    Args:
        x: [clips, frames, bins, channels].
        weight: [channels] in the dtype of x.
        eps: added to the variance.
    """
    width = x.shape[2] * x.shape[3]
    if not (dispatch.runs("cumulative_norm") and one_dtype(x, weight) and 0 < width <= WIDEST):
        return reference(x, weight, eps)
    frames = x.reshape(-1, width)
    return _launched(eps, x.shape[0])(frames, weight)[0].reshape(x.shape)


def _sizes(*shape: int):
    return lambda random, dtype: [*random_arrays(random, dtype, [shape, shape[-1:]]), 1e-3]


OP = Op(
    name="cumulative_norm",
    kernels=(STATS, SCAN, APPLY, PULLS, UNSCAN, BACKWARD, WEIGHT),
    function=cumulative_norm,
    reference=reference,
    sizes={"small": _sizes(2, 35, 3, 43), "real": _sizes(1, 1500, 64, 128)},
    wrt=(0, 1),
)
