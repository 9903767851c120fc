"""Attention without the matrix of its scores, forward and backward, for towers that train.

While it traces gradients, MLX forms the scores of all queries on all keys and keeps them: 152 MB a layer for 2,520
patches and 12 heads in bfloat16. Here the forward keeps a logarithm for each query and the backward computes the scores
again, in blocks (Dao et al. 2022, arXiv:2205.14135), one launch for the queries' gradient and one for the keys' and
values': no atomics, the same bits in every run.

Bytes moved, for each query head of each row of N queries on M keys of D values of s bytes, and blocks of R rows of the
launch at hand (`Form.tiles`), exactly (lengths of 8 bytes a group and the scale of 4 not counted):

- forward: s·D·(2·N + 2·M·⌈N/R⌉) + 4·N;
- queries' gradient: s·D·(4·N + 2·M·⌈N/R⌉) + 8·N;
- keys' and values' gradient: s·D·(2·M + 2·N·⌈M/R⌉) + 8·N·⌈M/R⌉, and 2·M·D·s written, of 4 bytes where heads share keys.

Threadgroup memory holds blocks of R rows and C columns: at most 32 KB, and R and C are the first of a list that fit.
`flash_matrix` is the form that multiplies by SIMD groups' matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.kernel import Kernel, Launch
from gemma_mlx.ops.registry import Op
from gemma_mlx.ops.threads import one_dtype, random_arrays

FORWARD = ("q", "k", "v", "lengths", "constants"), ("out", "sums")
QUERIES = ("q", "k", "v", "out", "cotangent", "sums", "lengths", "constants"), ("d_q", "deltas")
KEYS = ("q", "k", "v", "cotangent", "sums", "deltas", "lengths", "constants"), ("d_k", "d_v")


def read(launch: Launch) -> int:
    """Bytes that a launch of either form reads, by the formula."""
    q, m = launch.inputs[0], launch.inputs[1].shape[1]
    batch, n, heads, size = q.shape
    values, rows = q.dtype.size * size, launch.template["ROWS"]
    once = {"out": n, "d_q": 3 * n, "d_k": 2 * m}[launch.kernel.outputs[0]] * values
    if launch.kernel.outputs == KEYS[1]:
        return batch * heads * (once + -(-m // rows) * n * (2 * values + 8))
    sums = 0 if launch.kernel.outputs == FORWARD[1] else 4 * n
    return batch * heads * (once + -(-n // rows) * m * 2 * values + sums)


@dataclass(frozen=True)
class Form:
    """The three launches, in one way of multiplying.

    Attributes:
        forward, queries, keys: the kernels, with inputs and outputs ``FORWARD``, ``QUERIES`` and ``KEYS``.
        matrices: whether they multiply SIMD groups' matrices, so that heads are whole ones, in float32 blocks.
        blocks: (rows, columns), the best first.
    """

    forward: Kernel
    queries: Kernel
    keys: Kernel
    matrices: bool
    blocks: tuple[tuple[int, int], ...]

    @property
    def kernels(self) -> tuple[Kernel, Kernel, Kernel]:
        return self.forward, self.queries, self.keys

    def memory(self, kernel: Kernel, rows: int, columns: int, size: int, itemsize: int) -> int:
        """Bytes of threadgroup memory of a kernel with blocks of rows × columns, for heads of `size` values."""
        products = 1 if kernel != self.keys and (kernel == self.forward or not self.matrices) else 2
        pad = 4 if self.matrices else 1
        floats = products * rows * (columns + pad) + (2 * columns if kernel == self.keys else 0)
        if self.matrices:
            return 4 * (2 * columns * (size + pad) + floats + (8 * rows if kernel == self.forward else 0))
        return itemsize * (size + pad) * ((1 if kernel == self.forward else 2) * rows + 2 * columns) + 4 * floats

    def tiles(self, kernel: Kernel, size: int, itemsize: int) -> tuple[int, int] | None:
        """(rows, columns) of a kernel's blocks for heads of `size` values; None: none fit."""
        if self.matrices and size % 8:
            return None
        fitting = (b for b in self.blocks if self.memory(kernel, *b, size, itemsize) <= MOST_MEMORY)
        return next(fitting, None)

    def takes(self, q: mx.array, k: mx.array, v: mx.array) -> bool:
        """Whether the kernels do."""
        if q.ndim != 4 or q.shape[2] % k.shape[2] or not one_dtype(q, k, v):
            return False
        return all(self.tiles(kernel, q.shape[3], q.dtype.size) for kernel in self.kernels)


MOST_MEMORY = 32768
"""Bytes of threadgroup memory."""
NUMBERS = Form(
    Kernel("flash_attention", *FORWARD, ("flash.h",), read=read),
    Kernel("flash_attention_queries", *QUERIES, ("flash.h",), read=read),
    Kernel("flash_attention_keys", *KEYS, ("flash.h",), read=read),
    matrices=False,
    blocks=((64, 32), (32, 32), (32, 16), (16, 16)),
)


def moved(kind: Form, kernel: Kernel, q: tuple[int, ...], k: tuple[int, ...], itemsize: int) -> int:
    """Bytes that a launch reads and writes for q [B, N, H, D] and k [B, M, G, D] without padding, by the formula."""
    (batch, n, heads, size), m = q, k[1]
    rows, _ = kind.tiles(kernel, size, itemsize)
    blocks = -(-(m if kernel == kind.keys else n) // rows)
    if kernel == kind.forward:
        one = itemsize * size * (2 * n + 2 * m * blocks) + 4 * n
    elif kernel == kind.queries:
        one = itemsize * size * (4 * n + 2 * m * blocks) + 8 * n
    else:
        written = itemsize if heads == k[2] else 4
        one = itemsize * size * (2 * m + 2 * n * blocks) + 8 * n * blocks + 2 * m * size * written
    return batch * heads * one


def reference(q: mx.array, k: mx.array, v: mx.array, scale: float, lengths: mx.array | None = None) -> mx.array:
    """`flash_attention` in plain MLX."""
    mask = None
    if lengths is not None:
        # A large finite number: with −inf a row of padding only would give NaN, also in gradients.
        valid = mx.arange(k.shape[1])[None] < lengths[:, None]
        mask = mx.where(valid, 0, mx.finfo(q.dtype).min / 2).astype(q.dtype)[:, None, None, :]
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).transpose(0, 2, 1, 3)
    return out if lengths is None else mx.where(valid[..., None, None], out, 0)


