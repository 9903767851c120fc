"""Floating-point operations of the decoder, counted from its modules' shapes.

A multiplication and an addition are two operations. Attention is counted as MLX computes it while gradients are
traced: a block of queries against its keys, masked or not (`gemma_mlx.models.blocks`), label positions against all keys
of their row. What is done value by value is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn

from gemma_mlx.lora import LoRALinear, linear_shape
from gemma_mlx.models.blocks import pairs
from gemma_mlx.spec import SLIDING

_KEYS_VALUES = ("k_proj", "v_proj")


class Cost(NamedTuple):
    """Operations of a forward, and of the gradient after it."""

    forward: int = 0
    backward: int = 0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """The sum with so many of another."""
        return Cost(self.forward + times * other.forward, self.backward + times * other.backward)


@dataclass(frozen=True)
class LayerCost:
    """Of one decoder layer: for keys and values and for all else, a position; for attention, a query and key."""

    keys_values: Cost
    rest: Cost
    pair: Cost


@dataclass(frozen=True)
class Picked:
    """How many label positions the layers above the line see, padding included: in line, and in rows of equal width."""

    positions: int
    queries: int


def layer_cost(layer: Any, spec: Any) -> LayerCost:
    """A decoder layer's, adapters included; `spec` is the decoder's.

    A frozen matrix takes as much in the backward as in the forward (the gradient of its input), a trained one twice
    that, attention's two products four.
    """
    linear = {True: Cost(), False: Cost()}
    for path, module in layer.named_modules():
        own = any(name in path for name in _KEYS_VALUES)
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            out, inner = linear_shape(module)
            trained = "weight" in module.trainable_parameters()
            linear[own] = linear[own].plus(Cost(2 * out * inner, (4 if trained else 2) * out * inner))
        elif isinstance(module, LoRALinear):
            size = module.lora_a.size + module.lora_b.size
            linear[own] = linear[own].plus(Cost(2 * size, 4 * size))
    other = 0
    if spec.enable_moe_block:
        other += 6 * spec.hidden_size * spec.moe_intermediate_size * spec.top_k_experts
    if "altup" in layer:
        other += 2 * spec.altup_num_inputs**2 * spec.hidden_size
    pair = 4 * layer.self_attn.heads * layer.self_attn.head_dim
    return LayerCost(linear[True], linear[False].plus(Cost(other, other)), Cost(pair, 2 * pair))


class DecoderCost:
    """A model's decoder's, by batch shape.

    `line` is the last layer that owns keys and values: above it, and in it but for keys and values, label positions
    are enough.
    """

    def __init__(self, model: Any):
        text = model.decoder
        self.layers = [layer_cost(layer, text.spec) for layer in text.layers]
        self.line = text.spec.first_kv_shared_layer - 1
        self.windows = [text.spec.sliding_window if kind == SLIDING else None for kind in text.spec.layer_types]

    def layer(self, i: int, rows: int, length: int, picked: Picked | None = None) -> Cost:
        """One layer over rows × length positions, or above the line over label positions alone."""
        cost, positions = self.layers[i], rows * length
        ours, met = positions, rows * pairs(length, self.windows[i])
        if picked is not None and i >= self.line:
            ours, met = picked.positions, picked.queries * length
        kept = positions if i <= self.line else ours  # layers above the line own no keys or values
        return Cost().plus(cost.keys_values, kept).plus(cost.rest, ours).plus(cost.pair, met)

    def upper(self, rows: int, length: int, picked: Picked | None = None) -> int:
        """Forward from the line on."""
        return sum(self.layer(i, rows, length, picked).forward for i in range(self.line, len(self.layers)))

    def step(self, rows: int, length: int, picked: Picked | None = None, recompute: int = 0) -> int:
        """Forward and gradient of all layers, every `recompute`-th computed again; head and embeddings left out."""
        costs = [self.layer(i, rows, length, picked) for i in range(len(self.layers))]
        again = sum(c.forward for c in costs[::recompute]) if recompute else 0
        return sum(sum(c) for c in costs) + again

    def whole(self, rows: int, length: int) -> int:
        """Forward and gradient of all layers as others compute them: every query meets every key of its row."""
        positions, pairs_met = rows * length, rows * length**2
        costs = [
            Cost().plus(c.rest, positions).plus(c.keys_values, positions).plus(c.pair, pairs_met) for c in self.layers
        ]
        return sum(sum(cost) for cost in costs)
