"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with the run's own learning rate and no first moment.

For a matrix the second moment is kept as its means over rows and over columns. As ``transformers.Adafactor`` with
``scale_parameter=False, relative_step=False``: an update's root mean square is at most the learning rate, which so
means what it means to AdamW.
"""

from __future__ import annotations

import mlx.core as mx

from gemma_mlx.optim import Weights

DECAY_POWER = -0.8
EPS = 1e-30
"""Added to squared gradients: the paper's ε₁."""
LARGEST_UPDATE = 1.0
"""Root mean square that a tensor's update is scaled down to before the learning rate: the paper's d."""


def adafactor_init(weights: Weights) -> dict[str, Weights]:
    """Zeros, float32. ``row`` [..., n] and ``column`` [..., m] for tensors [..., n, m], ``v`` for vectors.

    More than two axes are so many matrices of the last two, in MLX's layouts: each expert has its own factors, and so
    has each output channel of a convolution [out, k, in].
    """
    matrices = {name: w.shape for name, w in weights.items() if w.ndim >= 2}
    return {
        "row": {name: mx.zeros(shape[:-1]) for name, shape in matrices.items()},
        "column": {name: mx.zeros((*shape[:-2], shape[-1])) for name, shape in matrices.items()},
        "v": {name: mx.zeros(w.shape) for name, w in weights.items() if name not in matrices},
    }


def adafactor_scalars(step: int, lr: float, weight_decay: float) -> mx.array:
    """float32 [3]: what step number ``step`` (from 1) needs: decay factor, rate, and how much of the second moment is
    new, 1 − β₂ₜ = t^−0.8."""
    return mx.array([1.0 - lr * weight_decay, lr, float(step) ** DECAY_POWER], dtype=mx.float32)


def adafactor_update(
    weights: Weights, state: dict[str, Weights], grads: Weights, scalars: mx.array
) -> tuple[Weights, dict[str, Weights]]:
    """One step, with decoupled weight decay."""
    decay, lr, share = scalars[0], scalars[1], scalars[2]
    new_weights: Weights = {}
    new_state: dict[str, Weights] = {kind: {} for kind in state}
    for name, w in weights.items():
        g = grads[name]
        square = mx.square(g) + EPS
        parts = {"row": mx.mean(square, -1), "column": mx.mean(square, -2)} if w.ndim >= 2 else {"v": square}
        for kind, part in parts.items():
            old = state[kind][name]
            parts[kind] = new_state[kind][name] = old + share * (part - old)
        update = g * (_inverse_root(parts["row"], parts["column"]) if w.ndim >= 2 else mx.rsqrt(parts["v"]))
        size = mx.sqrt(mx.mean(mx.square(update)))
        new_weights[name] = w * decay - lr * update / mx.maximum(size / LARGEST_UPDATE, 1.0)
    return new_weights, new_state


def _inverse_root(row: mx.array, column: mx.array) -> mx.array:
    """1/√V of the second moment V = row·columnᵀ / mean(row); row [..., n], column [..., m] -> [..., n, m]."""
    share = row / mx.mean(row, -1, keepdims=True)
    return mx.rsqrt(share)[..., :, None] * mx.rsqrt(column)[..., None, :]
