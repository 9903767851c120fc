"""Tiny random checkpoints in both implementations, and the reference's own noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from parity_cases import random_lora

from gemma_mlx.batch import Batch
from gemma_mlx.lora import apply_lora, lora_layers, set_lora_parameters
from gemma_mlx.loss import loss_and_count
from gemma_mlx.models.load import load_model
from gemma_mlx.torch_backend import TorchBackend

PATTERNS: dict[str, dict] = {
    # Layers, sharing, widths and heads in the manner of each. Of the seeds tried (0 to 59) these have low floors (see
    # `noisy`): logits move by less than 5e-5 and gradients of adapters by less than 2e-4.
    "E2B": dict(seed=10, text={}),
    "E4B": dict(
        seed=34,
        text=dict(
            num_hidden_layers=12,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
            num_kv_shared_layers=5,
            num_key_value_heads=2,
            use_double_wide_mlp=False,
        ),
    ),
}
TARGETS = "all,per_layer_input_gate,per_layer_projection,per_layer_model_projection"
"""Every linear that has a name in LoRA's targets: 248 adapter tensors in the E2B-like checkpoint."""
RANK, ALPHA = 3, 6.0


@dataclasses.dataclass
class Pair:
    """One checkpoint folder in transformers and in ours."""

    name: str
    folder: str
    theirs: TorchBackend
    ours: Any


def make_pair(name: str, folder: str) -> Pair:
    return Pair(name, folder, TorchBackend(folder, device="cpu"), load_model(folder))


def make_adapted(name: str, folder: str, targets: str = TARGETS) -> Pair:
    """Both implementations with the same random adapters, A and B not zero."""
    pair = make_pair(name, folder)
    paths = apply_lora(pair.ours, targets, RANK, ALPHA)
    weights = random_lora({p: layer.weight.shape for p, layer in lora_layers(pair.ours).items()}, RANK)
    pair.theirs.add_lora(paths, RANK, ALPHA)
    pair.theirs.set_lora(weights)
    copy_lora(weights, pair.ours)
    return pair


def copy_lora(weights: dict[str, tuple], ours: Any) -> None:
    """path -> (A, B) into our adapters."""
    names = ("lora_a", "lora_b")
    flat = {f"{p}.{n}": mx.array(w) for p, ab in weights.items() for n, w in zip(names, ab, strict=True)}
    set_lora_parameters(ours, flat)


def our_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, tuple]]:
    """(mean loss over label positions, path -> its gradients (dA, dB)) of ours."""

    def mean_loss(model):
        total, count, _ = loss_and_count(model, batch.inputs(), batch.labels)
        return total / count

    loss, grads = nn.value_and_grad(model, mean_loss)(model)
    flat = {name: np.array(g) for name, g in tree_flatten(grads)}
    return float(loss), {p: (flat[f"{p}.lora_a"], flat[f"{p}.lora_b"]) for p in lora_layers(model)}


def noisy(backend: TorchBackend, batch: Batch, size: float = 1e-7) -> Iterator[Batch]:
    """The reference against itself: for each batch that this yields, the model computes the same with other rounding.

    First with fused attention (sdpa), then with noise of `size` on the text embeddings, pixels and mel, twice. What
    changes is float32 noise, the floor below which a difference of ours means nothing.
    """
    for implementation in ("sdpa", "eager"):  # the audio tower has only eager
        parts = ("text_config", "vision_config") if hasattr(backend.model.model, "vision_tower") else ("text_config",)
        backend.model.set_attn_implementation(dict.fromkeys(parts, implementation))
        if implementation == "sdpa":
            yield batch
    for seed in (0, 1):
        with perturbed(backend.model, batch, seed, size) as changed:
            yield changed


@contextmanager
def perturbed(model, batch: Batch, seed: int, size: float):
    """The batch with noise on its media, while the model has noise on its token embeddings."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)

    def add_noise(module, args, out):
        return out + size * torch.randn(out.shape, generator=generator)

    changes = {}
    for name in ("pixel_values", "pixel_values_videos", "input_features"):
        if (x := getattr(batch, name)) is not None:
            changes[name] = (x + size * rng.standard_normal(x.shape) * (x != 0)).astype(np.float32)
    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield dataclasses.replace(batch, **changes)
    finally:
        handle.remove()
