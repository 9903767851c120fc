"""residual + norm(x) · weight, the end of every branch of a layer, in one pass.

The gradient of the weight is a launch of its own, that a lazy graph runs only where the weight trains. It adds up rows
in blocks and then the blocks: the same result in every run.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays, row_groups, row_template

WIDEST = 16384
"""Values of a row, at most: a thread holds sixteen."""
ROWS = 32
"""Rows of a block of the weight's gradient."""
TURNS, MANY_ROWS = 4, 512
"""Rows of a threadgroup where there are many: they share one reading of the weight."""

FORWARD = Kernel("norm_residual", ("x", "residual", "weight", "constants", "scale"), ("out", "inverses"), ("reduce.h",))
BACKWARD = Kernel(
    "norm_residual_backward",
    ("x", "cotangent", "inverses", "weight", "constants", "scale"),
    ("d_x", "d_residual"),
    ("reduce.h",),
)
WEIGHT = Kernel("norm_residual_weight", ("x", "cotangent", "inverses", "constants", "scale"), ("partials",))


def reference(
    x: mx.array,
    residual: mx.array,
    weight: mx.array | None,
    eps: float = 1e-6,
    factor: float = 1.0,
    scale: mx.array | None = None,
) -> mx.array:
    """`norm_residual` in plain MLX."""
    normed = mx.fast.rms_norm(x, weight, eps)
    out = residual + (normed if factor == 1 else normed * factor)
    return out if scale is None else out * mx.stop_gradient(scale).astype(out.dtype)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _groups(x: mx.array, flags: dict[str, bool]) -> dict:
    """Template, grid and threadgroup of a launch over rows [rows, width]."""
    template, turns = row_template(x.shape[1]), TURNS if x.shape[0] >= MANY_ROWS else 1
    grid, threadgroup = row_groups(-(-x.shape[0] // turns), template["THREADS"])
    return {"template": {"T": x.dtype, "TURNS": turns, **template, **flags}, "grid": grid, "threadgroup": threadgroup}


def _launched(eps: float, factor: float, weighted: bool, scaled: bool):
    """The op of x, residual, weight and scale (or what stands in for them); the norms' factors are kept."""
    constants = mx.array([eps, factor], mx.float32)
    flags = {"WEIGHTED": weighted, "SCALED": scaled}

    def forward(x: mx.array, residual: mx.array, weight: mx.array, scale: mx.array) -> list[mx.array]:
        rows = _rows(x)
        out, inverses = FORWARD(
            [rows, _rows(residual), weight, constants, scale],
            **_groups(rows, flags),
            shapes=[rows.shape, (len(rows),)],
            dtypes=[x.dtype, mx.float32],
        )
        return [out.reshape(x.shape), inverses]

    def backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        x, _, weight, scale = inputs
        rows, cotangent = _rows(x), _rows(cotangents[0])
        d_x, d_residual = BACKWARD(
            [rows, cotangent, outputs[1], weight, constants, scale],
            **_groups(rows, flags),
            shapes=[rows.shape, rows.shape if scaled else (1,)],
            dtypes=[x.dtype, x.dtype],
        )
        d_weight = mx.zeros_like(weight)
        if weighted:
            d_weight = _weight_gradient(rows, cotangent, outputs[1], constants, scale, scaled).astype(weight.dtype)
        d_residual = d_residual.reshape(x.shape) if scaled else cotangents[0]
        return [d_x.reshape(x.shape), d_residual, d_weight, mx.zeros_like(scale)]

    return custom_function(forward, backward)


def _weight_gradient(
    rows: mx.array, cotangent: mx.array, inverses: mx.array, constants: mx.array, scale: mx.array, scaled: bool
) -> mx.array:
    """float32 [width]."""
    count, width = rows.shape
    blocks, threads = -(-count // ROWS), 64
    (partials,) = WEIGHT(
        [rows, cotangent, inverses, constants, scale],
        template={"ROWS": ROWS, "THREADS": threads, "SCALED": scaled},
        grid=(-(-width // threads) * threads, blocks, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(blocks, width)],
        dtypes=[mx.float32],
    )
    return partials.sum(axis=0)


def norm_residual(
    x: mx.array,
    residual: mx.array,
    weight: mx.array | None,
    eps: float = 1e-6,
    factor: float = 1.0,
    scale: mx.array | None = None,
) -> mx.array:
    """(residual + factor · x · (mean(x²) + eps)^(−1/2) · weight) · scale over the last axis, in the dtype of x.

    Float32 inside, rounded once; plain MLX rounds after each step.

    Args:
        x: [..., width], what a branch of a layer gives.
        residual: as x.
        weight: [width] in the dtype of x; None for a norm without a weight.
        eps: added to the mean square.
        factor: of the branch, a number.
        scale: [1], of the whole (Gemma 4's ``layer_scalar``), or None. It has no gradient.
    """
    given = [x, residual, *(a for a in (weight, scale) if a is not None)]
    fits = x.shape == residual.shape and 0 < x.shape[-1] <= WIDEST
    if not (dispatch.runs("norm_residual") and fits and one_dtype(*given)):
        return reference(x, residual, weight, eps, factor, scale)
    one = mx.ones((1,), x.dtype)
    run = _launched(eps, factor, weight is not None, scale is not None)
    return run(x, residual, one if weight is None else weight, one if scale is None else scale)[0]


def _sizes(rows: int, width: int):
    def make(random, dtype: mx.Dtype) -> list:
        x, residual, weight, scale = random_arrays(random, dtype, [(rows, width), (rows, width), (width,), (1,)])
        return [x, residual, weight, 1e-6, 0.5, scale]

    return make


OP = Op(
    name="norm_residual",
    kernels=(FORWARD, BACKWARD, WEIGHT),
    function=norm_residual,
    reference=reference,
    sizes={"small": _sizes(5, 129), "real": _sizes(2520, 768)},
    wrt=(0, 1, 2),
)
