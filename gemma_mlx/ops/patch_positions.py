"""Embedded patches plus the two vectors of their places, in one pass.

The gradient of x is the cotangent itself; that of the table, where it trains, is MLX's own addition into its rows.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

FORWARD = Kernel("patch_positions", ("x", "table", "at"), ("out",))
THREADS = 128


def _vectors(table: mx.array, at: mx.array) -> mx.array:
    """[N, P, width], 0 in padding."""
    x, y = mx.maximum(at[..., 0], 0), mx.maximum(at[..., 1], 0)
    where = mx.take(table[0], x, axis=0) + mx.take(table[1], y, axis=0)
    return mx.where((at == -1).all(axis=-1)[..., None], 0, where)


def reference(x: mx.array, table: mx.array, at: mx.array) -> mx.array:
    """`patch_positions` in plain MLX."""
    return x + _vectors(table, at).astype(x.dtype)


def _forward(x: mx.array, table: mx.array, at: mx.array) -> list[mx.array]:
    rows = x.reshape(-1, x.shape[-1])
    count, width = rows.shape
    (out,) = FORWARD(
        [rows, table, at.reshape(-1, 2).astype(mx.int32)],
        template={"T": x.dtype, "THREADS": THREADS},
        grid=(-(-width // THREADS) * THREADS, count, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[rows.shape],
        dtypes=[x.dtype],
    )
    return [out.reshape(x.shape)]


def _backward(inputs: tuple, cotangents: tuple, _outputs: tuple) -> list[mx.array]:
    _, table, at = inputs
    wide = [a.astype(mx.float32) for a in (table, cotangents[0])]  # else a row's many patches add up in half precision
    _, (d_table,) = mx.vjp(lambda table: [_vectors(table, at)], wide[:1], wide[1:])
    return [cotangents[0], d_table.astype(table.dtype), mx.zeros_like(at)]


_launched = custom_function(_forward, _backward)


def patch_positions(x: mx.array, table: mx.array, at: mx.array) -> mx.array:
    """x + table[0][column] + table[1][row], in the dtype of x; x alone in padding.

    Args:
        x: [N, P, width], embedded patches.
        table: [2, places, width] in the dtype of x.
        at: int [N, P, 2], (column, row), −1 in padding; less than `places`.
    """
    if dispatch.runs("patch_positions") and one_dtype(x, table):
        return _launched(x, table, at)[0]
    return reference(x, table, at)


def _sizes(patches: int, places: int, width: int):
    def make(random, dtype: mx.Dtype) -> list:
        at = random.integers(0, places, (1, patches, 2)).astype("int32")
        at[0, -2:] = -1
        return [*random_arrays(random, dtype, [(1, patches, width), (2, places, width)]), mx.array(at)]

    return make


OP = Op(
    name="patch_positions",
    kernels=(FORWARD,),
    function=patch_positions,
    reference=reference,
    sizes={"small": _sizes(11, 7, 129), "real": _sizes(2520, 10240, 768)},
    wrt=(0, 1),
)
