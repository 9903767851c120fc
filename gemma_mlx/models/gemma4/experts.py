"""Mixture of experts beside the dense MLP (Gemma 4 26B-A4B): transformers' ``Gemma4TextRouter`` and
``Gemma4TextExperts``.

There is no capacity limit, no auxiliary loss and no jitter. Which experts are chosen is a constant for the gradient;
how much each counts is not.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.layers import RMSNorm
from gemma_mlx.models.stacks import DOWN, ExpertStacks
from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.spec import TextSpec

SORT_FROM = 64
"""From so many (token, expert) pairs on, tokens are brought together by expert, so that each is read once."""


class Router(nn.Module):
    """Residual stream [..., hidden] -> chosen experts and their weights, in float32 whatever the stream's dtype.

    Softmax over all experts, the best `top_k_experts` of it divided by their sum, then times `per_expert_scale` (so
    that the weights need not sum to one).
    """

    def __init__(self, spec: TextSpec):
        super().__init__()
        self.top_k = spec.top_k_experts
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, with_scale=False)
        self.proj = nn.Linear(spec.hidden_size, spec.num_experts, bias=False)
        self.scale = mx.ones((spec.hidden_size,))
        self.per_expert_scale = mx.ones((spec.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(expert numbers, float32 weights), each [..., top_k], in no particular order."""
        x = self.norm(x.astype(mx.float32))
        scores = self.proj(x * self.scale.astype(mx.float32) * x.shape[-1] ** -0.5)
        shares = mx.softmax(scores.astype(mx.float32), axis=-1)
        chosen = mx.argpartition(mx.stop_gradient(-shares), kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        chosen = mx.stop_gradient(chosen)
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights * self.per_expert_scale.astype(mx.float32)[chosen]


class Experts(ExpertStacks):
    """Gated MLPs as stacks: `gate_up_proj` [experts, 2 · width, hidden] (gate rows first) and `down_proj` [experts,
    hidden, width]; see `ExpertStacks` for packed ones."""

    def __init__(self, spec: TextSpec):
        super().__init__()
        n, width, hidden = spec.num_experts, spec.moe_intermediate_size, spec.hidden_size
        self.gate_up_proj = mx.random.uniform(-(hidden**-0.5), hidden**-0.5, (n, 2 * width, hidden))
        self.down_proj = mx.random.uniform(-(width**-0.5), width**-0.5, (n, hidden, width))

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Sum over a token's experts of weight · expert(x), for x [..., hidden] in its dtype.

        Args:
            chosen: integers [..., k], the experts of each token.
            weights: float32 [..., k].
        """
        shape, k = x.shape, chosen.shape[-1]
        x, experts = x.reshape(-1, shape[-1]), chosen.reshape(-1)
        tokens, back = mx.repeat(mx.arange(x.shape[0]), k), None
        if sort := experts.size >= SORT_FROM:
            order = mx.argsort(experts)
            back, tokens, experts = mx.argsort(order), tokens[order], experts[order]
        gate, up = self.gate_and_up(x[tokens][:, None], experts, sort)
        out = self.through(DOWN, gated_gelu(gate, up), experts, sort)[:, 0]
        out = (out if back is None else out[back]).reshape(*shape[:-1], k, shape[-1])
        return (out.astype(mx.float32) * weights[..., None]).sum(axis=-2).astype(x.dtype)
