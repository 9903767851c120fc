"""The middle of a conformer's light convolution: gated linear unit, causal depthwise convolution, norm, silu.

The forward is one launch, the gradient of its input another; the gradients of the convolution's and the norm's weights
are a launch of their own, that a lazy graph runs only where they train. All compute the convolution again, in
registers, as they go through the frames; kept are the input and a float32 for each frame.

Bytes moved for F frames of C channels of s bytes, blocks of R frames, a kernel of K taps, n = ⌈F / R⌉ blocks
(weights, K + 1 values a channel and block, apart): forward s·C·(2·(F + n·(K − 1)) + F) + 4·F; gradient of the input
s·C·(2·(F + 2·n·(K − 1)) + F + n·(K − 1) + 2·F) + 4·F; less what blocks at the ends of a clip need not read.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

ROWS, WEIGHT_ROWS = 16, 64
"""Frames of a block; of one of the weights' gradients."""
THREADS = 512
"""Of a group, at most: each keeps some twenty float32 for a channel."""
WIDEST, LONGEST = 2048, 8
"""Channels and taps, at most, in a kernel."""

HEADERS = ("reduce.h", "glu_conv.h")
INPUTS = ("x", "taps", "weight", "constants")
FORWARD = Kernel("glu_conv", INPUTS, ("out", "inverses"), HEADERS)
BACKWARD = Kernel("glu_conv_backward", (*INPUTS, "cotangent", "inverses"), ("d_x",), HEADERS)
WEIGHTS = Kernel("glu_conv_weights", (*INPUTS, "cotangent", "inverses"), ("partials",), HEADERS)


def limited(x: mx.array, limit: float) -> mx.array:
    """clamp(x, ±min(limit, largest finite)). The checkpoints' 1e10 can only be reached in overflow: float16 alone."""
    if limit >= 1e10 and x.dtype != mx.float16:
        return x
    limit = min(limit, float(mx.finfo(x.dtype).max))
    return mx.clip(x, -limit, limit)


def depthwise_causal_conv(x: mx.array, weight: mx.array) -> mx.array:
    """x [M, T, C], weight [C, k, 1]: y[t] = Σ_i weight[i] · x[t − k + 1 + i], zeros before the clip.

    k shifted multiply-adds instead of ``mx.conv1d(groups=C)``: on a CPU at [1, 750, 1024], k = 5, 3.9 ms against
    16.1 ms forward, 6.0 against 15.0 ms with the gradient of x, 23 against 46 ms with both gradients.
    """
    kernel, frames = weight.shape[1], x.shape[1]
    x = mx.pad(x, [(0, 0), (kernel - 1, 0), (0, 0)])
    return sum(x[:, i : i + frames] * weight[:, i, 0] for i in range(kernel))


def reference(x: mx.array, taps: mx.array, weight: mx.array, eps: float = 1e-6, limit: float = 1e10) -> mx.array:
    """`glu_conv` in plain MLX."""
    value, gate = mx.split(x, 2, axis=-1)
    y = depthwise_causal_conv(value * mx.sigmoid(gate), taps)
    return nn.silu(mx.fast.rms_norm(limited(y, limit), weight, eps))


def _launch(kernel: Kernel, inputs: list[mx.array], rows: int, shapes: list, dtypes: list) -> list[mx.array]:
    x, taps = inputs[:2]
    channels, kernel_size = taps.shape
    threads = min(THREADS, 32 * -(-channels // 64))
    values = -(-channels // threads)
    return kernel(
        inputs,
        template={"T": x.dtype, "KERNEL": kernel_size, "THREADS": threads, "VALUES": values, "ROWS": rows},
        grid=(-(-x.shape[1] // rows) * threads, x.shape[0], 1),
        threadgroup=(threads, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )


def _launched(eps: float, limit: float):
    """The op of x, taps [C, K] and weight; keeps them and a number for each frame."""
    constants = mx.array([eps, limit], mx.float32)

    def forward(x: mx.array, taps: mx.array, weight: mx.array) -> list[mx.array]:
        shapes = [(*x.shape[:2], taps.shape[0]), x.shape[:2]]
        return _launch(FORWARD, [x, taps, weight, constants], ROWS, shapes, [x.dtype, mx.float32])

    def backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        x, taps, weight = inputs
        given = [*inputs, constants, cotangents[0], outputs[1]]
        (d_x,) = _launch(BACKWARD, given, ROWS, [x.shape], [x.dtype])
        blocks = x.shape[0] * -(-x.shape[1] // WEIGHT_ROWS)
        shape = (blocks, taps.shape[1] + 1, taps.shape[0])
        (partials,) = _launch(WEIGHTS, given, WEIGHT_ROWS, [shape], [mx.float32])
        sums = partials.sum(axis=0)
        return [d_x, sums[:-1].T.astype(taps.dtype), sums[-1].astype(weight.dtype)]

    return custom_function(forward, backward)


def glu_conv(x: mx.array, taps: mx.array, weight: mx.array, eps: float = 1e-6, limit: float = 1e10) -> mx.array:
    """silu(rms_norm(limited(conv(value · sigmoid(gate)))) · weight), [M, F, C] in the dtype of x, float32 inside.

    Args:
        x: [M, F, 2 · C]: values, then gates.
        taps: [C, K, 1] of the causal depthwise convolution along frames, the last for the frame itself.
        weight: [C] of the norm.
        eps: added to the mean square.
        limit: what the convolution's result is clamped to, ±; from 1e10 on it is the dtype's largest value.
    """
    fits = one_dtype(x, taps, weight) and taps.shape[0] <= WIDEST and taps.shape[1] <= LONGEST
    if not (dispatch.runs("glu_conv") and fits):
        return reference(x, taps, weight, eps, limit)
    largest = float(mx.finfo(x.dtype).max)
    return _launched(eps, min(limit, largest) if limit < 1e10 else largest)(x, taps[..., 0], weight)[0]


def _sizes(clips: int, frames: int, channels: int):
    def make(random, dtype: mx.Dtype) -> list:
        return random_arrays(random, dtype, [(clips, frames, 2 * channels), (channels, 5, 1), (channels,)])

    return make


OP = Op(
    name="glu_conv",
    kernels=(FORWARD, BACKWARD, WEIGHTS),
    function=glu_conv,
    reference=reference,
    sizes={"small": _sizes(2, 19, 67), "real": _sizes(1, 750, 1024)},
    wrt=(0, 1, 2),
)
