"""PEFT's adapters: ``adapter_config.json`` and ``adapter_model.safetensors``.

``lora_A.weight`` is [rank, in] and ``lora_B.weight`` [out, rank], the transposes of ours; DoRA's
``lora_magnitude_vector`` is [out]. Names begin with ``base_model.model.``, then comes transformers' module path. A
layer's rank and alpha may differ from the common ones (``rank_pattern``, ``alpha_pattern``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError

PREFIX = "base_model.model."
_LEAF = re.compile(
    r"^(?P<path>.+)\.(?P<leaf>lora_A|lora_B|lora_magnitude_vector)(\.default)?(?:\.(?P<end>weight|bias))?$"
)
_EMBEDDING = re.compile(r"\.lora_embedding_[AB]\b")
_UNSUPPORTED = (
    "lora_bias", "fan_in_fan_out", "use_qalora", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    "target_parameters",
)  # fmt: skip
"""Entries of the config that change what is computed in ways that this library does not know."""
_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "hira")
"""Initialisations that change the base's weights too."""


def read(path: Path, layout: str, config: dict[str, Any], tensors: dict[str, mx.array]) -> Adapter:
    """An adapter of PEFT from its config and tensors.

    Raises:
        InputError: a kind, an option or a tensor that this library cannot apply.
    """
    where = path.parent / "adapter_config.json"
    refuse_unsupported(config, where)
    groups, full = _grouped(path, tensors)
    rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    layers = {}
    for key, leaves in groups.items():
        for leaf in ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if dora else 2]:
            if leaf not in leaves:
                raise InputError(f"{path}: tensor {PREFIX}{key}.{leaf} is missing")
        rank, alpha = rank_and_alpha(config, key)
        a, b, m = leaves["lora_A"].T, leaves["lora_B"].T, leaves.get("lora_magnitude_vector")
        if a.ndim != 2 or a.shape[1] != rank or b.ndim != 2 or b.shape[0] != rank:
            raise InputError(
                f"{path}: tensor {PREFIX}{key}.lora_A.weight has shape {leaves['lora_A'].shape} and lora_B's is "
                f"{leaves['lora_B'].shape}, but adapter_config.json says rank {rank}"
            )
        m = None if m is None else m.reshape(-1)
        layers[key] = LowRank(a, b, scale_of(alpha, rank, rslora), m, alpha)
    if not layers and not full:
        raise InputError(f"{path}: holds no adapter's tensors (lora_A, lora_B)")
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in full))
    return Adapter(
        path, layout, layers, modules, full, torch_axes=True, dropout=float(config.get("lora_dropout") or 0.0),
        rslora=rslora, base=config.get("base_model_name_or_path"), revision=config.get("revision"), config=config,
    )  # fmt: skip


def refuse_unsupported(config: Mapping[str, Any], where: Path) -> None:
    """Raise InputError for what would be applied wrongly."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type {kind!r}: only LORA (and its DoRA and rsLoRA) can be read")
    if (bias := config.get("bias", "none")) != "none":
        raise InputError(
            f"{where}: bias {bias!r}: biases that train beside the adapter cannot be read; train with none"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise InputError(
                f"{where}: {name} is set ({str(config[name])[:60]}); such an adapter cannot be applied here"
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise InputError(
            f"{where}: init_lora_weights {start!r} changed the base's weights too; save it as a plain LoRA with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def rank_and_alpha(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """A layer's rank and alpha: of the first pattern (a regular expression) that its path ends with, else common."""
    rank = _by_pattern(config.get("rank_pattern"), path, config.get("r", 8))
    return int(rank), float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, common: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return common


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What A · B counts."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _grouped(path: Path, tensors: dict[str, mx.array]) -> tuple[dict[str, dict[str, mx.array]], dict[str, mx.array]]:
    """(layer -> leaf -> tensor, name -> tensor of modules trained in full)."""
    groups: dict[str, dict[str, mx.array]] = {}
    full: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        if _EMBEDDING.search(short):
            raise InputError(f"{path}: tensor {name}: adapters on embeddings cannot be read; only those on linears can")
        found = _LEAF.match(short)
        if found is None:
            full[short.replace(".modules_to_save.default.", ".")] = tensor
        elif found["end"] == "bias":
            raise InputError(f"{path}: tensor {name}: biases of adapters cannot be read")
        else:
            groups.setdefault(found["path"], {})[found["leaf"]] = tensor
    return groups, full