def _launch(
    kind: Form, kernel: Kernel, inputs: list[mx.array], over: int, shapes: list, dtypes: list, **template: mx.Dtype
) -> list[mx.array]:
    """A kernel whose groups each take a block of `over` rows; inputs begin with q."""
    q = inputs[0]
    batch, _, heads, size = q.shape
    rows, columns = kind.tiles(kernel, size, q.dtype.size)
    return kernel(
        inputs,
        template={"T": q.dtype, **template, "D": size, "ROWS": rows, "COLS": columns},
        grid=(-(-over // rows) * 4 * rows, heads, batch),
        threadgroup=(4 * rows, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )


def _together(made: mx.array, like: mx.array) -> mx.array:
    """Gradients of each query head [B, M, H, D] added up over those that share keys, [B, M, G, D]."""
    if made.shape == like.shape:
        return made
    batch, length, heads, size = like.shape
    return made.reshape(batch, length, heads, -1, size).sum(axis=3).astype(like.dtype)


def gradients(
    kind: Form,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cotangent: mx.array,
    out: mx.array,
    sums: mx.array,
    lengths: mx.array,
    scale: float,
    deltas: mx.array | None = None,
) -> list[mx.array]:
    """Those of q, k and v by the kernels of `kind`.

    Args:
        q, k, v, scale: as `flash_attention`'s.
        cotangent, out: of and as its result.
        sums: float32 [B, H, N], logarithms of the softmax's denominators.
        lengths: int32 [B, 2], queries and keys that count.
        deltas: float32 [B, H, N], sums of cotangent · out over a head; by default the queries' launch gives them.
    """
    constants = mx.array([scale], mx.float32)
    given = [q, k, v, out, cotangent, sums, lengths, constants]
    d_q, made = _launch(kind, kind.queries, given, q.shape[1], [q.shape, sums.shape], [q.dtype, mx.float32])
    dtype = q.dtype if q.shape[2] == k.shape[2] else mx.float32
    shape = (*k.shape[:2], *q.shape[2:])
    given = [q, k, v, cotangent, sums, made if deltas is None else deltas, lengths, constants]
    d_k, d_v = _launch(kind, kind.keys, given, k.shape[1], [shape] * 2, [dtype] * 2, S=dtype)
    return [d_q, _together(d_k, k), _together(d_v, v)]


def launched(
    kind: Form, q: mx.array, k: mx.array, v: mx.array, scale: float, lengths: mx.array | None = None
) -> mx.array:
    """`flash_attention` by the kernels of `kind`."""
    if lengths is None:
        both = mx.broadcast_to(mx.array([q.shape[1], k.shape[1]], mx.int32), (q.shape[0], 2))
    else:
        both = mx.stack([lengths, lengths], axis=1).astype(mx.int32)
    return _launched(kind, scale)(q, k, v, both)[0]


def _launched(kind: Form, scale: float):
    """The op of q, k, v and lengths [B, 2] (queries, keys); keeps them, its result and a number for each query."""
    constants = mx.array([scale], mx.float32)

    def forward(q: mx.array, k: mx.array, v: mx.array, lengths: mx.array) -> list[mx.array]:
        sums = (q.shape[0], q.shape[2], q.shape[1])
        shapes, dtypes = [q.shape, sums], [q.dtype, mx.float32]
        return _launch(kind, kind.forward, [q, k, v, lengths, constants], q.shape[1], shapes, dtypes)

    def backward(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        made = gradients(kind, *inputs[:3], cotangents[0], *outputs, inputs[3], scale)
        return [*made, mx.zeros_like(inputs[3])]

    return custom_function(forward, backward)


def flash_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, lengths: mx.array | None = None) -> mx.array:
    """softmax(scale · q kᵀ) v over all keys, [B, N, H, D] in the dtype of q, float32 inside.

    Args:
        q: [B, N, H, D].
        k, v: [B, M, G, D] in the dtype of q; H a multiple of G.
        scale: of the products.
        lengths: int [B], for N = M: what of a row is no padding, which lies behind it. Padding is not looked at, and
            as a query gives 0 and takes no gradient. None: everything counts.

    It keeps q, k, v, the result and a float32 for each query and head. Where nothing is differentiated, MLX's own fused
    attention is the faster one.
    """
    if dispatch.runs("flash_attention") and NUMBERS.takes(q, k, v):
        return launched(NUMBERS, q, k, v, scale, lengths)
    return reference(q, k, v, scale, lengths)


def sizes(batch: int, length: int, heads: int, size: int):
    def make(random, dtype: mx.Dtype) -> list:
        lengths = mx.array([length - 3 * i for i in range(batch)], mx.int32)
        return [*random_arrays(random, dtype, [(batch, length, heads, size)] * 3, size**-0.25), 1.0, lengths]

    return make


OP = Op(
    name="flash_attention",
    kernels=NUMBERS.kernels,
    function=flash_attention,
    reference=reference,
    sizes={"small": sizes(2, 37, 2, 16), "real": sizes(1, 2520, 12, 64)},
    wrt=(0, 1, 2),
)
