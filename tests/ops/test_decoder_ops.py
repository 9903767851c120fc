"""The decoder's kernels, emulated, against torch in float64: values and gradients, every dtype, odd sizes."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from harness import DTYPES, check
from metal.emulator import Emulator

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.altup_correct import altup_correct
from gemma_mlx.ops.altup_predict import altup_predict
from gemma_mlx.ops.clamp import clamp
from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.ops.head_curve import Curve
from gemma_mlx.ops.head_pulls import head_pulls
from gemma_mlx.ops.head_scores import head_scores
from gemma_mlx.ops.norm_residual import norm_residual
from gemma_mlx.ops.sparse_gelu import sparse_gelu

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).rsplit(".", 1)[-1])
ONCE = ("fifo",)
WIDTHS = (7, 8, 127, 128, 129, 1025)
"""Around 8 values, below which inputs are constants; around 128, a SIMD group's share; above 1,024 threads."""


def arrays(seed: int, *shapes: tuple[int, ...], size: float = 1.0) -> list[np.ndarray]:
    """Normal values."""
    random = np.random.default_rng(seed)
    return [size * random.standard_normal(shape) for shape in shapes]


def gelu_times(gate, x):
    return torch.nn.functional.gelu(gate, approximate="tanh") * x


def norm_onto(x, residual, weight, eps, factor, scale):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    out = residual + factor * (normed if weight is None else normed * weight)
    return out if scale is None else out * scale


def sparse(gate, x, quantile):
    deviation = gate.std(-1, unbiased=False, keepdim=True)
    return gelu_times(torch.relu(gate - gate.mean(-1, keepdim=True) - quantile * deviation), x)


def predict(first, others, mix):
    streams = torch.cat([first[None], others])
    predicted = streams + torch.einsum("...ji,i...w->j...w", mix, streams)
    return predicted[0], predicted[1:]


def correct(active, rest, activated, shares, added):
    return rest + shares.movedim(-1, 0)[..., None] * (activated - active) + added


@every_dtype
def test_gated_gelu(dtype):
    check(gated_gelu, arrays(0, (5, 411), (5, 411), size=2.0), gelu_times, (0, 1), dtype)


@pytest.mark.parametrize("count", [1, 7, 8, 1023, 1024, 1025])
def test_gated_gelu_at_the_edges(count):
    check(gated_gelu, arrays(1, (count,), (count,)), gelu_times, (0, 1), schedules=ONCE)


