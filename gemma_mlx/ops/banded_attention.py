"""Attention of audio frames to themselves and the few before them, with relative positions and a soft cap.

MLX has no op for a band: the plain form cuts queries into blocks, pads, shifts the scores of distances to keys, and
moves float32 arrays some twenty times. Here one launch reads queries, keys and values and writes the result; it keeps
nothing but its inputs, and its gradient computes the scores again, in one launch, without atomics: the same bits in
every run. The gradients of the relative keys and of the scale are a launch of their own, that a lazy graph runs only
where they train.

Bytes moved, for each head of a clip of F frames of D values of s bytes, window W, blocks of R frames (`block`), n =
⌈F / R⌉ of them, exactly (constants of 12 bytes a group, per_dim_scale and the mask's bytes not counted):

- forward: s·D·(2·F + 2·(F + n·(W − 1)) + n·W);
- gradient: s·D·(3·F + 2·(F + n·(W − 1)) + 2·(F + 2·n·(W − 1)) + n·W);
- gradient of relative keys and scale: s·D·(2·F + 2·(F + n·(W − 1)) + n·W) and 4·D·(W + 1) for every `TILES` blocks.

less what blocks at the ends of a clip need not read.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

BLOCK = 12
"""Queries that the plain form attends together, at least."""
TILES = 4
"""Blocks of frames whose gradients of the relative keys one group adds up."""
WIDEST, LONGEST = 256, 32
"""Values of a head and frames of a window, at most, in a kernel."""
MOST_MEMORY = 32768
"""Bytes of threadgroup memory."""

HEADERS = ("banded.h",)
INPUTS = ("q", "k", "v", "relative", "per_dim_scale", "valid", "constants")
FORWARD = Kernel("banded_attention", INPUTS, ("out",), HEADERS)
BACKWARD = Kernel("banded_attention_backward", (*INPUTS, "cotangent"), ("d_q", "d_k", "d_v"), HEADERS)
RELATIVE = Kernel("banded_attention_relative", (*INPUTS, "cotangent"), ("d_relative", "d_scale"), HEADERS)


def _blocked(
    q: mx.array, k: mx.array, v: mx.array, relative: mx.array, valid: mx.array | None, cap: float, masked: float
) -> mx.array:
    """float32 [B, F, H · D] of scaled float32 q and k, in blocks.

    Queries are cut into blocks of C >= W − 1 frames; the context of a block is the block before it and itself: two
    slices side by side (no gather, and no scatter in the gradient), and everything is batched matrix products of
    C × 2C. Work grows with F, not F². Measured on one CPU core at [1, 750, 8, 128], forward and gradient: C = 12
    37 ms, 16 52, 32 69, 64 96, dense F × F 552: softmax and tanh over wasted scores cost more than small products.
    Shifting whole arrays W times instead needs no product but some 3 W passes over memory.
    """
    m, frames, heads, d = q.shape
    window = relative.shape[0]
    size = context_block(window)
    blocks = -(-frames // size)
    fill = blocks * size - frames

    def blocked(x: mx.array) -> mx.array:  # [M, T, heads, d] -> [M, heads, blocks, size, d]
        x = mx.pad(x, [(0, 0), (0, fill), (0, 0), (0, 0)]) if fill else x
        return x.reshape(m, blocks, size, heads, d).transpose(0, 3, 1, 2, 4)

    def context(x: mx.array) -> mx.array:  # [..., blocks, size, d] -> [..., blocks, 2 · size, d]
        before = mx.pad(x[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)])
        return mx.concatenate([before, x], axis=3)

    q, k, v = blocked(q), context(blocked(k)), context(blocked(v))
    by_distance = q @ relative.transpose(1, 2, 0)[None, :, None]
    score = q @ k.swapaxes(-1, -2) + _by_key(by_distance)
    score = cap * mx.tanh(score / cap)
    score = mx.where(_allowed(size, blocks, window, valid, fill), score, masked)
    out = mx.softmax(score, axis=-1) @ v
    return out.transpose(0, 2, 3, 1, 4).reshape(m, blocks * size, heads * d)[:, :frames]


def context_block(window: int) -> int:
    """Frames of a block of the plain form, whose context a frame averages that sees nothing."""
    return max(BLOCK, window - 1)


def _by_key(x: mx.array) -> mx.array:
    """[..., C, W] by distance W − 1 … 0 -> [..., C, 2C] by key of the context, zero outside the band.

    Row c of the result is row c of the input moved right by c + C − W + 1: pad each row to 2C + 1, and read the
    flat array with rows of 2C (Transformer-XL, arXiv 1901.02860, appendix B).
    """
    *lead, size, window = x.shape
    pads = [(0, 0)] * (len(lead) + 1) + [(size - window + 1, size)]
    return mx.pad(x, pads).reshape(*lead, size * (2 * size + 1))[..., : 2 * size * size].reshape(*lead, size, 2 * size)


def _allowed(size: int, blocks: int, window: int, valid: mx.array | None, fill: int) -> mx.array:
    """bool, broadcastable to [M, heads, blocks, C, 2C]: key within the window, inside the clip, and valid."""
    distance = np.arange(size)[:, None] + size - np.arange(2 * size)
    band = np.broadcast_to((distance >= 0) & (distance < window), (blocks, size, 2 * size)).copy()
    band[0, :, :size] = False
    allowed = mx.array(band)[None, None]
    if valid is None:
        return allowed
    keys = mx.pad(valid, [(0, 0), (0, fill)]).reshape(valid.shape[0], blocks, size)
    before = mx.pad(keys[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return allowed & mx.concatenate([before, keys], axis=2)[:, None, :, None, :]


@partial(mx.compile, shapeless=True)
def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    relative: mx.array,
    per_dim_scale: mx.array,
    valid: mx.array | None,
    cap: float,
    query_factor: float,
    key_factor: float = 1.0,
    masked: float = -1e9,
) -> mx.array:
    """`banded_attention` in plain MLX."""
    dtype = q.dtype
    q, k, v, relative, scale = (a.astype(mx.float32) for a in (q, k, v, relative, per_dim_scale))
    q = q * (query_factor * _softplus(scale))
    return _blocked(q, k if key_factor == 1 else k * key_factor, v, relative, valid, cap, masked).astype(dtype)


def memory(kernel: Kernel, rows: int, window: int, size: int, itemsize: int) -> int:
    """Bytes of threadgroup memory that a kernel uses with blocks of `rows` frames, for heads of `size` values."""
    halo = window - 1
    if kernel is FORWARD:
        return itemsize * size * (rows + halo)
    if kernel is BACKWARD:
        return itemsize * size * (rows + 2 * halo) + 8 * (rows + halo) * window
    return itemsize * size * (rows + halo) + 4 * rows * window + 32 * size


def block(kernel: Kernel, window: int, size: int, itemsize: int) -> int:
    """Frames of a kernel's block: what fills its eight SIMD groups evenly and fits; more move fewer bytes."""
    halo = window - 1 if kernel is BACKWARD else 0
    most = 64 if kernel is BACKWARD and size <= 128 else 48 if kernel is BACKWARD else 32
    sizes = (r - halo for r in range(8, most + 1, 8) if r > halo)
    return max((r for r in sizes if memory(kernel, r, window, size, itemsize) <= MOST_MEMORY), default=0)


