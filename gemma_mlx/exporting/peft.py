"""An adapter in PEFT's files, which put it on transformers' model of the base.

Every target is named by its full path: the same names (``q_proj``) occur in the decoder and in the towers, and PEFT
takes a short name for all of them. In a tower the target is the linear inside the clips, as here. Modules that were
trained in full become ``modules_to_save``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters.adapter import Adapter, LowRank, in_tower
from gemma_mlx.adapters.combine import of_rank
from gemma_mlx.adapters.fitting import fit_to_base
from gemma_mlx.adapters.peft_layout import PREFIX, rank_and_alpha, scale_of
from gemma_mlx.adapters.reading import CONFIG, PEFT_WEIGHTS, read_adapter
from gemma_mlx.adapters.writing import save
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.files import replace_whole, write_whole
from gemma_mlx.models.load import DTYPES
from gemma_mlx.models.names import to_torch_axes

BASE = "base"
"""Folder of the base that towers were merged into."""
_TIED = "embed_tokens"


def write(source: Source, folder: Path, options: ExportOptions) -> list[str]:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into an empty folder.

    With `options.merge_towers` what lies outside of the decoder is merged into a base, written to ``base/``.

    Returns:
        Lines for the user.

    Raises:
        InputError: there is no adapter, it does not fit the base, or PEFT has no form for it.
    """
    if source.adapter is None:
        raise InputError("format peft: there is no adapter to write; name a run or an adapter")
    adapter = read_adapter(source.adapter)
    fitted = fit_to_base(adapter, source.base)
    if adapter.layout != "peft":  # which has the names that its own model has
        adapter = fitted
    adapter, lines = of_rank(adapter, options.adapter_rank)
    base, revision, where = source.shown_name, source.revision, source.base_name
    if options.merge_towers:
        adapter, merged = _without_towers(source, adapter, folder, options)
        if merged:
            lines.append(
                f"{merged} layers of towers and embedders are merged into the folder {BASE}/: use it as the base"
            )
            base, revision, where = BASE, None, f"{BASE}/"
    written, config = tensors(adapter), config_of(adapter, base, revision)
    if options.dtype:
        written = {name: tensor.astype(DTYPES[options.dtype]) for name, tensor in written.items()}
    replace_whole(
        folder / PEFT_WEIGHTS, lambda path: mx.save_safetensors(str(path), written, metadata={"format": "pt"})
    )
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return [*lines, *_notes(adapter, source, where)]


def _without_towers(source: Source, adapter: Adapter, folder: Path, options: ExportOptions) -> tuple[Adapter, int]:
    """(the decoder's part, how many layers were merged into the base)."""
    from gemma_mlx.exporting import hf

    towers, decoder = adapter.only(in_tower), adapter.only(lambda path: not in_tower(path))
    count = len(towers.layers) + len(towers.modules)
    if not count:
        return adapter, 0
    if not decoder.layers and not decoder.modules:
        raise InputError("merge_towers: all of this adapter is in towers, so nothing is left; use --format hf")
    (folder / BASE).mkdir()
    with TemporaryDirectory() as temporary:
        save(towers, Path(temporary))
        hf.write(replace(source, adapter=Path(temporary)), folder / BASE, options)
    return decoder, count


def tensors(adapter: Adapter) -> dict[str, mx.array]:
    """PEFT's tensor name -> tensor, in the dtypes that the adapter has."""
    found: dict[str, mx.array] = {}
    for path, layer in adapter.layers.items():
        found[f"{PREFIX}{path}.lora_A.weight"] = layer.a.T
        found[f"{PREFIX}{path}.lora_B.weight"] = layer.b.T
        if layer.m is not None:
            found[f"{PREFIX}{path}.lora_magnitude_vector"] = layer.m
    for name, tensor in adapter.full.items():
        axes = None if adapter.torch_axes else to_torch_axes(name, tensor.ndim)
        found[PREFIX + name] = tensor if axes is None else tensor.transpose(axes)
        if _tied(name.rpartition(".")[0]):
            found[f"{PREFIX}lm_head.weight"] = tensor
    return {name: mx.contiguous(tensor) for name, tensor in found.items()}


def _tied(module: str) -> bool:
    """Whether a module is the embedding that is the head as well; PEFT's copy of it would leave the head behind."""
    return module.endswith(f".{_TIED}")


def config_of(adapter: Adapter, base: str, revision: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    dora = {layer.m is not None for layer in adapter.layers.values()}
    if len(dora) > 1:
        raise InputError("format peft: some layers have DoRA and some do not; PEFT has one kind for all")
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    alphas = {path: _alpha(layer, adapter.rslora) for path, layer in adapter.layers.items()}
    rank, alpha = _common(ranks, 8), _common(alphas, 8)
    heads = ["lm_head"] if any(map(_tied, adapter.modules)) else []
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "inference_mode": True, "r": rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "use_dora": dora == {True}, "use_rslora": adapter.rslora,
        "target_modules": list(adapter.layers), "modules_to_save": [*adapter.modules, *heads] or None,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
    }  # fmt: skip
    for path, layer in adapter.layers.items():
        r, a = rank_and_alpha(config, path)
        if r != layer.rank or abs(scale_of(a, r, adapter.rslora) - layer.scale) > 1e-15 * abs(layer.scale):
            raise InputError(f"format peft: {path}: rank {layer.rank} and scale {layer.scale} cannot be written")
    return config


def _alpha(layer: LowRank, rslora: bool) -> float:
    """What PEFT divides by the rank to get the scale."""
    alpha = layer.alpha
    if alpha is None or scale_of(alpha, layer.rank, rslora) != layer.scale:
        alpha = layer.scale * (layer.rank**0.5 if rslora else layer.rank)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _common(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _notes(adapter: Adapter, source: Source, base: str) -> list[str]:
    """What the user has to know to get the same answers from transformers."""
    full = f" and {len(adapter.modules)} modules in full" if adapter.modules else ""
    lines = [
        f"{len(adapter.layers)} layers with an adapter{full}; PeftModel.from_pretrained puts them on transformers' "
        f"model of {base}"
    ]
    if source.remembered.get("audio_window") == 13 and any("audio" in path for path in adapter.layers):
        lines.append("trained with an audio window of 13; transformers has 12, so answers to clips differ")
    if bits := source.remembered.get("quantize"):
        lines.append(f"trained on a base of {bits} bits in MLX's form; on transformers' base answers differ slightly")
    return lines
