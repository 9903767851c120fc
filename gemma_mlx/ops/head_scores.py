"""A chunk of logits in a running softmax under a softcap: what `gemma_mlx.head_loss` does between its two products.

The running softmax is that of Milakov and Gimelshein 2018, arXiv:1805.02867. Bytes of a chunk of n positions × v ids,
with b bytes a score and g a gradient: n · v · (b + g), b twice without a fixed reference; without a gradient n · v · b.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.head_curve import Curve, Targets, power
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import FLOATS, row_groups

KERNEL = Kernel(
    "head_scores",
    ("scores", "wanted", "start", "top", "index", "target", "others", "constants"),
    ("new_top", "new_index", "new_target", "new_others", "keep", "pulls"),
    ("reduce.h", "head_curve.h"),
)


def reference(
    scores: mx.array,
    wanted: mx.array,
    start: mx.array,
    top: mx.array,
    index: mx.array,
    target: mx.array,
    others: mx.array,
    curve: Curve,
    gradient: mx.Dtype | None,
) -> list[mx.array]:
    """`head_scores` in plain MLX."""
    scores, targets = curve.scores(scores), Targets(wanted, scores.shape[1])
    at = mx.argmax(scores, axis=1, keepdims=True)
    highest = mx.take_along_axis(scores, at, axis=1)
    new_top = mx.maximum(top, highest)
    exponents, slopes = curve(scores)
    measured = curve.reference(new_top)
    masses = targets.replaced(power(exponents if curve.fixed else exponents - measured), mx.array(0.0))
    keep = power(curve.reference(top) - measured)
    made = [
        new_top,
        mx.where(highest > top, at.astype(mx.int32) + start, index),
        mx.where(targets.inside, targets.of(scores), target),
        others * keep + mx.sum(masses, axis=1, keepdims=True),
        keep,
    ]
    return made if gradient is None else [*made, (masses if slopes is None else masses * slopes).astype(gradient)]


def head_scores(
    scores: mx.array,
    wanted: mx.array,
    start: mx.array,
    top: mx.array,
    index: mx.array,
    target: mx.array,
    others: mx.array,
    curve: Curve,
    gradient: mx.Dtype | None,
) -> list[mx.array]:
    """A chunk's scores added to running values.

    Args:
        scores: [n, v], products of hidden states and v rows of the head.
        wanted: int32 [n, 1], the target's column; any other number where it is not in this chunk.
        start: int32 [1, 1], the id of the first column.
        top, target, others: float32 [n, 1]: the highest score, the target's, the sum of the others' exponentials in
            units of ``curve.reference(top)``.
        index: int32 [n, 1], the id of the highest score, the first among equals.
        gradient: a dtype, where exponential times slope is wanted too.

    Returns:
        The new top, index, target and others; ``keep`` float32 [n, 1], by what a sum in units of the old reference is
        multiplied; with a gradient [n, v] of that dtype, each exponential times a quarter of the cap's slope, 0 at the
        target.
    """
    if not (dispatch.runs("head_scores") and scores.dtype in FLOATS and scores.size > 0):
        return reference(scores, wanted, start, top, index, target, others, curve, gradient)
    rows, columns = scores.shape
    threads = min(1024, 32 * -(-columns // 32))
    grid, threadgroup = row_groups(rows, threads)
    columns_of = [a.reshape(-1) for a in (wanted, start, top, index, target, others)]
    *made, pulls = KERNEL(
        [scores, *columns_of, curve.constants],
        template={
            "G": gradient or mx.float32, "THREADS": threads,
            "CAPPED": curve.cap is not None, "FIXED": curve.fixed, "GRADIENT": gradient is not None,
        },
        grid=grid,
        threadgroup=threadgroup,
        shapes=[(rows,)] * 5 + [scores.shape if gradient else (1,)],
        dtypes=[mx.float32, mx.int32, mx.float32, mx.float32, mx.float32, gradient or mx.float32],
    )  # fmt: skip
    return [a[:, None] for a in made] + ([] if gradient is None else [pulls])


def _sizes(rows: int, columns: int):
    def make(random, dtype: mx.Dtype) -> list:
        wanted = mx.array(random.integers(-columns, 2 * columns, (rows, 1)).astype(np.int32))
        top, target = (mx.array(random.standard_normal((rows, 1)).astype(np.float32)) for _ in range(2))
        scores = mx.array(30 * random.standard_normal((rows, columns))).astype(dtype)
        index, others = mx.zeros((rows, 1), mx.int32), mx.full((rows, 1), 1e-20)
        return [scores, wanted, mx.array([[512]], mx.int32), top, index, target, others, Curve(30.0), dtype]

    return make


OP = Op(
    name="head_scores",
    kernels=(KERNEL,),
    function=head_scores,
    reference=reference,
    sizes={"small": _sizes(5, 1031), "real": _sizes(512, 16384)},
    wrt=(),
)
