"""Adapters on one resident base: put on, taken off, exchanged. The base's weights stay the same objects.

Modules that an adapter trained in full are replaced while it is on; their originals are kept with the model and put
back as it is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.adapters.combine import checked_weights, combine
from gemma_mlx.adapters.fitting import fit
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.errors import InputError
from gemma_mlx.full import full_modules, put_full, tensor_names
from gemma_mlx.lora import DoRALinear, LoRALinear, freeze_base, lora_layers
from gemma_mlx.models.quantize import module_at, put_module

Names = str | Path | Sequence[str | Path]


@dataclass
class Attached:
    """What a model remembers of its adapter."""

    names: tuple[str, ...] = ()
    originals: dict[str, mx.array] = field(default_factory=dict)
    """Tensor name -> the base's weight, of modules that were trained in full."""
    exact: dict[str, mx.array] = field(default_factory=dict)
    """Tensor name -> the adapter's weight as its file has it, of these modules; for training that goes on."""
    changes: int = 0
    """How often adapters were put on or taken off: what was computed before (keys and values) is of another model."""


def attached(model: nn.Module) -> Attached:
    """What is on the model now."""
    if "_attached" not in model.__dict__:
        model._attached = Attached()
    return model._attached


def listed(names: Names) -> list[str | Path]:
    """One name or several as a list."""
    return [names] if isinstance(names, str | Path) else list(names)


def attach(model: nn.Module, folders: Names, weights: Sequence[float] | None = None) -> list[str]:
    """Put an adapter on a base, in place; of several their weighted sum (`gemma_mlx.adapters.combine`).

    Args:
        model: a base without an adapter.
        folders: an adapter's folder, a run's, or a Hub repository, in any layout that `read_adapter` knows; or several.
        weights: what each counts; 1 by default.

    Returns:
        Paths of the layers with an adapter.

    Raises:
        InputError: the model has an adapter; the adapters cannot be read, do not fit, or cannot be combined. Then
            nothing has changed.
    """
    names = listed(folders)
    if not names:
        raise InputError("adapter: no folder named")
    weights = checked_weights(weights, len(names))
    return put(model, [read_adapter(name) for name in names], weights)


def put(
    model: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, compare: bool = True
) -> list[str]:  # fmt: skip
    """`attach` with adapters that were read already; `compare` as for `fit`."""
    on = [*lora_layers(model), *(name.rpartition(".")[0] for name in attached(model).originals)]
    if taken := next(iter(on), None):
        raise InputError(f"{taken}: this layer already has an adapter; detach it, or load the base model again")
    weights = checked_weights(weights, len(adapters))
    fitted = [fit(adapter, model, compare) for adapter in adapters]
    originals = {name: _tensor(model, name) for adapter in fitted for name in adapter.full}
    whole = combine(fitted, weights, originals)
    made = {path: adapted(module_at(model, path), layer, whole.dropout) for path, layer in whole.layers.items()}
    try:  # the files are read here, and not needed after
        mx.eval([layer[name] for layer in made.values() for name in layer.TENSORS], list(whole.full.values()))
    except RuntimeError as error:
        where = ", ".join(str(adapter.where) for adapter in adapters)
        raise InputError(f"{where}: tensors cannot be read, copy it again ({error})") from None
    for path, layer in made.items():
        put_module(model, path, layer)
    freeze_base(model)
    put_full(model, whole.modules, whole.full)
    state = attached(model)
    state.names, state.originals = tuple(str(adapter.where.parent) for adapter in adapters), originals
    state.exact = dict(whole.full)
    state.changes += 1
    return list(whole.layers)


def adapted(linear: Any, layer: LowRank, dropout: float = 0.0) -> LoRALinear:
    """A linear with this change on it; the adapter's tensors become float32."""
    kind = LoRALinear if layer.m is None else DoRALinear
    made = kind(linear, layer.rank, layer.scale * layer.rank, dropout, mx.random.key(0))
    made.scale = layer.scale  # not rounded by a product and a quotient
    for name, tensor in zip(made.TENSORS, (layer.a, layer.b, layer.m), strict=False):
        made[name] = mx.contiguous(tensor.astype(mx.float32))
    return made


def detach(model: nn.Module) -> None:
    """Take the adapter off: linears and weights are the base's own again, bit for bit. Without one nothing happens.

    Raises:
        InputError: modules were trained in full here, so that their originals are gone.
    """
    state = attached(model)
    trained = full_modules(model)
    kept = {name.rpartition(".")[0] for name in state.originals}
    if lost := next((path for path in trained if path not in kept), None):
        raise InputError(
            f"{lost}: trained in full in this process, so the base's weights are gone; load the base again"
        )
    for path, layer in lora_layers(model).items():
        put_module(model, path, layer.linear)
    for name, tensor in state.originals.items():
        owner, _, leaf = name.rpartition(".")
        module_at(model, owner)[leaf] = tensor
    model.freeze()
    state.names, state.originals, state.exact = (), {}, {}
    state.changes += 1


def swap(model: nn.Module, folders: Names | None, weights: Sequence[float] | None = None) -> list[str]:
    """`detach`, then `attach` unless None; where the new adapter does not fit, the old one stays on."""
    if folders is None:
        detach(model)
        return []
    names = listed(folders)
    adapters = [read_adapter(name) for name in names]
    weights = checked_weights(weights, len(names))
    state = attached(model)
    before = _taken(model, state)
    detach(model)
    try:
        return put(model, adapters, weights)
    except BaseException:
        before[0].changes = state.changes
        _put_back(model, *before)
        raise


@contextmanager
def instead(model: nn.Module, folders: Names | None, weights: Sequence[float] | None = None) -> Iterator[None]:
    """As long as this is open the model has these adapters, or None, in place of its own, which comes back after."""
    state, *rest = _taken(model, attached(model))
    swap(model, folders, weights)
    try:
        yield
    finally:
        detach(model)
        state.changes = attached(model).changes
        _put_back(model, state, *rest)


def _tensor(model: nn.Module, name: str) -> mx.array:
    owner, _, leaf = name.rpartition(".")
    return module_at(model, owner)[leaf]


def _taken(model: nn.Module, state: Attached) -> tuple[Attached, dict[str, LoRALinear], dict[str, mx.array]]:
    """What is on the model, to be put back."""
    whole = {
        f"{path}.{leaf}": module_at(model, path)[leaf]
        for path in full_modules(model)
        for leaf in tensor_names(module_at(model, path))
    }
    return replace(state), lora_layers(model), whole


def _put_back(model: nn.Module, state: Attached, layers: dict[str, LoRALinear], whole: dict[str, mx.array]) -> None:
    for path, layer in layers.items():
        put_module(model, path, layer)
    freeze_base(model)
    put_full(model, tuple(dict.fromkeys(name.rpartition(".")[0] for name in whole)), whole)
    model._attached = state
