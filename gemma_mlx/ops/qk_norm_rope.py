"""Norms of queries, keys and values, and the turning of the first two with their places in a picture, in one pass.

The gradient of the norms' weights is a launch of its own, that a lazy graph runs only where they train. It adds up rows
in blocks and then the blocks: the same result in every run.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

SIMDS = 8
"""SIMD groups of a threadgroup."""
ROWS = 32
"""Rows of a block of the weights' gradients."""

GIVEN = ("q", "k", "v", "q_weight", "k_weight", "cosines", "sines", "constants")
FORWARD = Kernel("qk_norm_rope", GIVEN, ("out_q", "out_k", "out_v"), ("rope.h",))
BACKWARD = Kernel("qk_norm_rope_backward", (*GIVEN, "pull_q", "pull_k", "pull_v"), ("d_q", "d_k", "d_v"), ("rope.h",))
WEIGHTS = Kernel(
    "qk_norm_rope_weights", ("q", "k", "cosines", "sines", "constants", "pull_q", "pull_k"), ("partials",), ("rope.h",)
)


def turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Heads x [B, N, heads, D] turned by cos and sin [B, N, 1, 2, D / 4].

    The first half of a head turns with x, the second with y; within each half, value i pairs with value i + D / 4
    (transformers' ``apply_multidimensional_rope``).
    """
    parts = x.reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)
    a, b = parts[..., 0, :], parts[..., 1, :]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).reshape(x.shape)


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """`qk_norm_rope` in plain MLX."""
    q, k = mx.fast.rms_norm(q, q_weight, eps), mx.fast.rms_norm(k, k_weight, eps)
    return turned(q, cos, sin), turned(k, cos, sin), mx.fast.rms_norm(v, None, eps)


def _flat(arrays: list[mx.array]) -> list[mx.array]:
    """[B, N, heads, D] as [B · N, heads, D]."""
    return [a.reshape(-1, *a.shape[2:]) for a in arrays]


def _launch(kernel: Kernel, inputs: list[mx.array], groups: int, shapes: list, dtypes: list, **template) -> list:
    size = inputs[0].shape[-1]
    return kernel(
        inputs,
        template={**template, "D": size, "PAIRS": -(-size // 64), "SIMDS": SIMDS},
        grid=(groups * 32 * SIMDS, 1, 1),
        threadgroup=(32 * SIMDS, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )


def _heads(kernel: Kernel, inputs: list[mx.array]) -> list[mx.array]:
    """A kernel with a SIMD group for each head, that gives what is shaped as the first three inputs."""
    shapes = [a.shape for a in inputs[:3]]
    count = sum(shape[0] * shape[1] for shape in shapes)
    return _launch(kernel, inputs, -(-count // SIMDS), shapes, [inputs[0].dtype] * 3, T=inputs[0].dtype)


def _weight_gradients(inputs: list[mx.array]) -> mx.array:
    """float32 [2, D]."""
    rows, _, size = inputs[0].shape
    blocks = -(-rows // ROWS)
    return _launch(WEIGHTS, inputs, blocks, [(blocks, 2, size)], [mx.float32], ROWS=ROWS)[0].sum(axis=0)


def _launched(eps: float):
    """The op of q, k, v, the weights, cos and sin; it keeps no more than those."""
    constants = mx.array([eps], mx.float32)

    def given(inputs: tuple) -> list[mx.array]:
        q, k, v, q_weight, k_weight, cos, sin = inputs
        rows = q.shape[0] * q.shape[1]
        return [*_flat([q, k, v]), q_weight, k_weight, cos.reshape(rows, -1), sin.reshape(rows, -1), constants]

    def forward(*inputs: mx.array) -> list[mx.array]:
        made = _heads(FORWARD, given(inputs))
        return [a.reshape(b.shape) for a, b in zip(made, inputs[:3], strict=True)]

    def backward(inputs: tuple, cotangents: tuple, _outputs: tuple) -> list[mx.array]:
        arrays, pulls = given(inputs), _flat(list(cotangents))
        made = _heads(BACKWARD, [*arrays, *pulls])
        weights = _weight_gradients([*arrays[:2], *arrays[5:], *pulls[:2]]).astype(inputs[3].dtype)
        made = [a.reshape(b.shape) for a, b in zip(made, inputs[:3], strict=True)]
        return [*made, weights[0], weights[1], *map(mx.zeros_like, inputs[5:])]

    return custom_function(forward, backward)


def qk_norm_rope(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """(turn(norm(q) · q_weight), turn(norm(k) · k_weight), norm(v)), norm(x) = x · (mean(x²) + eps)^(−1/2) of a head.

    Float32 inside, rounded once; plain MLX rounds after each step. See `turned` for the turning.

    Args:
        q: [B, N, H, D], D a multiple of 4.
        k, v: [B, N, G, D].
        q_weight, k_weight: [D].
        cos, sin: [B, N, 1, 2, D / 4], of a place's x and y. They have no gradient.
        eps: added to the mean squares.

    Returns:
        Arrays shaped as q, k and v in their dtype.
    """
    arrays = (q, k, v, q_weight, k_weight, cos, sin)
    fits = q.ndim == 4 and q.shape[-1] % 4 == 0 and one_dtype(*arrays)
    if dispatch.runs("qk_norm_rope") and fits:
        return tuple(_launched(eps)(*arrays))
    return reference(*arrays, eps)


def _sizes(length: int, heads: int, size: int):
    def make(random, dtype: mx.Dtype) -> list:
        heads_of = random_arrays(random, dtype, [(1, length, heads, size)] * 3)
        weights = random_arrays(random, dtype, [(size,)] * 2)
        angles = 3 * random.standard_normal((1, length, 1, 2, size // 4))
        return [*heads_of, *weights, *(mx.array(f(angles)).astype(dtype) for f in (np.cos, np.sin)), 1e-6]

    return make


OP = Op(
    name="qk_norm_rope",
    kernels=(FORWARD, BACKWARD, WEIGHTS),
    function=qk_norm_rope,
    reference=reference,
    sizes={"small": _sizes(37, 2, 16), "real": _sizes(2520, 12, 64)},
    wrt=(0, 1, 2, 3, 4),
)
