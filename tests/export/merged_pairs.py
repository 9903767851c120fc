"""What the tests of merged exports share: transformers' loading with its report, and published files' extra tensors."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapter_pairs import MAKERS

from gemma_mlx.spec import read_spec

SHARING = ("E2B", "E4B", "3n")
"""Families with layers that share another's keys and values."""


class Bases:
    """Family -> checkpoint folder as it would be published, made when first asked for."""

    def __init__(self, made):
        self._made, self._folders = made, {}

    def __call__(self, name):
        if name == "3n":
            pytest.importorskip("timm")
        if name not in self._folders:
            torch.set_num_threads(1)
            folder = self._folders[name] = self._made("base")
            MAKERS[name](folder)
            if name in SHARING:
                as_published(folder)
        return self._folders[name]


def load_checked(folder, dtype=torch.float32):
    """transformers' model of a folder, eager, after checking that it missed nothing and left nothing over."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    media = hasattr(AutoConfig.from_pretrained(folder, local_files_only=True), "text_config")
    family = AutoModelForImageTextToText if media else AutoModelForCausalLM
    model, info = family.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    odd = {kind: sorted(names) for kind, names in info.items() if names}
    assert not odd, odd
    return model.eval()


def as_published(folder, seed=0):
    """Add what published files hold beside what transformers saves: keys and values of layers that share another's.

    Returns name -> tensor.
    """
    spec, rng = read_spec(folder).text, np.random.default_rng(seed)
    file = str(Path(folder) / "model.safetensors")
    held, extra = dict(mx.load(file)), {}
    for i in range(spec.first_kv_shared_layer, spec.num_hidden_layers):
        for leaf in ("k_proj", "v_proj", "k_norm"):
            like = held["model.language_model.layers.0.self_attn." + leaf + ".weight"]
            name = f"model.language_model.layers.{i}.self_attn.{leaf}.weight"
            extra[name] = mx.array(rng.standard_normal(like.shape).astype(np.float32)).astype(like.dtype)
    mx.eval(held)
    mx.save_safetensors(file, held | extra, metadata={"format": "pt"})
    return extra


def tensors(folder):
    """Name -> array of all safetensors files of a folder, through the index where there is one."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict(mx.load(str(folder / "model.safetensors")))
    places = json.loads(index.read_text())["weight_map"]
    files = {name: mx.load(str(folder / name)) for name in set(places.values())}
    found = {name: files[file][name] for name, file in places.items()}
    assert sum(len(f) for f in files.values()) == len(found)
    return found


def fast(quick, *every):
    """Parameters of which all but some run with the slow tests."""
    return [value if value in quick else pytest.param(*(value if isinstance(value, tuple) else (value,)),
            marks=pytest.mark.slow) for value in every]  # fmt: skip
