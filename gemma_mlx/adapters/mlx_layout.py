"""Adapters in MLX's orientation: this library's own, mlx-lm's and mlx-vlm's (``adapters.safetensors``).

All three have ``lora_a`` [in, rank], ``lora_b`` [rank, out] and DoRA's ``m`` [out]; mlx-vlm's older files have ``A``
and ``B``. mlx-lm's and mlx-vlm's config says one rank and scale for all layers. Which layers have an adapter is what
the tensors' names say: their config may name them by the end of their paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError
from gemma_mlx.lora import DoRALinear, LoRALinear
from gemma_mlx.models.names import module_path

FORMATS = (1, 2)
"""Of our part of the config; 2 where layers have ranks or scales of their own, which mlx-lm does not read."""
KINDS = ("lora", "dora", "full")
_LEAVES = DoRALinear.TENSORS
_LEGACY = {"A": "lora_a", "B": "lora_b"}


def read(path: Path, layout: str, config: dict[str, Any], tensors: dict[str, mx.array]) -> Adapter:
    """An adapter of `layout` from its config and tensors.

    Raises:
        InputError: naming the tensor or the entry that is missing, left over or unknown.
    """
    if layout == "gemma_mlx":
        return _own(path, config, tensors)
    return _foreign(path, layout, config, tensors)


def _own(path: Path, config: dict[str, Any], tensors: dict[str, mx.array]) -> Adapter:
    own, kind = config["gemma_mlx"] or {}, config.get("fine_tune_type")
    modules = [str(m) for m in config.get("modules_to_save") or []]
    parameters = {"rank": 1, "scale": 1.0, "keys": []} if kind == "full" else config["lora_parameters"]
    rank, scale, keys = int(parameters["rank"]), float(parameters["scale"]), list(parameters["keys"])
    version = own.get("format", FORMATS[0])
    trained = modules if kind == "full" else keys
    if kind not in KINDS or version not in FORMATS or rank < 1 or not trained:
        raise InputError(
            f"{path.parent / 'adapter_config.json'}: expected a lora, dora or full adapter of format "
            f"{' or '.join(map(str, FORMATS))}, found {kind!r} of format {version}, rank {rank}, {len(trained)} layers"
        )
    each = own.get("layers") or {}
    layers = {}
    for key in keys:
        mine = each.get(key, {})
        leaves = {leaf: tensors.pop(f"{key}.{leaf}", None) for leaf in _leaves(kind)}
        if missing := next((leaf for leaf, tensor in leaves.items() if tensor is None), None):
            raise InputError(f"{path}: tensor {key}.{missing} is missing")
        expected = int(mine.get("rank", rank))
        layers[key] = _low_rank(path, key, leaves, float(mine.get("scale", scale)), expected)
    full = {name: tensors.pop(name) for name in list(tensors) if name.rpartition(".")[0] in modules}
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} belongs to no layer that adapter_config.json names")
    return Adapter(
        path, "gemma_mlx", layers, tuple(modules), full, dropout=float(parameters.get("dropout", 0.0)),
        base=own.get("base_model") or config.get("model"), revision=own.get("revision"),
        options={name: v for name, v in (own.get("options") or {}).items() if v is not None}, config=config,
    )  # fmt: skip


def _leaves(kind: str) -> tuple[str, ...]:
    return (DoRALinear if kind == "dora" else LoRALinear).TENSORS


def _low_rank(path: Path, key: str, leaves: dict[str, mx.array], scale: float, rank: int | None) -> LowRank:
    a, b = leaves["lora_a"], leaves["lora_b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"{path}: tensor {key}.lora_a has shape {a.shape} and .lora_b {b.shape}; [in, rank] and [rank, out] of a "
            "linear are needed (experts' stacks cannot have adapters here)"
        )
    if rank is not None and a.shape[1] != rank:
        raise InputError(f"{path}: tensor {key}.lora_a has shape {a.shape}, but adapter_config.json says rank {rank}")
    return LowRank(a, b, scale, leaves.get("m"))


def _foreign(path: Path, layout: str, config: dict[str, Any], tensors: dict[str, mx.array]) -> Adapter:
    where, kind = path.parent / "adapter_config.json", config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise InputError(f"{where}: fine_tune_type {kind!r}: expected lora, dora or full")
    tensors = {module_path(name): tensor for name, tensor in tensors.items()}
    base = config.get("model") if isinstance(config.get("model"), str) else None
    if kind == "full":
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
        return Adapter(path, layout, {}, modules, tensors, base=base, config=config)
    parameters = config.get("lora_parameters", config)
    layers: dict[str, LowRank] = {}
    for key, leaves in _grouped(path, tensors).items():
        for leaf in _leaves(kind):
            if leaf not in leaves:
                raise InputError(f"{path}: tensor {key}.{leaf} is missing")
        layers[key] = _low_rank(path, key, leaves, _scale(where, parameters, leaves["lora_a"]), None)
    if not layers:
        raise InputError(f"{path}: holds no adapter's tensors (lora_a, lora_b)")
    return Adapter(
        path, layout, layers, dropout=float(parameters.get("dropout") or 0.0), base=base, config=config
    )  # fmt: skip


def _grouped(path: Path, tensors: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Layer -> leaf -> tensor."""
    groups: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        key, _, leaf = name.rpartition(".")
        leaf = _LEGACY.get(leaf, leaf)
        if leaf not in _LEAVES:
            raise InputError(f"{path}: tensor {name} is none of an adapter's ({', '.join(_LEAVES)})")
        groups.setdefault(key, {})[leaf] = tensor
    return groups


def _scale(where: Path, parameters: dict[str, Any], a: mx.array) -> float:
    """mlx-lm's ``scale``; mlx-vlm's older files have ``alpha``, which is divided by the rank."""
    if "scale" in parameters:
        return float(parameters["scale"])
    if "alpha" in parameters:
        return float(parameters["alpha"]) / a.shape[-1]
    raise InputError(f"{where}: lora_parameters has no scale")
