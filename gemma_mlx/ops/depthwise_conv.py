"""Depthwise 3 × 3 and 5 × 5 convolutions of channels-last pictures with "same" padding, with both their gradients.

MLX copies a padded picture for the forward. Of its gradients (Metal backend of 0.32), the weight's is a convolution of
transposed arrays with the cotangent for a kernel, a matrix product of one useful column for each channel; the input's
at stride 2 is a product with k² times unfolded cotangents. Here each is a launch that reads its arrays once, but for a
rim of 4 in 32 pixels. The weight's gradient, which a lazy graph computes only where the weight trains, adds up blocks
of pixels and then the blocks: the same result in every run.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

FORWARD = Kernel("depthwise_conv", ("x", "weight"), ("out",))
BACKWARD = Kernel("depthwise_conv_backward", ("cotangent", "weight", "size"), ("d_x",))
WEIGHT = Kernel("depthwise_conv_weight", ("x", "cotangent"), ("partials",))

OUTS, SIMDS, STRIP = 4, 8, 32
"""Outputs of a thread side by side; SIMD groups of a threadgroup, of 32 channels each; rows that they walk down."""
KERNELS, STRIDES = (3, 5), (1, 2)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis so that ceil(size / stride) outputs come of it; the odd one goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def reference(x: mx.array, weight: mx.array, stride: int = 1) -> mx.array:
    """`depthwise_conv` in plain MLX."""
    pads = [same_padding(n, weight.shape[1], stride) for n in x.shape[1:3]]
    return mx.conv2d(mx.pad(x, [(0, 0), *pads, (0, 0)]), weight, stride, groups=x.shape[-1])


def _blocks(rows: int, columns: int, images: int) -> tuple[int, int]:
    """Groups in y and in z over pictures of rows × columns."""
    return -(-columns // (SIMDS * OUTS)), -(-rows // STRIP) * images


def _launch(
    kernel: Kernel, inputs: list[mx.array], picture: tuple[int, ...], form: dict, shape: tuple[int, ...], kind: mx.Dtype
) -> mx.array:
    """A kernel with groups over the pixels of `picture`."""
    images, rows, columns, channels = picture
    across, down = _blocks(rows, columns, images)
    return kernel(
        inputs,
        template={"OUTS": OUTS, "SIMDS": SIMDS, "STRIP": STRIP, **form},
        grid=(-(-channels // 32) * 32 * SIMDS, across, down),
        threadgroup=(32 * SIMDS, 1, 1),
        shapes=[shape],
        dtypes=[kind],
    )[0]


def _launched(stride: int):
    """The op of x and the weight; it keeps no more than those."""

    def form(x: mx.array, weight: mx.array) -> dict:
        top, left = (same_padding(n, weight.shape[1], stride)[0] for n in x.shape[1:3])
        return {"K": weight.shape[1], "STRIDE": stride, "TOP": top, "LEFT": left}

    def forward(x: mx.array, weight: mx.array) -> list[mx.array]:
        images, height, width, channels = x.shape
        shape = (images, -(-height // stride), -(-width // stride), channels)
        return [_launch(FORWARD, [x, weight], shape, {"T": x.dtype, **form(x, weight)}, shape, x.dtype)]

    def backward(inputs: tuple, cotangents: tuple, _outputs: tuple) -> list[mx.array]:
        (x, weight), cotangent = inputs, cotangents[0]
        how = form(x, weight)
        size = mx.array(x.shape[1:3], mx.int32)
        d_x = _launch(BACKWARD, [cotangent, weight, size], x.shape, {"T": x.dtype, **how}, x.shape, x.dtype)
        images, rows, columns, channels = cotangent.shape
        across, down = _blocks(rows, columns, images)
        shape = (across * down, channels, weight.shape[1] ** 2)
        partials = _launch(WEIGHT, [x, cotangent], cotangent.shape, how, shape, mx.float32)
        return [d_x, partials.sum(axis=0).reshape(weight.shape).astype(weight.dtype)]

    return custom_function(forward, backward)


def depthwise_conv(x: mx.array, weight: mx.array, stride: int = 1) -> mx.array:
    """Each channel's own convolution, zeros around: [N, ⌈H / stride⌉, ⌈W / stride⌉, C] in the dtype of x.

    Float32 inside. The kernels take sides of 3 and 5 and strides of 1 and 2.

    Args:
        x: [N, H, W, C].
        weight: [C, k, k, 1] in the dtype of x.
        stride: pixels between outputs, along both axes; padding as in `same_padding`.
    """
    fits = x.ndim == 4 and weight.shape[1] == weight.shape[2] and weight.shape[1] in KERNELS and stride in STRIDES
    if dispatch.runs("depthwise_conv") and fits and one_dtype(x, weight):
        return _launched(stride)(x, weight)[0]
    return reference(x, weight, stride)


def _sizes(stride: int, side: int, channels: int, kernel: int):
    def make(random, dtype: mx.Dtype) -> list:
        shapes = [(1, side, side, channels), (channels, kernel, kernel, 1)]
        return [*random_arrays(random, dtype, shapes), stride]

    return make


OP = Op(
    name="depthwise_conv",
    kernels=(FORWARD, BACKWARD, WEIGHT),
    function=depthwise_conv,
    reference=reference,
    sizes={"small": _sizes(2, 11, 9, 3), "real": _sizes(1, 96, 1024, 5)},
    wrt=(0, 1),
)