def _launch(
    kernel: Kernel, inputs: list[mx.array], masked: bool, shapes: list, dtypes: list, tiles: int = 1
) -> list[mx.array]:
    q, window = inputs[0], inputs[3].shape[0]
    clips, frames, heads, size = q.shape
    rows = block(kernel, window, size, q.dtype.size)
    template = {"T": q.dtype, "D": size, "WINDOW": window, "BLOCK": context_block(window), "ROWS": rows}
    if kernel is RELATIVE:
        template["TILES"] = tiles
    return kernel(
        inputs,
        template={**template, "MASKED": masked},
        grid=(-(-frames // (rows * tiles)) * 256, heads, clips),
        threadgroup=(256, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )


def _launched(cap: float, query_factor: float, key_factor: float, masked: bool):
    """The op of q, k, v, relative, per_dim_scale and valid (or what stands in for it); keeps its inputs alone."""
    constants = mx.array([cap, query_factor, key_factor], mx.float32)

    def forward(*inputs: mx.array) -> list[mx.array]:
        q = inputs[0]
        return _launch(FORWARD, [*inputs, constants], masked, [q.shape], [q.dtype])

    def backward(inputs: tuple, cotangents: tuple, _: tuple) -> list[mx.array]:
        q, _, _, relative, per_dim_scale, valid = inputs
        given = [*inputs, constants, cotangents[0]]
        made = _launch(BACKWARD, given, masked, [q.shape] * 3, [q.dtype] * 3)
        clips, frames, heads, size = q.shape
        groups = -(-frames // (block(RELATIVE, relative.shape[0], size, q.dtype.size) * TILES))
        shapes = [(clips * groups, *relative.shape), (clips * groups, heads, size)]
        d_relative, d_scale = _launch(RELATIVE, given, masked, shapes, [mx.float32] * 2, TILES)
        slope = query_factor * mx.sigmoid(per_dim_scale.astype(mx.float32))
        return [
            *made,
            d_relative.sum(axis=0).astype(relative.dtype),
            (d_scale.sum(axis=(0, 1)) * slope).astype(per_dim_scale.dtype),
            mx.zeros_like(valid),
        ]

    return custom_function(forward, backward)


def banded_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    relative: mx.array,
    per_dim_scale: mx.array,
    valid: mx.array | None,
    cap: float,
    query_factor: float,
    key_factor: float = 1.0,
    masked: float = -1e9,
) -> mx.array:
    """Each frame attends to itself and the W − 1 frames before it, float32 inside.

    score(t, s) = cap · tanh(scale · q_t · (key_factor · k_s + relative[distance t − s]) / cap), softmax over valid s;
    scale = query_factor · softplus(per_dim_scale), a number for each of the D values.

    Args:
        q, k, v: [B, F, H, D] of one dtype, as projected.
        relative: [W, H, D] in that dtype, for distance W − 1 first to 0 last.
        per_dim_scale: [D], any floating dtype.
        valid: bool [B, F] or None; keys that may be attended to.
        cap: of the soft cap.
        query_factor, key_factor: of queries and keys.
        masked: finite score of keys that may not be attended to, far below −cap.

    Returns:
        [B, F, H · D] in the dtype of q. A frame without a valid key averages the frames of its block and of the one
        before, as in transformers, whose blocks are of max(12, W − 1) frames: with padding in front that reaches valid
        frames through the causal convolution. It moves no gradient of q, k or relative.
    """
    arguments = (valid, cap, query_factor, key_factor)
    window, size = relative.shape[0], q.shape[-1]
    fits = one_dtype(q, k, v, relative) and window <= LONGEST and size <= WIDEST and masked < -cap - 200
    fits = fits and all(block(kernel, window, size, q.dtype.size) > 0 for kernel in (FORWARD, BACKWARD, RELATIVE))
    if not (dispatch.runs("banded_attention") and fits):
        return reference(q, k, v, relative, per_dim_scale, *arguments, masked)
    run = _launched(cap, query_factor, key_factor, valid is not None)
    stand_in = mx.ones((1,), mx.bool_)
    (out,) = run(q, k, v, relative, per_dim_scale, stand_in if valid is None else valid)
    return out.reshape(*q.shape[:2], -1)


def _sizes(clips: int, frames: int, heads: int, size: int, window: int):
    def make(random, dtype: mx.Dtype) -> list:
        shape = (clips, frames, heads, size)
        arrays = random_arrays(random, dtype, [shape, shape, shape, (window, heads, size), (size,)])
        lengths = frames - 3 * mx.arange(clips)
        return [*arrays, mx.arange(frames)[None] < lengths[:, None], 50.0, size**-0.5, 1.5]

    return make


OP = Op(
    name="banded_attention",
    kernels=(FORWARD, BACKWARD, RELATIVE),
    function=banded_attention,
    reference=reference,
    sizes={"small": _sizes(2, 41, 2, 16, 12), "real": _sizes(1, 750, 8, 128, 12)},
    wrt=(0, 1, 2, 3, 4),
)
