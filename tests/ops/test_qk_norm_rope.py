"""Norms and turning of heads, emulated, against torch in float64: values and gradients."""

import harness
import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.qk_norm_rope import OP, ROWS, SIMDS, qk_norm_rope


def normed(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def turned(x, cos, sin):
    """Each half of a head as complex numbers, times those of the angles."""
    halves = x.unflatten(-1, (2, 2, -1))
    made = torch.complex(halves[..., 0, :], halves[..., 1, :]) * torch.complex(cos, sin)
    return torch.stack([made.real, made.imag], dim=-2).flatten(-3)


def exact(q, k, v, q_weight, k_weight, cos, sin, eps):
    return [
        turned(normed(q, eps) * q_weight, cos, sin),
        turned(normed(k, eps) * k_weight, cos, sin),
        normed(v, eps),
    ]


def given(batch, length, heads, kv_heads, size, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(batch, length, heads, size), *[(batch, length, kv_heads, size)] * 2, (size,), (size,)]
    angles = 3 * random.standard_normal((batch, length, 1, 2, size // 4))
    return [*map(random.standard_normal, shapes), np.cos(angles), np.sin(angles), 1e-3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 64), (3, 1, 72), (2, 1, 16)])
def test_heads(heads, kv_heads, size, dtype):
    check(OP, given(2, 5, heads, kv_heads, size), exact, range(5), dtype, SCHEDULES if size == 16 else SCHEDULES[2:])


@pytest.mark.parametrize("length", [ROWS - 1, ROWS, ROWS + 1])
def test_edges_of_blocks(length):
    """Blocks of the weights' gradient; heads that do not fill the last group, with one more head."""
    check(OP, given(1, length, 1, 1, 8), exact, range(5), mx.float32, SCHEDULES[:1])
    assert 3 * (ROWS - 1) % SIMDS


@pytest.mark.parametrize(("length", "size"), [(1, 4), (2, 4), (1, 8)])
def test_seven_and_eight_values(length, size):
    """MLX puts inputs of fewer than eight values in another address space."""
    check(OP, given(1, length, 1, 1, size), exact, range(5), mx.float32)


def test_padding_of_zeros():
    """A head of zeros stays zero, and its gradient finite."""
    arrays = given(1, 4, 2, 2, 8)
    for array in arrays[:3]:
        array[0, 2:] = 0
    check(OP, arrays, exact, range(5), mx.float32, SCHEDULES[:1])


def test_reference_equals_its_definition():
    arrays = [mx.array(a.astype(np.float32)) if isinstance(a, np.ndarray) else a for a in given(2, 5, 3, 1, 72)]
    torches = [torch.tensor(harness.numbers(a)) if isinstance(a, mx.array) else a for a in arrays]
    for i, (ours, theirs) in enumerate(zip(qk_norm_rope(*arrays), exact(*torches), strict=True)):
        harness.assert_close(f"output {i}", ours, theirs.numpy(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_real_size(dtype):
    """2,520 patches of 12 heads of 64; the weights' sums need all groups."""
    check(qk_norm_rope, given(1, 2520, 12, 12, 64), exact, (0, 1, 2), dtype, SCHEDULES[:1], sample=60)
