"""`flash_attention` by SIMD groups' matrices of 8 × 8, which Metal has: 16 products and sums a lane and instruction.

Blocks are float32 whatever the inputs are, and so are all products. Heads are whole matrices: D a multiple of 8.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.flash_attention import (
    FORWARD,
    KEYS,
    QUERIES,
    Form,
    flash_attention,
    launched,
    read,
    reference,
    sizes,
)
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op

MATRICES = Form(
    Kernel("flash_matrix", *FORWARD, ("flash_matrix.h",), cuda=False, read=read),
    Kernel("flash_matrix_queries", *QUERIES, ("flash_matrix.h",), cuda=False, read=read),
    Kernel("flash_matrix_keys", *KEYS, ("flash_matrix.h",), cuda=False, read=read),
    matrices=True,
    blocks=((64, 32), (64, 16), (32, 16)),
)


def keeps_no_scores() -> bool:
    """Whether a form of flash attention runs here."""
    return dispatch.runs("flash_matrix") or dispatch.runs("flash_attention")


def flash_matrix(q: mx.array, k: mx.array, v: mx.array, scale: float, lengths: mx.array | None = None) -> mx.array:
    """`flash_attention`, by matrices where they run and D is a multiple of 8, else as that is computed."""
    if dispatch.runs("flash_matrix") and MATRICES.takes(q, k, v):
        return launched(MATRICES, q, k, v, scale, lengths)
    return flash_attention(q, k, v, scale, lengths)


OP = Op(
    name="flash_matrix",
    kernels=MATRICES.kernels,
    function=flash_matrix,
    reference=reference,
    sizes={"small": sizes(2, 37, 1, 96), "real": sizes(1, 2520, 12, 64)},
    wrt=(0, 1, 2),
)
