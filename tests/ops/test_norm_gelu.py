"""Norm and gelu of rows, emulated, against torch in float64: values and gradients."""

import harness
import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.norm_gelu import OP, ROWS, norm_gelu


def exact(x, weight, eps):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return torch.nn.functional.gelu(normed, approximate="tanh")


def given(*shape, seed=0, size=1.0):
    random = np.random.default_rng(seed)
    return [size * random.standard_normal(shape), 1 + random.standard_normal(shape[-1:]), 1e-6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 3, 64), (5, 513), (6, 1030)])
def test_rows(shape, dtype):
    """One SIMD group a row and eight rows in a group; several of them a row, and several rows in turn."""
    check(OP, given(*shape), exact, (0, 1), dtype, SCHEDULES)


@pytest.mark.parametrize("width", [7, 8, 255, 256, 257, 767, 768, 769])
def test_edges_of_a_row(width):
    check(OP, given(1, width), exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("rows", [7, 8, 9, ROWS - 1, ROWS, ROWS + 1])
def test_edges_of_blocks(rows):
    check(OP, given(rows, 5), exact, (0, 1), mx.float32, SCHEDULES[2:])


def test_rows_of_zeros():
    arrays = given(4, 40)
    arrays[0][1:3] = 0
    check(OP, arrays, exact, (0, 1), mx.float32, SCHEDULES[:1], tolerance=1e-5)


def test_reference_equals_its_definition():
    x, weight, eps = given(3, 2, 65)
    x, weight = (mx.array(a.astype(np.float32)) for a in (x, weight))
    expected = exact(torch.tensor(harness.numbers(x)), torch.tensor(harness.numbers(weight)), eps)
    harness.assert_close("out", norm_gelu(x, weight, eps), expected.numpy(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 96, 1024), (1, 24, 24, 3840)])
def test_real_size(shape, dtype):
    check(norm_gelu, given(*shape), exact, (0,), dtype, SCHEDULES[:1], sample=40)
