"""The light convolution's kernels, emulated, against torch in float64: values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.glu_conv import OP, ROWS, WEIGHT_ROWS


def exact(x, taps, weight, eps=1e-6, limit=1e10):
    value, gate = x.chunk(2, -1)
    u = (value * torch.sigmoid(gate)).swapaxes(1, 2)
    u = torch.nn.functional.pad(u, (taps.shape[1] - 1, 0))
    y = torch.nn.functional.conv1d(u, taps.swapaxes(1, 2), groups=taps.shape[0]).swapaxes(1, 2).clamp(-limit, limit)
    return torch.nn.functional.silu(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight)


def given(clips, frames, channels, kernel=5, seed=0):
    random = np.random.default_rng(seed)
    shapes = (clips, frames, 2 * channels), (channels, kernel, 1), (channels,)
    x, taps, weight = (random.standard_normal(shape) for shape in shapes)
    return [x, taps, 1 + 0.3 * weight]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips(dtype):
    """Several blocks, two SIMD groups, two channels a thread."""
    check(OP, given(2, 35, 67), exact, (0, 1, 2), dtype, SCHEDULES)


@pytest.mark.parametrize("channels", [3, 4, 7, 8, 63, 64, 65, 1025])
def test_channels(channels):
    """Around inputs of 8 values, a SIMD group's share and a group's."""
    check(OP, given(1, 3, channels), exact, (0, 1, 2), mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("frames", [1, 4, 5, ROWS - 1, ROWS, ROWS + 1, WEIGHT_ROWS - 1, WEIGHT_ROWS, WEIGHT_ROWS + 1])
def test_frames(frames):
    check(OP, given(1, frames, 4), exact, (0, 1, 2), mx.float32, SCHEDULES[2:])


@pytest.mark.parametrize("kernel", [1, 2, 8])
def test_taps(kernel):
    check(OP, given(1, 21, 5, kernel), exact, (0, 1, 2), mx.float32, SCHEDULES[:1])


def test_a_limit_stops_gradients():
    check(OP, [*given(1, 20, 9), 1e-3, 0.4], exact, (0, 1, 2), mx.float32, SCHEDULES[:1])


def test_float16_overflows_into_its_limit():
    """Plain float16 clamps infinity; sums of squares are float32 in both."""
    x, taps, weight = given(1, 6, 9)
    check(OP, [x * 2e4, taps * 4, weight], lambda *a: exact(*a, limit=65504.0), (), mx.float16, SCHEDULES[:1],
          launches=["glu_conv"])  # fmt: skip


def test_silence():
    """Zeros give zeros, and finite gradients: the norm's factor is 1000."""
    x, taps, weight = given(1, 7, 5)
    check(OP, [0 * x, taps, weight], exact, (0, 1, 2), mx.float32, SCHEDULES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "dtype"), [(1024, mx.bfloat16), (1536, mx.bfloat16), (1024, mx.float32)])
def test_real_sizes(channels, dtype):
    check(OP, given(1, 750, channels), exact, (0,), dtype, SCHEDULES[:1], sample=6, launches=["glu_conv"])
    check(OP, given(1, 70, channels), exact, (0, 1, 2), dtype, SCHEDULES[:1])
