"""Depthwise convolutions, emulated, against torch in float64: values and gradients."""

import harness
import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.depthwise_conv import OP, OUTS, SIMDS, STRIP, depthwise_conv


def exact(x, weight, stride):
    """Padded as TensorFlow's "same"."""
    side, pads = weight.shape[1], []
    for n in (x.shape[2], x.shape[1]):
        total = max((-(-n // stride) - 1) * stride + side - n, 0)
        pads += [total // 2, total - total // 2]
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), pads)
    out = torch.nn.functional.conv2d(padded, weight.permute(0, 3, 1, 2), stride=stride, groups=x.shape[-1])
    return out.permute(0, 2, 3, 1)


def given(shape, side, stride, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape), random.standard_normal((shape[-1], side, side, 1)), stride]


@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_pictures(side, stride):
    """Two pictures of odd and even sides, channels beyond a SIMD group's."""
    schedules = SCHEDULES if (side, stride) == (3, 2) else SCHEDULES[2:]
    check(OP, given((2, 6, 7, 33), side, stride), exact, (0, 1), mx.float32, schedules)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype):
    check(OP, given((1, 5, 6, 3), 3, 2), exact, (0, 1), dtype)
    check(OP, given((1, 5, 6, 3), 5, 1), exact, (0, 1), dtype, SCHEDULES[:1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_edges_of_blocks(more, stride):
    """Outputs of a strip and of a group's columns, and one less and more."""
    shape = (1, stride * (STRIP + more), stride * (SIMDS * OUTS + more), 2)
    check(OP, given(shape, 3, stride), exact, (0, 1), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (1, 1, 8, 1), (1, 1, 1, 31), (1, 2, 2, 32)])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (5, 2)])
def test_pictures_smaller_than_a_kernel(shape, side, stride):
    check(OP, given(shape, side, stride), exact, (0, 1), mx.float32, SCHEDULES[:1])


def test_reference_equals_its_definition():
    x, weight, stride = given((2, 9, 6, 5), 5, 2)
    x, weight = (mx.array(a.astype(np.float32)) for a in (x, weight))
    expected = exact(torch.tensor(harness.numbers(x)), torch.tensor(harness.numbers(weight)), stride)
    harness.assert_close("out", depthwise_conv(x, weight, stride), expected.numpy(), 1e-5)


def test_kernels_of_other_sides_are_plain():
    with pytest.raises(AssertionError, match="launched"):
        check(OP, given((1, 9, 9, 2), 7, 1), exact, (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "channels", "stride"), [(96, 256, 1), (48, 1536, 2)])
def test_real_size(side, channels, stride, dtype):
    arguments = given((1, side, side, channels), 5, stride)
    check(depthwise_conv, arguments, exact, (0,), dtype, SCHEDULES[:1], sample=6)
