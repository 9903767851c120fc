"""Training that goes on from an adapter: what it decides of a run's options, and its weights on the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.adapters.adapter import Adapter
from gemma_mlx.adapters.attach import attached, put
from gemma_mlx.adapters.fitting import fit
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.config import NO_MASTERS, NO_TARGETS, TrainConfig
from gemma_mlx.errors import InputError
from gemma_mlx.full import trained_parameters
from gemma_mlx.lora import GROUPS, resolve_targets
from gemma_mlx.skeleton import skeleton
from gemma_mlx.spec import read_spec


def adopted(config: TrainConfig, base: Path) -> TrainConfig:
    """The options of a run that begins with an adapter: the adapter's rank, alpha, targets, kind and modules.

    So are dropout and what the adapter must be used with (prompts, audio window, …), unless they were given.

    Args:
        config: of the run; as it is without ``init_adapter``.
        base: the base checkpoint's folder.

    Raises:
        InputError: the adapter cannot be read or does not fit the base; an option was given that differs from it.
    """
    if config.init_adapter is None:
        return config
    bare = skeleton(read_spec(base))
    adapter = fit(read_adapter(config.init_adapter), bare, compare=False)
    decided = _decided(adapter, bare)
    for name, value in decided.items():
        if name in config.given and getattr(config, name) not in (value, _plain(name, config, value)):
            raise InputError(
                f"{name}: {getattr(config, name)!r} was given, but {config.init_adapter} has {_short(value)}; leave it "
                "out, or start without --init-adapter"
            )
    used = {"dropout": adapter.dropout, **adapter.options}
    known = {f.name for f in dataclasses.fields(config)}
    decided |= {name: value for name, value in used.items() if name in known and name not in config.given}
    return dataclasses.replace(config, **decided)


def scales_of(config: TrainConfig, base: Path) -> dict[str, float]:
    """Path -> scale of the layers that a run took over from another adapter; none where it made its own.

    Raises:
        InputError: that adapter is no longer there.
    """
    if config.init_adapter is None:
        return {}
    adapter = fit(read_adapter(config.init_adapter), skeleton(read_spec(base)), compare=False)
    return {path: layer.scale for path, layer in adapter.layers.items()}


def _decided(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    first = max(adapter.layers.values(), key=lambda layer: layer.rank, default=None)
    decided: dict[str, Any] = {"targets": _targets(adapter, model), "full": ",".join(adapter.modules) or None}
    if first is not None:
        decided |= {"rank": first.rank, "alpha": first.scale * first.rank, "dora": adapter.dora}
    return decided


def _targets(adapter: Adapter, model: nn.Module) -> str:
    """A short name of just these layers: the adapter's own, whole groups, else all paths."""
    layers = set(adapter.layers)
    own = (adapter.config.get("gemma_mlx") or {}).get("targets")
    groups = ",".join(name for name in GROUPS if (found := _layers(model, name)) and found <= layers)
    for name in filter(None, (own, groups)):
        if _layers(model, name) == layers:
            return str(name)
    return ",".join(adapter.layers) or NO_TARGETS


def _layers(model: nn.Module, targets: str) -> set[str]:
    """The layers that targets choose; none where the model has no such."""
    try:
        return set(resolve_targets(model, targets))
    except InputError:
        return set()


def _plain(name: str, config: TrainConfig, value: Any) -> Any:
    """A value that means the same in other words: no alpha is the rank."""
    return None if name == "alpha" and value == float(config.rank) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def begin(model: nn.Module, config: TrainConfig, bare: bool = False) -> str:
    """Put the adapter that a run begins with on its model; what was done, in words.

    Args:
        bare: the model has no weights that could be compared with what the adapter's file holds beside its own.
    """
    adapter = dataclasses.replace(read_adapter(config.init_adapter), dropout=config.dropout)
    paths = put(model, [adapter], compare=not bare)
    if bare:
        attached(model).exact = {}
    more = f" and {len(adapter.modules)} modules in full" if adapter.modules else ""
    return f"goes on from {config.init_adapter}: adapters on {len(paths)} layers{more}"


def first_weights(model: nn.Module, config: TrainConfig) -> dict[str, mx.array]:
    """Tensor name -> weight of all that trains, before the first step.

    An adapter's file is more exact than a bfloat16 base holds it: where a float32 copy is kept, it is the file's.
    """
    masters = config.master_weights != NO_MASTERS
    weights = trained_parameters(model, masters=masters)
    exact, attached(model).exact = attached(model).exact, {}
    return weights | {name: w.astype(mx.float32) for name, w in exact.items() if masters and name in weights}
