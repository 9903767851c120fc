"""Both forms of flash attention, emulated, against torch in float64: values and gradients, at the edges of blocks."""

import harness
import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check
from metal.emulator import Emulator

from gemma_mlx.ops import dispatch, flash_attention, flash_matrix
from gemma_mlx.ops.flash_attention import MOST_MEMORY, NUMBERS, gradients, moved
from gemma_mlx.ops.flash_matrix import MATRICES

OPS = {"numbers": (flash_attention.OP, NUMBERS), "matrices": (flash_matrix.OP, MATRICES)}
both = pytest.mark.parametrize("name", OPS)
EDGES = sorted(
    {n + more for form in (NUMBERS, MATRICES) for n in form.tiles(form.forward, 8, 4) for more in (-1, 0, 1)}
)


def exact(q, k, v, scale, lengths=None):
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    valid = torch.ones(q.shape[:2], dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(k.shape[1])[None] < lengths[:, None]
        scores = scores.masked_fill(~valid[:, None, None, :], -1e300)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v) * valid[..., None, None]


def given(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in shapes]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows(name, dtype):
    """A whole row, a part of one, one token and none."""
    q, k, v = given(*[(4, 37, 2, 16)] * 3)
    lengths = np.array([37, 20, 1, 0], np.int32)
    schedules = SCHEDULES if dtype != mx.float16 else SCHEDULES[:1]
    check(OPS[name][0], [q, k, v, 0.25, lengths], exact, (0, 1, 2), dtype, schedules)


@both
@pytest.mark.parametrize(("size", "dtype"), [(64, mx.bfloat16), (72, mx.float32), (96, mx.bfloat16)])
def test_sizes_of_the_checkpoints(name, size, dtype):
    q, k, v = given(*[(1, 35, 1, size)] * 3)
    check(OPS[name][0], [q, k, v, size**-0.5, np.array([33], np.int32)], exact, (0, 1, 2), dtype, SCHEDULES[:1])


@both
@pytest.mark.parametrize("queries", EDGES)
def test_edges_of_blocks(name, queries):
    """Keys at the edges of their own blocks, and of other number than the queries."""
    keys = EDGES[(EDGES.index(queries) + 2) % len(EDGES)]
    q, k, v = given((1, queries, 1, 8), *[(1, keys, 1, 8)] * 2)
    check(OPS[name][0], [q, k, v, 0.4], exact, (0, 1, 2), mx.float32, SCHEDULES[2:])


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (1, 8, 1, 1)])
def test_seven_and_eight_values(shape):
    """MLX puts inputs of fewer than eight values in another address space."""
    check(flash_attention.OP, [*given(shape, shape, shape), 1.0], exact, (0, 1, 2), mx.float32)
    check(flash_matrix.OP, [*given(shape, shape, shape), 1.0], exact, (0, 1, 2), launches=["flash_attention"])


@both
@pytest.mark.parametrize("heads", [4, 2])
def test_heads_that_share_keys(name, heads):
    q, k, v = given((2, 19, 4, 16), *[(2, 33, heads // 2, 16)] * 2)
    check(OPS[name][0], [q, k, v, 0.3], exact, (0, 1, 2), mx.bfloat16, SCHEDULES[:1])


@both
def test_large_scores(name):
    """Hundreds: a softmax that is not shifted would overflow."""
    q, k, v = (20 * a for a in given(*[(1, 20, 1, 8)] * 3))
    check(OPS[name][0], [q, k, v, 1.0], exact, (2,), mx.float32, SCHEDULES[:1], launches=())


def test_reference_equals_its_definition():
    q, k, v = (mx.array(a.astype(np.float32)) for a in given(*[(3, 37, 2, 16)] * 3))
    lengths = mx.array([37, 20, 0])
    out = flash_matrix.flash_matrix(q, k, v, 0.25, lengths)
    arrays = [torch.tensor(harness.numbers(a)) for a in (q, k, v)]
    harness.assert_close("out", out, exact(*arrays, 0.25, torch.tensor([37, 20, 0])).numpy(), 1e-5)


@both
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit(name, itemsize):
    kind = OPS[name][1]
    for kernel in kind.kernels:
        for size in (8, 64, 72, 96):
            assert kind.memory(kernel, *kind.tiles(kernel, size, itemsize), size, itemsize) <= MOST_MEMORY
        assert kind.tiles(kernel, 512, itemsize) is None
    assert MATRICES.tiles(MATRICES.forward, 12, itemsize) is None


@both
def test_fewer_bytes_than_with_scores(name):
    """At the size of the checkpoints: plain MLX moves the scores six times forward and thirteen times backward."""
    shape, kind = (1, 2520, 12, 64), OPS[name][1]
    scores = 2 * 12 * 2520**2
    forward, *backward = [moved(kind, kernel, shape, shape, 2) for kernel in kind.kernels]
    print(
        f"{name}: forward {forward / 1e6:.0f} MB, backward {sum(backward) / 1e6:.0f} MB; scores {scores / 1e6:.0f} MB"
    )
    assert forward <= 6 * scores / 2 and sum(backward) <= 13 * scores * 2 / 3


@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_real_size(name, dtype):
    """2,520 patches of 12 heads of 64, some of them padding."""
    q, k, v = given(*[(1, 2520, 12, 64)] * 3)
    lengths = np.array([2304], np.int32)
    check(OPS[name][0], [q, k, v, 0.125, lengths], exact, (), dtype, SCHEDULES[:1], sample=8)


@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_real_size_backward(name, dtype):
    """The gradients' launches, given what the whole forward would have given them."""
    arrays = [mx.array(a.astype(np.float32)).astype(dtype) for a in given(*[(1, 2520, 12, 64)] * 4)]
    leaves = [torch.tensor(harness.numbers(a), requires_grad=True) for a in arrays[:3]]
    pull, lengths = torch.tensor(harness.numbers(arrays[3])), torch.tensor([2304])
    out = exact(*leaves, 0.125, lengths)
    expected = torch.autograd.grad(out, leaves, pull)
    with torch.no_grad():
        scores = torch.einsum("bnhd,bmhd->bhnm", *leaves[:2])[..., :2304] * 0.125
        sums = mx.array(scores.logsumexp(-1).float().numpy())
        deltas = mx.array((out * pull).sum(-1).transpose(1, 2).float().numpy())
    out = mx.array(out.detach().float().numpy()).astype(dtype)
    with dispatch.using(Emulator(sample=8)):
        made = gradients(OPS[name][1], *arrays, out, sums, mx.array([[2304, 2304]]), 0.125, deltas)
    for which, ours, theirs in zip("qkv", made, expected, strict=True):
        harness.assert_close(which, ours, theirs.numpy(), harness.TOLERANCE[dtype], sampled=True)
