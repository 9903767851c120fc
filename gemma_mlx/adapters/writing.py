"""An adapter -> a folder in this library's layout: mlx-lm's files, with more in the config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError
from gemma_mlx.files import replace_whole, write_whole
from gemma_mlx.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DoRALinear


def own_config(
    ranks: Mapping[str, int], scales: Mapping[str, float], dropout: float, dora: bool, modules: list[str],
    own: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The content of ``adapter_config.json``: mlx-lm's fields, and ``own`` under ``gemma_mlx``.

    Where layers differ in rank or scale, the commonest is mlx-lm's, the others are in ``own``, and the format is 2:
    mlx-lm has one for all (``export --format mlx`` writes such an adapter for it).
    """
    config = {"fine_tune_type": "full", "num_layers": -1, "model": own["base_model"], "gemma_mlx": {"format": 1, **own}}
    if ranks:
        pairs = {path: (rank, scales[path]) for path, rank in ranks.items()}
        rank, scale = Counter(pairs.values()).most_common(1)[0][0]
        config["fine_tune_type"] = "dora" if dora else "lora"
        config["lora_parameters"] = {"rank": rank, "scale": scale, "dropout": dropout, "keys": list(ranks)}
        config["gemma_mlx"]["alpha"] = scale * rank
        if others := {path: {"rank": r, "scale": s} for path, (r, s) in pairs.items() if (r, s) != (rank, scale)}:
            config["gemma_mlx"] |= {"format": 2, "layers": others}
    if modules:
        config["modules_to_save"] = modules
    return config


def write_files(folder: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Write both files, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_whole(
        folder / ADAPTER_WEIGHTS,
        lambda path: mx.save_safetensors(str(path), dict(tensors), metadata={"format": "mlx"}),
    )
    write_whole(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def low_rank_tensors(layers: Mapping[str, LowRank], name: Callable[[str], str] = str) -> dict[str, mx.array]:
    """Tensor name -> tensor of these layers, whose paths `name` spells."""
    found: dict[str, mx.array] = {}
    for path, layer in layers.items():
        leaves = dict(zip(DoRALinear.TENSORS, (layer.a, layer.b, layer.m), strict=True))
        found |= {f"{name(path)}.{leaf}": tensor for leaf, tensor in leaves.items() if tensor is not None}
    return found


def save(adapter: Adapter, folder: Path) -> None:
    """Write an adapter (under the model's paths, weights in MLX's layouts) in the dtypes that it has.

    Raises:
        InputError: some layers have DoRA and some do not.
    """
    if len({layer.m is None for layer in adapter.layers.values()}) > 1:
        raise InputError(f"{folder}: some layers have DoRA and some do not; a file has one kind")
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    scales = {path: layer.scale for path, layer in adapter.layers.items()}
    own = {"base_model": adapter.base, "targets": None, "options": dict(adapter.options)}
    config = own_config(ranks, scales, adapter.dropout, adapter.dora, list(adapter.modules), own)
    tensors = low_rank_tensors(adapter.layers) | dict(adapter.full)
    write_files(folder, {name: mx.contiguous(tensor) for name, tensor in tensors.items()}, config)
