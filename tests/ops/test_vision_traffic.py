"""Bytes that the vision kernels move, counted by the emulator: each loaded once for a threadgroup, and what is stored.

Streaming kernels stay within 1.3 times the floor, inputs once and outputs once; flash attention moves what its formula
says, in both forms.
"""

import mlx.core as mx
import numpy as np
import pytest
from harness import emulated
from metal.emulator import Emulator

from gemma_mlx.kernel_counts import with_kernels
from gemma_mlx.ops import depthwise_conv, flash_attention, flash_matrix, norm_gelu, qk_norm_rope, vision_pool
from gemma_mlx.ops.flash_attention import NUMBERS, moved
from gemma_mlx.ops.flash_matrix import MATRICES

OVER = 1.3
SMALL = {"lengths", "constants", "size"}
"""Beside shapes, what no formula counts: a few bytes for each group."""


def launches(op, given):
    """Bytes moved by each of an op's kernels, forward and backward."""
    emulator = Emulator()
    emulated(op.function, given, op.wrt, emulator)
    found = {record.kernel: record for record in emulator.records}
    assert set(found) == {kernel.name for kernel in op.kernels}
    return {
        name: sum(
            once + stored
            for buffer, (_, once, stored) in record.traffic.items()
            if buffer not in SMALL and not buffer.endswith("_shape")
        )
        for name, record in found.items()
    }


def arrays(dtype, *shapes, seed=0):
    random = np.random.default_rng(seed)
    return [mx.array(random.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("op", "kind"), [(flash_attention.OP, NUMBERS), (flash_matrix.OP, MATRICES)])
def test_the_benchmarks_count_that_formula(op, kind):
    forward, backward = with_kernels(op, "real", mx.bfloat16)
    shape = (1, 2520, 12, 64)
    first, *others = (moved(kind, kernel, shape, shape, 2) for kernel in kind.kernels)
    assert (forward.moved, backward.moved) == (first, sum(others))


@pytest.mark.parametrize(("op", "kind"), [(flash_attention.OP, NUMBERS), (flash_matrix.OP, MATRICES)])
@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(1, 1, mx.bfloat16), (2, 1, mx.float32)], ids=str)
def test_flash_attention_moves_what_its_formula_says(op, kind, heads, kv_heads, dtype):
    q, k, v = arrays(dtype, (1, 70, heads, 64), *[(1, 34, kv_heads, 64)] * 2)
    counted = launches(op, [q, k, v, 0.125])
    assert counted == {kernel.name: moved(kind, kernel, q.shape, k.shape, dtype.size) for kernel in kind.kernels}


def test_qk_norm_rope():
    """Per value of q, k and v: forward 2, backward 3, and 4 of 6 for the weights; against MLX's 14, 23 and more."""
    rows = 48
    q, k, v, q_weight, k_weight, cos, sin = arrays(
        mx.bfloat16, *[(1, rows, 12, 64)] * 3, (64,), (64,), *[(1, rows, 1, 2, 16)] * 2
    )
    counted = launches(qk_norm_rope.OP, [q, k, v, q_weight, k_weight, cos, sin, 1e-6])
    one, tables = q.nbytes, cos.nbytes + sin.nbytes + 256
    floors = {"qk_norm_rope": 6, "qk_norm_rope_backward": 9, "qk_norm_rope_weights": 4}
    for name, units in floors.items():
        print(f"{name}: {counted[name] / (units * one + tables):.2f} of the floor")
        assert counted[name] <= OVER * (units * one + tables), name
    assert counted["qk_norm_rope"] <= 14 * one / 2


@pytest.mark.parametrize("width", [64, 2560])
def test_norm_gelu(width):
    x, weight = arrays(mx.bfloat16, (1, 16, 8, width), (width,))
    counted = launches(norm_gelu.OP, [x, weight, 1e-6])
    for name, units in {"norm_gelu": 2, "norm_gelu_backward": 3, "norm_gelu_weight": 2}.items():
        print(f"{name}, {width}: {counted[name] / (units * x.nbytes + weight.nbytes):.2f} of the floor")
        assert counted[name] <= OVER * (units * x.nbytes + weight.nbytes), name


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_conv(stride):
    x, weight = arrays(mx.bfloat16, (1, 64, 64, 32), (32, 5, 5, 1))
    counted = launches(depthwise_conv.OP, [x, weight, stride])
    floor = x.nbytes + x.nbytes // stride**2 + weight.nbytes
    for name, count in counted.items():
        print(f"{name}, {stride}: {count / floor:.2f} of the floor")
        assert count <= OVER * floor, name


def test_vision_pool():
    x, bias, scale = arrays(mx.bfloat16, (1, 360, 256), (256,), (256,))
    counted = launches(vision_pool.OP, [x, 9, 16.0, bias, scale])
    assert counted["vision_pool"] <= OVER * (x.nbytes * 10 / 9 + bias.nbytes + scale.nbytes)
