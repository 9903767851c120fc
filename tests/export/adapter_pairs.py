"""Tiny random checkpoints of every family, batches of every modality, and random adapters on them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from parity_cases import audio, image, make_batch, video

from gemma_mlx.lora import DoRALinear, apply_lora, lora_layers, save_adapter
from gemma_mlx.models.load import load_model
from gemma_mlx.torch_backend import TorchBackend

SHALLOW_3N = dict(  # four layers: through ten, the reference's own noise on pixels reaches 1e-4
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
)  # fmt: skip
E4B = dict(
    num_hidden_layers=12, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2, num_kv_shared_layers=5,
    num_key_value_heads=2, use_double_wide_mlp=False,
)  # fmt: skip

MAKERS = {  # seeds with low floors, as in tests/parity
    "E2B": partial(tiny.make, seed=10),
    "E4B": partial(tiny.make, seed=34, text=E4B),
    "31B": partial(tiny.make, seed=0, **tiny.larger()),
    "26B": partial(tiny.make, seed=0, **tiny.larger(tiny.EXPERTS)),
    "12B": partial(tiny.make_unified, seed=0),
    "3n": partial(tiny_gemma3n.make, seed=4, text=SHALLOW_3N),
    "Gemma 3": partial(tiny_gemma3.make, seed=0),
}
PER_LAYER = ",per_layer_input_gate,per_layer_projection,per_layer_model_projection"
TARGETS = {
    "E2B": "all" + PER_LAYER,
    "E4B": "all" + PER_LAYER,
    "31B": "all",
    "26B": "all,router.proj",
    "12B": "all",
    "3n": "decoder,audio,embedders,per_layer_input_gate,per_layer_projection,linear_left,linear_right",
    "Gemma 3": "all",
}
RUNS = {"12B": {"vision_runs": "all"}}
"""12B as transformers' plain forward computes it."""
TEXT_ROWS = [[24], [9], [41]]
MEDIA = {
    "E2B": [[3, image(9, 3), audio(61), 9], [image(6, 6), 2, video(2, 3, 3), 8]],
    "E4B": [[4, image(6, 6), 3, audio(61), 10]],
    "31B": [[3, image(6, 6), 2, image(12, 9), 9], [30], [video(3, 6, 9), 5]],
    "26B": [[3, image(6, 6), 2, image(12, 9), 9], [30], [image(9, 6), image(3, 3), 5]],
    "12B": [[30], [3, image(12, 9), audio(9), 9], [audio(3), video(2, 6, 6), 2, image(6, 3), 8]],
}


def batches(name: str) -> dict[str, dict[str, np.ndarray]]:
    """What to call -> inputs of both implementations: text, and all media that the family has in one batch."""
    if name == "Gemma 3":
        return {"text": tiny_gemma3.rows(41, 7, 30)}
    if name == "3n":
        kinds = {"text": dict(kind="text", n_text=30, batch=3), "media": dict(kind="image+audio", lens=(80,))}
        return {what: tiny_gemma3n.inputs(**options) for what, options in kinds.items()}
    rows = {"text": TEXT_ROWS, "media": MEDIA[name]}
    return {what: make_batch(r, unified=name == "12B").inputs() for what, r in rows.items()}


def ours(name: str, folder, **options):
    """This library's model of a family's folder."""
    return load_model(folder, **RUNS.get(name, {}), **options)


def theirs(folder):
    """transformers' model of a folder, float32, eager."""
    return TorchBackend(folder, device="cpu").model


def randomise(model, seed: int = 0, size: float = 0.3) -> None:
    """Random A, B and, for DoRA, lengths near those of the base's rows."""
    rng = np.random.default_rng(seed)

    def draw(shape, scale):
        return mx.array((scale * rng.standard_normal(shape)).astype(np.float32))

    for layer in lora_layers(model).values():
        layer.lora_a = draw(layer.lora_a.shape, layer.lora_a.shape[0] ** -0.5)
        layer.lora_b = draw(layer.lora_b.shape, size * layer.lora_b.shape[0] ** -0.5)
        if isinstance(layer, DoRALinear):
            layer.m = layer.m * (1 + draw(layer.m.shape, 0.2))


def adapted(name: str, folder, out, targets: str | None = None, rank: int = 3, alpha: float = 6.0, dora: bool = False):
    """(our model with a random adapter, the folder that it was saved to)."""
    model = ours(name, folder)
    apply_lora(model, targets or TARGETS[name], rank, alpha, dora=dora)
    randomise(model)
    save_adapter(model, out)
    return model, out


def difference(a, b, inputs) -> float:
    """The largest difference of two logits [B, T, V] on tokens."""
    valid = inputs["attention_mask"].astype(bool)
    return float(np.abs(np.array(a)[valid] - np.array(b)[valid]).max())


def made_once(tmp_path_factory, make):
    """family -> its base's folder, which `make(family, folder)` fills at the first call."""
    torch.set_num_threads(1)
    made = {}

    def folder(name):
        if name not in made:
            if name == "3n":
                pytest.importorskip("timm")
            made[name] = tmp_path_factory.mktemp("base")
            make(name, made[name])
        return made[name]

    return folder
