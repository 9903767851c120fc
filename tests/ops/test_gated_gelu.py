"""The gated gelu and its gradient against torch in float64, within 1e-6 of the largest value."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.ops.norm_gelu import gelu_tanh


def reference(gate, x, cotangent):
    gate, x = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (gate, x))
    out = torch.nn.functional.gelu(gate, approximate="tanh") * x
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return [a.detach().numpy() for a in (out, gate.grad, x.grad)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33), (0, 4)])
def test_value_and_gradient(shape, compiled):
    r = np.random.default_rng(0)
    arrays = [(3 * r.standard_normal(shape)).astype(np.float32) for _ in range(3)]

    def both(gate, x, cotangent):
        (out,), gradients = mx.vjp(lambda a, b: [gated_gelu(a, b)], [gate, x], [cotangent])
        return out, *gradients

    run = mx.compile(both) if compiled else both
    for ours, theirs in zip(run(*map(mx.array, arrays)), reference(*arrays), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(np.array(ours) - theirs).max(initial=0) <= 1e-6 * np.abs(theirs).max(initial=1)


def test_far_values_saturate():
    gate = np.array([-1e4, -40.0, 0.0, 40.0, 1e4], np.float32)
    ours = mx.vjp(lambda a, b: [gated_gelu(a, b)], [mx.array(gate), mx.ones(5)], [mx.ones(5)])
    for a, b in zip((*ours[0], *ours[1]), reference(gate, np.ones(5), np.ones(5)), strict=True):
        assert np.allclose(np.array(a), b, rtol=1e-6, atol=1e-7)


def test_bfloat16_keeps_its_dtype():
    """Each within a few of bfloat16's last bits."""
    r = np.random.default_rng(1)
    arrays = [mx.array(r.standard_normal((64, 9)).astype(np.float32)).astype(mx.bfloat16) for _ in range(3)]
    (out,), gradients = mx.vjp(lambda a, b: [gated_gelu(a, b)], arrays[:2], arrays[2:])
    exact = reference(*(np.array(a.astype(mx.float32)) for a in arrays))
    for ours, theirs in zip((out, *gradients), exact, strict=True):
        assert ours.dtype == mx.bfloat16
        assert np.abs(np.array(ours.astype(mx.float32)) - theirs).max() <= 0.02 * np.abs(theirs).max()


def test_the_gradient_keeps_less_than_the_plain_formula_does():
    """A chain of twelve, each with its factor made on the way."""
    x = mx.random.normal((500, 500))
    factors = [mx.random.normal(x.shape) for _ in range(12)]

    def peak(link):
        def chain(x):
            for factor in factors:
                x = link(x, factor * 0.5)
            return x.sum()

        mx.eval(x, factors)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(chain)(x))
        return mx.get_peak_memory() - before

    assert peak(gated_gelu) < 0.6 * peak(lambda gate, factor: gelu_tanh(gate) * factor)
