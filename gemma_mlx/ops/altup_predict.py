"""AltUp's prediction (arXiv 2301.13310): each of several residual streams plus a mix of all of them."""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays, row_groups, row_template

WIDEST = 16384
"""Values of a stream, at most."""
MOST_STREAMS = 4
"""The backward keeps streams² sums in a thread and 128 · streams² bytes of threadgroup memory."""

FORWARD = Kernel("altup_predict", ("first", "others", "mix"), ("active", "rest"))
BACKWARD = Kernel(
    "altup_predict_backward", ("first", "others", "mix", "d_active", "d_rest"), ("d_first", "d_others", "d_mix")
)


def reference(first: mx.array, others: mx.array, mix: mx.array) -> tuple[mx.array, mx.array]:
    """`altup_predict` in plain MLX."""
    streams = mx.concatenate([first[None], others])
    added = mix @ mx.moveaxis(streams, 0, -2)
    predicted = streams + mx.moveaxis(added, -2, 0)
    return predicted[0], predicted[1:]


def _launch(kernel: Kernel, arrays: list[mx.array], shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]):
    tokens, width = arrays[0].shape
    template = row_template(width)
    grid, threadgroup = row_groups(tokens, template["THREADS"])
    template |= {"T": arrays[0].dtype, "STREAMS": arrays[1].shape[0] + 1}
    return kernel(arrays, template=template, grid=grid, threadgroup=threadgroup, shapes=shapes, dtypes=dtypes)


def _flat(first: mx.array, others: mx.array) -> list[mx.array]:
    """[tokens, width] and [streams − 1, tokens, width]."""
    width = first.shape[-1]
    return [first.reshape(-1, width), others.reshape(others.shape[0], -1, width)]


def _forward(first: mx.array, others: mx.array, mix: mx.array) -> list[mx.array]:
    one, rest = _flat(first, others)
    made = _launch(FORWARD, [one, rest, mix.reshape(len(one), -1)], [one.shape, rest.shape], [first.dtype] * 2)
    return [made[0].reshape(first.shape), made[1].reshape(others.shape)]


def _backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
    first, others, mix = inputs
    one, rest = _flat(first, others)
    mixes = mix.reshape(len(one), -1)
    d_first, d_others, d_mix = _launch(
        BACKWARD,
        [one, rest, mixes, *_flat(*cotangents[:2])],
        [one.shape, rest.shape, mixes.shape],
        [first.dtype, first.dtype, mx.float32],
    )
    return [d_first.reshape(first.shape), d_others.reshape(others.shape), d_mix.reshape(mix.shape).astype(mix.dtype)]


_launched = custom_function(_forward, _backward)


def altup_predict(first: mx.array, others: mx.array, mix: mx.array) -> tuple[mx.array, mx.array]:
    """stream_j + Σ_i mix[..., j, i] · stream_i, for the stream that a layer computes and for the others.

    Args:
        first: [..., width], the active stream.
        others: [streams − 1, ..., width].
        mix: [..., streams, streams], the last axis the stream that is added.

    Returns:
        Their predictions, shaped as `first` and `others`, in their dtype.
    """
    fits = 0 < first.shape[-1] <= WIDEST and others.shape[0] < MOST_STREAMS
    if dispatch.runs("altup_predict") and fits and one_dtype(first, others, mix):
        made = _launched(first, others, mix)
        return made[0], made[1]
    return reference(first, others, mix)


def _sizes(tokens: int, width: int):
    shapes = [(tokens, width), (3, tokens, width), (tokens, 4, 4)]
    return lambda random, dtype: random_arrays(random, dtype, shapes)


OP = Op(
    name="altup_predict",
    kernels=(FORWARD, BACKWARD),
    function=altup_predict,
    reference=reference,
    sizes={"small": _sizes(3, 131), "real": _sizes(512, 2048)},
    wrt=(0, 1, 2),
)
