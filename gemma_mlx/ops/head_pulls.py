"""The gradient of a chunk of logits under a softcap, where the head trains.

Bytes of a chunk of n positions × v ids, with b bytes a score and g a gradient: n · v · (b + g).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.head_curve import Curve, Targets, power
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import FLOATS

KERNEL = Kernel(
    "head_pulls", ("scores", "wanted", "measured", "own", "factor", "constants"), ("pulls",), ("head_curve.h",)
)


def reference(
    scores: mx.array,
    wanted: mx.array,
    measured: mx.array,
    own: mx.array,
    factor: mx.array,
    curve: Curve,
    dtype: mx.Dtype,
) -> mx.array:
    """`head_pulls` in plain MLX."""
    exponents, slopes = curve(curve.scores(scores))
    masses = Targets(wanted, scores.shape[1]).replaced(power(exponents - measured), own)
    return ((masses if slopes is None else masses * slopes) * factor).astype(dtype)


def head_pulls(
    scores: mx.array,
    wanted: mx.array,
    measured: mx.array,
    own: mx.array,
    factor: mx.array,
    curve: Curve,
    dtype: mx.Dtype,
) -> mx.array:
    """Exponential · slope / 4 · factor of each score [n, v], `own` standing for the target's exponential; in `dtype`.

    Args:
        wanted: int32 [n, 1], as for `head_scores`.
        measured, own, factor: float32 [n, 1]; exponents are measured from the first.
    """
    if not (dispatch.runs("head_pulls") and scores.dtype in FLOATS and scores.size > 0):
        return reference(scores, wanted, measured, own, factor, curve, dtype)
    rows, columns = scores.shape
    threads, values = 256, 8
    (pulls,) = KERNEL(
        [scores, *(a.reshape(-1) for a in (wanted, measured, own, factor)), curve.constants],
        template={"G": dtype, "THREADS": threads, "VALUES": values, "CAPPED": curve.cap is not None},
        grid=(-(-columns // (threads * values)) * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        shapes=[scores.shape],
        dtypes=[dtype],
    )
    return pulls


def _sizes(rows: int, columns: int):
    def make(random, dtype: mx.Dtype) -> list:
        wanted = mx.array(random.integers(-columns, 2 * columns, (rows, 1)).astype(np.int32))
        own, factor = (mx.array(random.standard_normal((rows, 1)).astype(np.float32)) for _ in range(2))
        scores = mx.array(30 * random.standard_normal((rows, columns))).astype(dtype)
        return [scores, wanted, mx.zeros((rows, 1)), own, factor, Curve(30.0), dtype]

    return make


OP = Op(
    name="head_pulls",
    kernels=(KERNEL,),
    function=head_pulls,
    reference=reference,
    sizes={"small": _sizes(5, 1031), "real": _sizes(512, 16384)},
    wrt=(),
)
