"""gelu_tanh(top(gate)) · x, the middle of Gemma 3n's sparse MLPs: `top` keeps what lies far above a row's mean."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.gated_gelu import reference as gated_gelu
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays, row_groups, row_template

WIDEST = 16384
"""Values of a row, at most: a thread holds sixteen."""

HEADERS = ("reduce.h", "gelu.h")
FORWARD = Kernel("sparse_gelu", ("gate", "x", "quantile"), ("out", "means", "deviations"), HEADERS)
BACKWARD = Kernel(
    "sparse_gelu_backward",
    ("gate", "x", "cotangent", "means", "deviations", "quantile"),
    ("d_gate", "d_x"),
    HEADERS,
)


@cache
def _quantile(sparsity: float) -> float:
    return NormalDist().inv_cdf(sparsity)


def gaussian_top_k(x: mx.array, sparsity: float) -> mx.array:
    """max(0, x − (mean + z·std)) over the last axis, z the normal quantile of `sparsity`; population std.

    Gradients flow through mean and std: the threshold is a function of the whole row. z is rounded to the dtype of x,
    as the reference rounds it.
    """
    mean = mx.mean(x, axis=-1, keepdims=True)
    std = mx.sqrt(mx.mean(mx.square(x - mean), axis=-1, keepdims=True))
    return mx.maximum(x - (mean + std * mx.array(_quantile(sparsity), x.dtype)), 0)


def reference(gate: mx.array, x: mx.array, sparsity: float) -> mx.array:
    """`sparse_gelu` in plain MLX."""
    return gated_gelu(gaussian_top_k(gate, sparsity), x)


def _launch(kernel: Kernel, arrays: list[mx.array], count: int) -> list[mx.array]:
    """A kernel of rows; the first `count` outputs are shaped as the first input, the others one float32 a row."""
    like = arrays[0]
    template = row_template(like.shape[1])
    grid, threadgroup = row_groups(like.shape[0], template["THREADS"])
    others = len(kernel.outputs) - count
    return kernel(
        arrays,
        template={"T": like.dtype, **template},
        grid=grid,
        threadgroup=threadgroup,
        shapes=[like.shape] * count + [like.shape[:1]] * others,
        dtypes=[like.dtype] * count + [mx.float32] * others,
    )


def _launched(sparsity: float):
    """The op; keeps its inputs and two numbers a row."""

    def rows(x: mx.array) -> mx.array:
        return x.reshape(-1, x.shape[-1])

    def forward(gate: mx.array, x: mx.array) -> list[mx.array]:
        quantile = mx.array([_quantile(sparsity)], gate.dtype).astype(mx.float32)
        out, *stats = _launch(FORWARD, [rows(gate), rows(x), quantile], 1)
        return [out.reshape(x.shape), *stats]

    def backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        gate, x = inputs
        quantile = mx.array([_quantile(sparsity)], gate.dtype).astype(mx.float32)
        made = _launch(BACKWARD, [rows(gate), rows(x), rows(cotangents[0]), *outputs[1:], quantile], 2)
        return [a.reshape(x.shape) for a in made]

    return custom_function(forward, backward)


def sparse_gelu(gate: mx.array, x: mx.array, sparsity: float) -> mx.array:
    """gelu_tanh(max(0, gate − mean − z·std)) · x in their dtype, for arrays [..., width] of one shape.

    Mean and population std over the last axis, in float32 in the kernel; z the normal quantile of `sparsity`
    (transformers' ``Gemma3nTextMLP``). Gradients flow through mean and std; without deviation, not through the std.
    """
    fits = gate.shape == x.shape and 0 < gate.shape[-1] <= WIDEST
    if dispatch.runs("sparse_gelu") and fits and one_dtype(gate, x):
        return _launched(sparsity)(gate, x)[0]
    return reference(gate, x, sparsity)


_SPARSITY = NormalDist().cdf(1.5)
"""Near the checkpoints' 0.95, of a quantile that is the same in every dtype: at the threshold the gradient jumps."""

OP = Op(
    name="sparse_gelu",
    kernels=(FORWARD, BACKWARD),
    function=sparse_gelu,
    reference=reference,
    sizes={
        "small": lambda random, dtype: [*random_arrays(random, dtype, [(3, 301)] * 2), _SPARSITY],
        "real": lambda random, dtype: [*random_arrays(random, dtype, [(512, 8192)] * 2), _SPARSITY],
    },
    wrt=(0, 1),
)
