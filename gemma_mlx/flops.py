"""Floating-point operations of the decoder's forward, counted from its modules' shapes.

A multiplication and an addition are two operations. Attention is counted densely, every query against every key of its
row, since that is what MLX computes while gradients are traced; what is done value by value is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from gemma_mlx.lora import LoRALinear, linear_shape

_KEYS_VALUES = ("k_proj", "v_proj")


@dataclass(frozen=True)
class LayerFlops:
    """Of one decoder layer: for keys and values and for all else, a position; for attention, a query and key."""

    keys_values: int
    rest: int
    pair: int


@dataclass(frozen=True)
class Picked:
    """How many label positions the layers above the line see, padding included: in line, and in rows of equal width."""

    positions: int
    queries: int


def text_model(model: Any) -> Any:
    """The decoder of a model of any family."""
    return getattr(model.model, "language_model", model.model)


def layer_flops(layer: Any, spec: Any) -> LayerFlops:
    """A decoder layer's, adapters included; `spec` is the decoder's."""
    linear = {True: 0, False: 0}
    for path, module in layer.named_modules():
        own = any(name in path for name in _KEYS_VALUES)
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            out, inner = linear_shape(module)
            linear[own] += 2 * out * inner
        elif isinstance(module, LoRALinear):
            linear[own] += 2 * (module.lora_a.size + module.lora_b.size)
    rest = linear[False]
    if spec.enable_moe_block:
        rest += 6 * spec.hidden_size * spec.moe_intermediate_size * spec.top_k_experts
    if "altup" in layer:
        rest += 2 * spec.altup_num_inputs**2 * spec.hidden_size
    attention = layer.self_attn
    return LayerFlops(linear[True], rest, 4 * attention.heads * attention.head_dim)


class DecoderFlops:
    """Forward FLOPs of a model's decoder by batch shape.

    `line` is the last layer that owns keys and values: above it, and in it but for keys and values, label positions
    are enough.
    """

    def __init__(self, model: Any):
        text = text_model(model)
        self.spec = text.spec
        self.layers = [layer_flops(layer, text.spec) for layer in text.layers]
        self.line = text.spec.first_kv_shared_layer - 1
        self.head = 2 * text.spec.vocab_size * text.spec.hidden_size

    def upper(self, rows: int, length: int, picked: Picked | None = None) -> int:
        """From the line on, keys and values left out; for all positions, or for label positions alone."""
        positions = picked.positions if picked else rows * length
        pairs = length * (picked.queries if picked else rows * length)
        return sum(f.rest * positions + f.pair * pairs for f in self.layers[self.line :])

    def decoder(self, rows: int, length: int, picked: Picked | None = None) -> int:
        """All layers, without the head."""
        positions = rows * length
        lower = sum(f.rest * positions + f.pair * positions * length for f in self.layers[: self.line])
        return lower + sum(f.keys_values for f in self.layers) * positions + self.upper(rows, length, picked)
