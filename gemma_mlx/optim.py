"""AdamW, learning-rate schedules and gradient clipping, as torch and transformers compute them.

Everything here is a function of its arguments: the compiled step takes weights, moments and one step's scalars and
returns new ones, so a resumed run computes the very same bits.
"""

from __future__ import annotations

import math

import mlx.core as mx

BETAS = (0.9, 0.999)
EPS = 1e-8
"""Kingma & Ba 2015 (arXiv:1412.6980), torch's defaults."""

Weights = dict[str, mx.array]


def adamw_init(weights: Weights) -> dict[str, Weights]:
    """Zero moments, float32: ``m`` (mean gradient) and ``v`` (mean square)."""
    return {name: {k: mx.zeros(w.shape, mx.float32) for k, w in weights.items()} for name in ("m", "v")}


def adamw_scalars(step: int, lr: float, weight_decay: float) -> mx.array:
    """float32 [3]: what step number ``step`` (from 1) needs, from float64: decay factor, step size, √(1 − β₂ᵗ).

    The bias corrections are computed here because 1 − 0.999ᵗ in float32 is off by 3e-5 at the first step.
    """
    return mx.array(
        [1.0 - lr * weight_decay, lr / (1.0 - BETAS[0] ** step), math.sqrt(1.0 - BETAS[1] ** step)], dtype=mx.float32
    )


def adamw_update(
    weights: Weights, moments: dict[str, Weights], grads: Weights, scalars: mx.array
) -> tuple[Weights, dict[str, Weights]]:
    """One step of decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), as ``torch.optim.AdamW``."""
    decay, step_size, correction = scalars[0], scalars[1], scalars[2]
    new_weights, m, v = {}, {}, {}
    for name, w in weights.items():
        g = grads[name]
        m[name] = BETAS[0] * moments["m"][name] + (1.0 - BETAS[0]) * g
        v[name] = BETAS[1] * moments["v"][name] + (1.0 - BETAS[1]) * mx.square(g)
        new_weights[name] = w * decay - step_size * m[name] / (mx.sqrt(v[name]) / correction + EPS)
    return new_weights, {"m": m, "v": v}


def global_norm(grads: Weights) -> mx.array:
    """The 2-norm of all gradients together, float32 scalar."""
    return mx.sqrt(sum((mx.sum(mx.square(g.astype(mx.float32))) for g in grads.values()), mx.array(0.0)))


def clip_by_norm(grads: Weights, largest: float, share: mx.array | float = 1.0) -> tuple[Weights, mx.array]:
    """(``share`` of the gradients, scaled so that their global norm is at most ``largest``, the norm before), as
    torch's ``clip_grad_norm_``; ``largest`` 0 never scales. One product for a gradient: none is held beside it."""
    norm = global_norm(grads) * share
    factor = share * mx.minimum(largest / (norm + 1e-6), 1.0) if largest > 0.0 else share
    return {name: g * factor for name, g in grads.items()}, norm


def warmup_steps(warmup: float, steps: int) -> int:
    """``warmup`` below 1 is a part of all steps (rounded up), from 1 on a number of steps."""
    return min(steps, math.ceil(warmup * steps) if warmup < 1.0 else round(warmup))


def learning_rate(
    step: int, steps: int, lr: float, schedule: str = "cosine", warmup: float = 0.0, min_lr: float = 0.0
) -> float:
    """Rate of optimizer step ``step`` (from 0) out of ``steps``.

    Linear from 0 over the warm-up, then constant, or down to ``min_lr`` along a line or half a cosine; with
    ``min_lr`` 0 the values of transformers' ``get_{constant,linear,cosine}_schedule_with_warmup``.
    """
    first = warmup_steps(warmup, steps)
    if step < first:
        return lr * step / max(1, first)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - first) / max(1, steps - first))
    share = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (lr - min_lr) * share
