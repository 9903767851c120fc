"""relu of the cumulative group norm, emulated, against torch in float64: values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.cumulative_norm import OP, ROWS


def exact(x, weight, eps):
    count = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)[None, :, None, None] * x.shape[2] * x.shape[3]
    mean = x.sum((2, 3), keepdim=True).cumsum(1) / count
    variance = (x - mean).square().sum((2, 3), keepdim=True).cumsum(1) / count
    return torch.relu((x - mean) / torch.sqrt(variance + eps) * weight)


def given(*shape, seed=0):
    """Values whose mean drifts, so that frames differ from what was heard before."""
    random = np.random.default_rng(seed)
    drift = 2 * random.standard_normal((*shape[:2], 1, 1))
    return [random.standard_normal(shape) + drift, random.standard_normal(shape[-1]), 1e-3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_clips(dtype):
    """Two turns of the scan."""
    check(OP, given(2, 35, 3, 13), exact, (0, 1), dtype, SCHEDULES)


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 65])
def test_frames(frames):
    check(OP, given(1, frames, 2, 5, seed=frames), exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("bins,channels", [(1, 7), (1, 8), (3, 43), (2, 64), (1, 129), (9, 121)])
def test_widths(bins, channels):
    check(OP, given(1, 3, bins, channels), exact, (0, 1), mx.float32, SCHEDULES[1:2])


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS, ROWS + 1])
def test_blocks_of_the_weights_gradient(rows):
    check(OP, given(1, rows, 1, 3), exact, (0, 1), mx.float32, SCHEDULES[2:])


def test_silence():
    """No deviation: finite."""
    x, weight, eps = given(1, 4, 2, 9)
    check(OP, [0 * x, weight, eps], exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_real_size(dtype):
    """The first layer of 12 s."""
    check(OP, given(1, 600, 64, 128), exact, (0, 1), dtype, SCHEDULES[:1])
