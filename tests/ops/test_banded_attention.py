"""Banded attention's kernels, emulated, against a loop over distances in torch, float64: values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, SCHEDULES, check

from gemma_mlx.ops.banded_attention import BACKWARD, FORWARD, OP, RELATIVE, block, context_block, memory


def exact(q, k, v, relative, per_dim_scale, valid, cap, query_factor, key_factor):
    """Distances one by one; frames that see nothing average the frames of their block and of the one before."""
    clips, frames, _, size = q.shape
    window = relative.shape[0]
    q = q * query_factor * torch.nn.functional.softplus(per_dim_scale)
    time = torch.arange(frames)
    scores, values, seen = [], [], []
    for j in range(window):
        key = (time - j).clamp(min=0)
        dots = (q * (key_factor * k[:, key] + relative[window - 1 - j])).sum(-1)
        scores.append(cap * torch.tanh(dots / cap))
        values.append(v[:, key])
        ok = (time >= j).expand(clips, frames)
        seen.append(ok if valid is None else ok & valid[:, key])
    seen = torch.stack(seen, -1)[:, :, None]
    scores = torch.stack(scores, -1).masked_fill(~seen, -1e9)
    weights = torch.where(seen, scores.softmax(-1), 0.0)
    out = torch.einsum("bthj,jbthd->bthd", weights, torch.stack(values))
    size = context_block(window)
    start = time // size * size
    context = ((time >= start[:, None] - size) & (time < start[:, None] + size)).double() / (2 * size)
    even = torch.einsum("ts,bshd->bthd", context, v)
    out = torch.where(seen.any(-1)[..., None], out, even)
    return out.reshape(clips, frames, -1)


def given(clips, frames, heads, size, window, valid=None, seed=0, cap=5.0):
    random = np.random.default_rng(seed)
    q, k, v = random.standard_normal((3, clips, frames, heads, size))
    relative, per_dim = random.standard_normal((window, heads, size)), random.standard_normal(size)
    return [2 * q, k, v, relative, per_dim, valid, cap, 1.2 * size**-0.5, 1.9]


def ragged(*lengths, frames):
    return np.arange(frames)[None] < np.array(lengths)[:, None]


ALL = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(mx.float32, 12), *(pytest.param(d, 13, marks=[pytest.mark.slow] * (d != mx.bfloat16)) for d in DTYPES)],
    ids=str,
)
def test_ragged_clips(dtype, window):
    """Two blocks of every kernel; a clip that ends early, one with nothing valid at all."""
    arguments = given(3, 41, 2, 16, window, ragged(41, 17, 0, frames=41))
    check(OP, arguments, exact, ALL, dtype, SCHEDULES)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 65])
def test_heads_around_a_simd_group(size):
    check(OP, given(1, 9, 1, size, 4), exact, ALL, mx.float32, SCHEDULES[:1])


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD, RELATIVE], ids=lambda k: k.name)
def test_frames_around_a_block(kernel):
    rows = block(kernel, 3, 4, 4)
    for frames in {1, 7, 8, rows - 1, rows, rows + 1}:
        check(OP, given(1, frames, 1, 4, 3), exact, ALL, mx.float32, SCHEDULES[2:])


@pytest.mark.parametrize("window", [1, 2, 32])
def test_windows(window):
    """The frame alone; the longest: a lane for each distance, a context of 62 frames."""
    valid = ragged(40, 3, frames=40)
    valid[0, :35] = False  # padding in front: frames that see nothing, and one that sees itself
    check(OP, given(2, 40, 1, 4, window, valid), exact, ALL, mx.float32, SCHEDULES[:1])


def test_far_scores_saturate():
    """Scores of hundreds under a cap of 5, beside usual ones: tanh is ±1, and its slope 0, exactly."""
    arguments = given(1, 13, 1, 8, 12)
    arguments[0][:, :6] *= 1e3
    check(OP, arguments, exact, ALL, mx.float32, SCHEDULES[:1])


def test_scales_far_from_zero():
    """softplus keeps its relative precision where e^x is below float32's last bit beside 1."""
    arguments = given(1, 5, 1, 8, 3)
    arguments[4] = np.array([-30.0, -12.0, -5.0, -4.6, -4.7, 0.0, 12.0, 30.0])
    arguments[0][..., -2:] *= 0.03  # else all scores saturate
    check(OP, arguments, exact, ALL, mx.float32, SCHEDULES[:1])


def test_plain_form_equals_the_loop(monkeypatch):
    """The reference, fully masked frames too: float32 to 1e-5, and what a compiled step makes of the op."""
    arguments = given(2, 30, 2, 8, 12, ragged(30, 7, frames=30))
    arrays = [mx.array(a.astype(np.float32)) for a in arguments[:5]]
    rest = [mx.array(arguments[5]), *arguments[6:]]
    expected = exact(*(torch.tensor(np.array(a)).double() for a in arrays), torch.tensor(arguments[5]), *arguments[6:])
    for run in (OP.reference, mx.compile(lambda *a: OP.function(*a, *rest[1:]))):
        made = run(*arrays, *(rest if run is OP.reference else rest[:1]))
        assert np.abs(np.array(made) - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("window,size", [(12, 128), (13, 128), (13, 192)])
def test_blocks_of_the_checkpoints_fit(window, size, itemsize):
    for kernel in (FORWARD, BACKWARD, RELATIVE):
        rows = block(kernel, window, size, itemsize)
        assert rows >= 12 and memory(kernel, rows, window, size, itemsize) <= 32768


@pytest.mark.slow
@pytest.mark.parametrize("size,window,dtype", [(128, 12, mx.bfloat16), (128, 13, mx.float32), (192, 13, mx.bfloat16)])
def test_real_sizes(size, window, dtype):
    """750 frames of 8 heads, a few groups of each launch; the gradients that all groups add up in shorter clips."""
    arguments = given(1, 750, 8, size, window, ragged(700, frames=750), cap=50.0)
    check(OP, arguments, exact, (0, 1, 2), dtype, SCHEDULES[:1], sample=6, launches=[FORWARD.name, BACKWARD.name])
    check(OP, given(1, 140, 1, size, window, cap=50.0), exact, ALL, dtype, SCHEDULES[:1])
