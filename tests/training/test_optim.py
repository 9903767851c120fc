"""AdamW, clipping and schedules against torch and transformers."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.optim import adamw_init, adamw_scalars, adamw_update, clip_by_norm, global_norm, learning_rate

SHAPES = {"a": (7, 3), "b": (3, 11), "c": (5,)}


def _values(r, scale=1.0):
    return {k: (scale * r.standard_normal(s)).astype(np.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_equal_torch(weight_decay, compiled):
    """Against torch in float64: float32 rounding only (1e-5 of a weight of scale 1 after 50 steps of lr 0.01)."""
    torch = pytest.importorskip("torch")
    r = np.random.default_rng(0)
    start = _values(r)
    theirs = {k: torch.nn.Parameter(torch.tensor(w, dtype=torch.float64)) for k, w in start.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=weight_decay)
    weights = {k: mx.array(w) for k, w in start.items()}
    moments = adamw_init(weights)
    update = mx.compile(adamw_update) if compiled else adamw_update
    for step in range(50):
        lr = 0.01 * (1 + math.sin(step))
        grads = _values(r, scale=10.0 ** r.integers(-4, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k], dtype=torch.float64)
        optimizer.step()
        scalars = adamw_scalars(step + 1, lr, weight_decay)
        weights, moments = update(weights, moments, {k: mx.array(g) for k, g in grads.items()}, scalars)
        mx.eval(weights, moments)
    for k in SHAPES:
        assert np.abs(np.array(weights[k]) - theirs[k].detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("largest", [0.5, 1e6, 0.0])
def test_clipping_equals_torch(largest):
    torch = pytest.importorskip("torch")
    grads = _values(np.random.default_rng(1), scale=3.0)
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(params, largest if largest else math.inf)
    clipped, ours = clip_by_norm({k: mx.array(g) for k, g in grads.items()}, largest)
    assert abs(ours.item() - norm.item()) < 1e-5 * norm.item()
    for p, g in zip(params, clipped.values(), strict=True):
        assert np.allclose(np.array(g), p.grad.numpy(), rtol=1e-5, atol=1e-7)
    if largest == 0.5:
        assert abs(global_norm(clipped).item() - 0.5) < 1e-4


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 5.0, 0.1])
def test_schedules_equal_transformers(schedule, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps, lr = 37, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    arguments = {"num_warmup_steps": {0.0: 0, 5.0: 5, 0.1: 4}[warmup]}
    theirs = make(optimizer, **arguments, **({} if schedule == "constant" else {"num_training_steps": steps}))
    for step in range(steps):
        ours = learning_rate(step, steps, lr, schedule, warmup)
        assert abs(ours - theirs.get_last_lr()[0]) < 1e-12, step
        optimizer.step()
        theirs.step()


def test_schedules_end_at_the_floor():
    for schedule in ("cosine", "linear"):
        rates = [learning_rate(s, 101, 1e-3, schedule, 10, 1e-4) for s in range(102)]
        assert rates[0] == 0.0 and max(rates) == rates[10] == 1e-3 and abs(rates[101] - 1e-4) < 1e-15
        assert all(a >= b for a, b in pairwise(rates[10:]))
        middle = learning_rate(10 + 91 / 2, 101, 1e-3, schedule, 10, 1e-4)
        assert abs(middle - (1e-3 + 1e-4) / 2) < 1e-12  # both pass the half-way rate half-way
