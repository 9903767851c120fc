"""Kernels of mlx-lm, which run on Macs, run here unchanged: no complaint, and what plain MLX gives."""

import importlib
import sys

import mlx.core as mx
import pytest
from metal.emulator import SCHEDULES, Emulator
from metal.inline import Inline

from gemma_mlx.ops.kernel import Launch


def emulated_kernel(emulator):
    """What stands for ``mx.fast.metal_kernel``."""

    def metal_kernel(name, input_names, output_names, source, header="", atomic_outputs=False, **_):
        kernel = Inline(
            name, tuple(input_names), tuple(output_names), atomic=atomic_outputs, text=source, header_text=header
        )

        def run(*, inputs, grid, threadgroup, output_shapes, output_dtypes, template=(), init_value=None, **_):
            arrays = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in inputs)
            shapes, dtypes = tuple(map(tuple, output_shapes)), tuple(output_dtypes)
            return emulator.run(
                Launch(kernel, arrays, dict(template), tuple(grid), tuple(threadgroup), shapes, dtypes, init_value)
            )

        return run

    return metal_kernel


@pytest.fixture(params=SCHEDULES)
def load(request, monkeypatch):
    """A module of mlx-lm, made anew with its kernels emulated."""
    emulator, real = Emulator(request.param), mx.fast.metal_kernel

    def loaded(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(mx.metal, "is_available", lambda: True)
            patch.setattr(mx.fast, "metal_kernel", emulated_kernel(emulator))
            module = importlib.import_module(name)
        assert mx.fast.metal_kernel is real
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield loaded
    assert emulator.records


def random(*shape):
    return mx.random.normal(shape)


def test_gated_delta(load):
    module = load("mlx_lm.models.gated_delta")
    q, k, v = 0.1 * random(1, 5, 2, 64), 0.1 * random(1, 5, 2, 64), random(1, 5, 4, 32)
    decay, beta, state = mx.sigmoid(random(1, 5, 4)), mx.sigmoid(random(1, 5, 4)), random(1, 4, 32, 64)
    made = module.gated_delta_kernel(q, k, v, decay, beta, state)
    for ours, theirs in zip(made, module.gated_delta_ops(q, k, v, decay, beta, state), strict=True):
        assert mx.abs(ours - theirs).max() < 1e-5


def test_state_space(load):
    module = load("mlx_lm.models.ssm")
    x, a, b, c, d = random(1, 1, 4, 16), random(4), random(1, 1, 2, 64), random(1, 1, 2, 64), random(4)
    dt, bias, state = random(1, 1, 4), random(4), random(1, 4, 16, 64)
    out, new = module.ssm_update_kernel(x, a, b, c, d, dt, bias, state, (0.0, 10.0))
    step = module.compute_dt(dt, bias, (0.0, 10.0))[0, 0]
    b, c = (mx.repeat(m[0, 0], 2, axis=0)[:, None] for m in (b, c))
    decay = mx.exp(-mx.exp(a) * step)[:, None, None]
    expected = decay * state[0] + (x[0, 0] * step[:, None])[..., None] * b
    assert mx.abs(new[0] - expected).max() < 1e-4
    assert mx.abs(out[0, 0] - ((expected * c).sum(-1) + x[0, 0] * d[:, None])).max() < 1e-3


def test_expert_routing(load):
    module = load("mlx_lm.kernels.expert_routing")
    logits, bias = random(7, 40), random(40)
    inds, weights = module.expert_routing(logits, bias, top_k=4, multiplier=1.0, score_eps=1e-6, route_scale=1.0)
    scores = mx.sigmoid(logits)
    best = mx.argsort(-(scores + bias), axis=-1)[:, :4]
    assert mx.array_equal(best, inds)
    chosen = mx.take_along_axis(scores, best, axis=-1)
    assert mx.abs(weights - chosen / chosen.sum(-1, keepdims=True)).max() < 1e-5
