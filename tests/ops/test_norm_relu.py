"""LayerNorm, relu and mask, emulated, against torch in float64: values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.norm_relu import OP, ROWS


def exact(x, weight, eps, valid):
    out = torch.relu(torch.nn.functional.layer_norm(x, weight.shape, weight, eps=eps))
    return out if valid is None else out * valid[:, :, None, None]


def given(clips, frames, bins, width, valid=None, seed=0):
    random = np.random.default_rng(seed)
    x, weight = random.standard_normal((clips, frames, bins, width)), random.standard_normal(width)
    return [2 * x + 1, weight, 1e-6, valid]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_clips(dtype):
    """Two blocks of the weight's gradient; a clip without any valid frame."""
    valid = np.arange(33)[None] < np.array([33, 12, 0])[:, None]
    check(OP, given(3, 33, 3, 67, valid), exact, (0, 1), dtype, SCHEDULES)


@pytest.mark.parametrize("width", [3, 7, 8, 31, 32, 33, 127, 128, 129, 256])
def test_widths(width):
    check(OP, given(1, 1, 3, width), exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("rows", [1, 7, 8, 9, ROWS - 1, ROWS, ROWS + 1])
def test_rows(rows):
    check(OP, given(1, rows, 1, 5), exact, (0, 1), mx.float32, SCHEDULES[2:])


def test_rows_of_one_value():
    """No deviation: finite, and the gradient of the weight 0, as in torch; relu's slope at 0 is 0."""
    x, weight, eps, valid = given(1, 2, 2, 9)
    check(OP, [0 * x + 3, weight, eps, valid], exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("bins,width", [(64, 128), (32, 32)])
def test_real_sizes(bins, width):
    arguments = given(1, 48000 // bins, bins, width)
    check(OP, arguments, exact, (0,), mx.bfloat16, SCHEDULES[:1], sample=12, launches=["norm_relu"])
