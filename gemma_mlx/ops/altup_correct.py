"""AltUp's correction (arXiv 2301.13310) of the residual streams that a layer does not compute."""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays, row_groups, row_template

WIDEST = 16384
"""Values of a stream, at most."""
MOST_OTHERS = 8

FORWARD = Kernel("altup_correct", ("active", "rest", "activated", "shares", "added"), ("out",))
BACKWARD = Kernel(
    "altup_correct_backward",
    ("active", "activated", "shares", "cotangent"),
    ("d_active", "d_activated", "d_added", "d_shares"),
)


def reference(active: mx.array, rest: mx.array, activated: mx.array, shares: mx.array, added: mx.array) -> mx.array:
    """`altup_correct` in plain MLX."""
    return rest + mx.moveaxis(shares, -1, 0)[..., None] * (activated - active) + added


def _launch(kernel: Kernel, arrays: list[mx.array], others: int, shapes: list, dtypes: list[mx.Dtype]):
    tokens, width = arrays[0].shape
    template = row_template(width)
    grid, threadgroup = row_groups(tokens, template["THREADS"])
    template |= {"T": arrays[0].dtype, "OTHERS": others}
    return kernel(arrays, template=template, grid=grid, threadgroup=threadgroup, shapes=shapes, dtypes=dtypes)


def _flat(x: mx.array, *leading: int) -> mx.array:
    return x.reshape(*leading, -1, x.shape[-1])


def _forward(active: mx.array, rest: mx.array, activated: mx.array, shares: mx.array, added: mx.array):
    others = rest.shape[0]
    planes = _flat(rest, others)
    arrays = [_flat(active), planes, *map(_flat, (activated, shares, added))]
    (out,) = _launch(FORWARD, arrays, others, [planes.shape], [active.dtype])
    return [out.reshape(rest.shape)]


def _backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
    active, rest, activated, shares, _ = inputs
    flat = list(map(_flat, (active, activated, shares)))
    others, dtype = rest.shape[0], active.dtype
    d_active, d_activated, d_added, d_shares = _launch(
        BACKWARD,
        [*flat, _flat(cotangents[0], others)],
        others,
        [flat[0].shape] * 3 + [flat[2].shape],
        [dtype] * 3 + [mx.float32],
    )
    planes = [a.reshape(active.shape) for a in (d_active, d_activated, d_added)]
    return [planes[0], cotangents[0], planes[1], d_shares.reshape(shares.shape).astype(shares.dtype), planes[2]]


_launched = custom_function(_forward, _backward)


def altup_correct(active: mx.array, rest: mx.array, activated: mx.array, shares: mx.array, added: mx.array) -> mx.array:
    """rest_j + shares[..., j] · (activated − active) + added, in their dtype.

    Args:
        active: [..., width], the prediction of the active stream.
        rest: [others, ..., width], those of the others.
        activated: as `active`, what the layer made of it.
        shares: [..., others], of each in what that gained.
        added: as `active`, to all.
    """
    fits = 0 < active.shape[-1] <= WIDEST and rest.shape[0] <= MOST_OTHERS
    if dispatch.runs("altup_correct") and fits and one_dtype(active, rest, activated, shares, added):
        return _launched(active, rest, activated, shares, added)[0]
    return reference(active, rest, activated, shares, added)


def _sizes(tokens: int, width: int):
    row = (tokens, width)
    shapes = [row, (3, *row), row, (tokens, 3), row]
    return lambda random, dtype: random_arrays(random, dtype, shapes)


OP = Op(
    name="altup_correct",
    kernels=(FORWARD, BACKWARD),
    function=altup_correct,
    reference=reference,
    sizes={"small": _sizes(3, 131), "real": _sizes(512, 2048)},
    wrt=(0, 1, 2, 3, 4),
)
