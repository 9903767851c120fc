"""What comes before and after the layers of Gemma 4's vision tower, emulated, against torch in float64."""

import harness
import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops import patch_positions, vision_pool

WIDTHS = (7, 8, 127, 128, 129)


def pooled(x, cell, factor, bias=None, scale=None):
    mean = x.unflatten(1, (-1, cell)).mean(2) * factor
    return mean if bias is None else (mean - bias) * scale


def placed(x, table, at):
    vectors = table[0][at[..., 0].clamp(0).long()] + table[1][at[..., 1].clamp(0).long()]
    return x + vectors * (at != -1).any(-1, keepdim=True)


def cells(width, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((2, 18, width)), 9, 5.5, *random.standard_normal((2, width))]


def places(width, patches=13, seed=0):
    random = np.random.default_rng(seed)
    at = random.integers(0, 5, (2, patches, 2)).astype(np.int32)
    at[0, 3:], at[1, :] = -1, [[0, -1]]
    return [random.standard_normal((2, patches, width)), random.standard_normal((2, 5, width)), at]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(dtype):
    check(vision_pool.OP, cells(40), pooled, (0,), dtype, SCHEDULES)
    check(vision_pool.OP, cells(40)[:3], pooled, (0,), dtype, SCHEDULES[:1])


@pytest.mark.parametrize("width", WIDTHS)
def test_pool_at_the_edges(width):
    check(vision_pool.OP, cells(width), pooled, (0,), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions(dtype):
    check(patch_positions.OP, places(40), placed, (0, 1), dtype, SCHEDULES)


@pytest.mark.parametrize("width", WIDTHS)
def test_positions_at_the_edges(width):
    check(patch_positions.OP, places(width), placed, (0, 1), mx.float32, SCHEDULES[:1])


def test_references_equal_their_definitions():
    for op, exact, given in ((vision_pool.OP, pooled, cells(33)), (patch_positions.OP, placed, places(33))):
        ours = [
            mx.array(a.astype(np.float32) if a.dtype == np.float64 else a) if isinstance(a, np.ndarray) else a
            for a in given
        ]
        theirs = [torch.tensor(np.array(a)) if isinstance(a, mx.array) else a for a in ours]
        harness.assert_close(op.name, op.function(*ours), exact(*theirs).numpy(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_real_size(dtype):
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 2520, 1152))
    check(
        vision_pool.OP, [x, 9, 34.0, *random.standard_normal((2, 1152))], pooled, (0,), dtype, SCHEDULES[:1], sample=80
    )
    at = random.integers(0, 60, (1, 2520, 2)).astype(np.int32)
    given = [x, random.standard_normal((2, 60, 1152)), at]
    check(patch_positions.OP, given, placed, (0,), dtype, SCHEDULES[:1], sample=80)