@every_dtype
def test_norm_residual(dtype):
    x, residual, weight, scale = arrays(2, (2, 3, 131), (2, 3, 131), (131,), (1,))
    check(norm_residual, [x, residual, weight, 1e-6, 0.5, scale], norm_onto, (0, 1, 2), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_residual_at_the_edges(width):
    x, residual, weight = arrays(width, (35, width), (35, width), (width,))
    check(norm_residual, [x, residual, weight, 1e-6, 1.0, None], norm_onto, (0, 1, 2), schedules=ONCE)
    check(norm_residual, [x, residual, None, 1e-5, 1.0, None], norm_onto, (0, 1), schedules=ONCE)


@pytest.mark.parametrize("rows", [511, 512, 515])
def test_norm_residual_of_many_rows(rows):
    """A group of several rows, the last of fewer."""
    given = [*arrays(rows, (rows, 37), (rows, 37), (37,)), 1e-6, 1.0, None]
    check(norm_residual, given, norm_onto, (0, 1, 2), schedules=("random",))


def test_norm_of_zeros_is_zero():
    zeros, ones = np.zeros((3, 40)), np.ones((3, 40))
    check(norm_residual, [zeros, ones, ones[0], 1e-6, 1.0, None], norm_onto, (0, 1, 2), schedules=ONCE)


@every_dtype
@pytest.mark.parametrize("count", [1, 7, 8, 1023, 1025])
def test_clamp(dtype, count):
    """Values on the bounds pass their gradient, as torch's do."""
    x = np.round(arrays(3, (count,), size=3.0)[0] * 4) / 4
    given = [x, mx.array(-1.5), mx.array(2.25)]
    check(clamp, given, lambda x, low, high: torch.clamp(x, low.item(), high.item()), (0,), dtype, schedules=ONCE)


def test_clamp_keeps_nan():
    with dispatch.using(Emulator()):
        out = clamp(mx.array([float("nan"), 5.0, -5.0]), mx.array(-1.0), mx.array(1.0))
        assert np.array_equal(np.array(out), [np.nan, 1.0, -1.0], equal_nan=True)


@every_dtype
def test_altup(dtype):
    first, others, mix, shares = arrays(4, (2, 3, 131), (3, 2, 3, 131), (2, 3, 4, 4), (2, 3, 3))
    check(altup_predict, [first, others, mix], predict, (0, 1, 2), dtype)
    check(altup_correct, [first, others, -2 * first, shares, first * 2], correct, (0, 1, 2, 3, 4), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_altup_at_the_edges(width):
    first, others, mix, shares, added = arrays(width, (2, width), (3, 2, width), (2, 4, 4), (2, 3), (2, width))
    check(altup_predict, [first, others, mix], predict, (0, 1, 2), schedules=ONCE)
    check(altup_correct, [first, others, added, shares, added], correct, (0, 1, 2, 3, 4), schedules=ONCE)


def sparse_at(sparsity: float, dtype: mx.Dtype):
    """The formula with its quantile in the dtype of the op, as transformers has it."""
    exact = math.sqrt(2) * torch.erfinv(torch.tensor(2 * sparsity - 1, dtype=torch.float64))
    z = mx.array(exact.item(), dtype).astype(mx.float32).item()
    return lambda gate, x, _: sparse(gate, x, z)


@every_dtype
def test_sparse_gelu(dtype):
    check(sparse_gelu, [*arrays(6, (3, 301), (3, 301), size=2.0), 0.9], sparse_at(0.9, dtype), (0, 1), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_sparse_gelu_at_the_edges(width):
    given = [*arrays(width, (2, width), (2, width)), 0.5]
    check(sparse_gelu, given, sparse_at(0.5, mx.float32), (0, 1), schedules=ONCE)


def scores_oracle(curve: Curve, base: int):
    """head_scores in logits: natural exponentials instead of powers of two."""

    def run(scores, wanted, start, top, index, target, others, *_):
        units = scores * (1.0 if curve.prescaled else curve.unit)
        column = torch.arange(units.shape[1])[None]
        logits = units * math.log(2.0)
        exponent = logits if curve.cap is None else curve.cap * torch.tanh(logits / 2) - curve.cap
        best, place = units.max(1, keepdim=True)
        new_top = torch.maximum(top, best)

        def measured(top):
            if curve.fixed:
                return torch.zeros_like(top)
            natural = top * math.log(2.0)
            return natural if curve.cap is None else curve.cap * torch.tanh(natural / 2) - curve.cap

        masses = torch.exp(exponent - measured(new_top)) * (column != wanted)
        keep = torch.exp(measured(top) - measured(new_top))
        inside = (wanted >= 0) & (wanted < units.shape[1])
        own = torch.where(inside, units.gather(1, wanted.long().clamp(0, units.shape[1] - 1)), target)
        slope = 1.0 if curve.cap is None else (1 - torch.tanh(logits / 2) ** 2) / 4
        new_index = torch.where(best > top, place + start, index)
        return new_top, new_index, own, others * keep + masses.sum(1, keepdim=True), keep, masses * slope

    return run


def running(rows: list[int], seed: int) -> list:
    """wanted, start and running values of a chunk's rows."""
    top, target = arrays(seed, (len(rows), 1), (len(rows), 1), size=10.0)
    wanted, index = (np.array(a, np.int32)[:, None] for a in (rows, range(len(rows))))
    fixed = [mx.array(a.astype(np.float32)) for a in (top, target, np.full(top.shape, 0.5))]
    return [wanted, np.array([[512]], np.int32), fixed[0], index, fixed[1], fixed[2]]


@pytest.mark.parametrize("cap", [30.0, None, 80.0])
@pytest.mark.parametrize("columns", [7, 8, 33, 1023, 1024, 1031])
def test_head_scores(cap, columns):
    scores = arrays(columns, (5, columns), size=10.0)
    given = [*scores, *running([-4, 0, columns - 1, columns, columns // 2], columns + 1), Curve(cap), mx.float32]
    check(head_scores, given, scores_oracle(Curve(cap), 512), schedules=ONCE)


@every_dtype
def test_head_scores_in_every_order(dtype):
    scores = arrays(9, (5, 1031), size=10.0)
    given = [*scores, *running([-4, 0, 1030, 1031, 7], 10), Curve(30.0), dtype]
    check(head_scores, given, scores_oracle(Curve(30.0), 512), dtype=dtype)


def pulls_oracle(curve: Curve):
    def run(scores, wanted, measured, own, factor, *_):
        logits = scores * curve.scale * math.log(2.0)
        capped = curve.cap is not None
        exponent = curve.cap * torch.tanh(logits / 2) - curve.cap if capped else logits
        masses = torch.exp(exponent - measured * math.log(2.0))
        masses = torch.where(torch.arange(scores.shape[1])[None] == wanted, own, masses)
        return masses * ((1 - torch.tanh(logits / 2) ** 2) / 4 if capped else 1.0) * factor

    return run


@every_dtype
@pytest.mark.parametrize("columns", [7, 8, 2047, 2048, 2049])
def test_head_pulls(dtype, columns):
    scores = arrays(columns, (3, columns), size=5.0)
    wanted = np.array([[-1], [3], [columns]], np.int32)
    own, factor = (mx.array(a.astype(np.float32)) for a in arrays(columns + 1, (3, 1), (3, 1)))
    for curve in (Curve(30.0), Curve(None)):
        given = [*scores, wanted, mx.full((3, 1), 4.0 if curve.cap else 20.0), own, factor, curve, dtype]
        check(head_pulls, given, pulls_oracle(curve), dtype=dtype, schedules=ONCE)


SAMPLED = dict(schedules=ONCE, sample=12)
REAL = {
    "gated_gelu": lambda: check(gated_gelu, arrays(0, (2520, 3072), (2520, 3072)), gelu_times, (0, 1), **SAMPLED),
    "norm_residual": lambda: check(
        norm_residual, [*arrays(1, (2520, 768), (2520, 768), (768,)), 1e-6, 1.0, None], norm_onto, (0, 1), **SAMPLED
    ),
    "altup_predict": lambda: check(
        altup_predict, arrays(2, (512, 2048), (3, 512, 2048), (512, 4, 4)), predict, (0, 1, 2), **SAMPLED
    ),
    "altup_correct": lambda: check(
        altup_correct, arrays(3, (512, 2048), (3, 512, 2048), (512, 2048), (512, 3), (512, 2048)), correct,
        (0, 2, 3, 4), **SAMPLED,
    ),
    "sparse_gelu": lambda: check(
        sparse_gelu, [*arrays(4, (512, 8192), (512, 8192)), 0.95], sparse_at(0.95, mx.float32), (0, 1), **SAMPLED
    ),
    "head_scores": lambda: check(
        head_scores,
        [*arrays(5, (24, 16384), size=10.0), *running(list(range(24)), 6), Curve(30.0), mx.float32],
        scores_oracle(Curve(30.0), 512), schedules=ONCE,
    ),
    "head_pulls": lambda: check(
        head_pulls,
        [*arrays(6, (24, 16384), size=5.0), np.arange(24, dtype=np.int32)[:, None], *[mx.ones((24, 1))] * 3,
         Curve(30.0), mx.float32],
        pulls_oracle(Curve(30.0)), schedules=ONCE,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name):
    """Twelve threadgroups, of the same rows in the gradients; of the head's chunks 24 rows, whole."""
    REAL[name]()
