"""Adapters folded into the weights that they change.

LoRA's W becomes W + scale · (A·B)ᵀ; DoRA's is brought to its trained lengths, row by row. Both are sums over rows of W
[out, in], so that any stretch of rows can be had without the rest. All arithmetic is float32, on the weights that a
quantized base stands for; the result is rounded once, to the dtype that is asked for. Since an adapter sits on the
inner linear of a clipped one, so does what it is merged into.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.adapters.attach import attached
from gemma_mlx.lora import DoRALinear, LoRALinear, lora_layers
from gemma_mlx.models.families import float_dtype
from gemma_mlx.models.quantize import put_module

ALL = slice(None)


def float_rows(module: nn.Module, rows: slice = ALL) -> mx.array:
    """Rows along the first axis of a matrix, a table or a stack of matrices, quantized or not, in float32.

    Scales and biases are widened before they are used, as MLX's quantized product does.
    """
    weight = module.weight[rows]
    if "scales" not in module:
        return weight.astype(mx.float32)
    scales, biases = (module[name][rows].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(weight, scales, biases, module.group_size, module.bits)


def merged_rows(layer: LoRALinear, rows: slice = ALL) -> mx.array:
    """Rows of the weight [out, in] with the adapter in it, float32."""
    merged = float_rows(layer.linear, rows) + layer.scale * (layer.lora_a @ layer.lora_b[:, rows]).T
    if isinstance(layer, DoRALinear):
        merged = merged * (layer.m[rows] / mx.linalg.norm(merged, axis=1))[:, None]
    return merged


def merged_linear(layer: LoRALinear, dtype: mx.Dtype) -> nn.Linear:
    """A plain linear in the place of an adapter and its base; nothing is computed yet."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = merged_rows(layer).astype(dtype)
    if "bias" in layer.linear:
        linear.bias = layer.linear.bias
    linear.freeze()
    return linear


def merge(model: Any, dtype: mx.Dtype | None = None) -> list[str]:
    """Fold every adapter of a model into its base, in place and layer by layer; returns their paths.

    Modules that were trained in full stay as they are. Afterwards the model is frozen and has no adapter, and the
    base's own weights are gone.

    Args:
        model: with adapters on it; without any nothing happens.
        dtype: of the merged weights; None for that of each base weight, and of the model's floating-point weights
            where the base is quantized.
    """
    layers = lora_layers(model)
    paths = list(layers)
    for path in paths:
        layer = layers.pop(path)
        own = float_dtype(model) if "scales" in layer.linear else layer.linear.weight.dtype
        linear = merged_linear(layer, dtype or own)
        mx.eval(linear.parameters())  # one at a time: the next one's float32 comes after this one's is gone
        put_module(model, path, linear)
    model.freeze()
    state = attached(model)
    state.names, state.originals, state.exact = (), {}, {}
    state.changes += 1
    return paths
