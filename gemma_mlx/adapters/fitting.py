"""An adapter as it was read -> the same under the model's own paths, every shape checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError
from gemma_mlx.full import candidates, saved_shapes
from gemma_mlx.lora import linear_paths, linear_shape, module_at
from gemma_mlx.models.names import module_path, to_mlx_axes

_DECODER = "model.language_model."


def _spellings(path: str) -> Iterator[str]:
    """Names that a module may have in the model: as stored, in MLX's spelling, of a decoder beside towers and alone."""
    for name in dict.fromkeys((path, module_path(path), module_path(path, unified=True))):
        yield name
        yield f"{name}.linear"
        if name.startswith(_DECODER):
            yield "model." + name.removeprefix(_DECODER)
        elif name.startswith("model."):
            yield _DECODER + name.removeprefix("model.")


def own_path(path: str, known: Collection[str]) -> str | None:
    """The one of `known` that a stored path means; None where there is none."""
    return next((name for name in _spellings(path) if name in known), None)


def fit(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter under the model's paths; the model is only looked at, and must have no adapter.

    Raises:
        InputError: a layer or module that the model does not have, or has with other shapes; tensors that are missing
            or left over.
    """
    where = adapter.where.parent / "adapter_config.json"
    linears, layers = set(linear_paths(model)), {}
    for stored, layer in adapter.layers.items():
        path = own_path(stored, linears)
        if path is None:
            hint = _other_base(adapter)
            raise InputError(f"{where}: the model has no linear layer {stored}{hint}")
        if path in layers:
            raise InputError(f"{where}: {stored} and another entry both mean the layer {path}")
        _check(adapter, stored, layer, linear_shape(module_at(model, path)))
        layers[path] = layer
    full, modules = _fit_full(adapter, model, str(where))
    return replace(adapter, layers=layers, full=full, modules=modules, torch_axes=False)


def _other_base(adapter: Adapter) -> str:
    return f"; it was trained on {adapter.base}" if adapter.base else ""


def _check(adapter: Adapter, stored: str, layer: LowRank, shape: tuple[int, int]) -> None:
    """Raise InputError where a tensor has another shape than a linear of (out, in) needs."""
    out, inner = shape
    peft = adapter.layout == "peft"
    found = {
        ".lora_A.weight" if peft else ".lora_a": (layer.a.shape, (inner, layer.rank)),
        ".lora_B.weight" if peft else ".lora_b": (layer.b.shape, (layer.rank, out)),
    }
    if layer.m is not None:
        found[".lora_magnitude_vector" if peft else ".m"] = (layer.m.shape, (out,))
    for leaf, (has, needs) in found.items():
        if has != needs:
            if peft:
                has, needs = has[::-1], needs[::-1]
            raise InputError(
                f"{adapter.where}: tensor {stored}{leaf} has shape {has}, the model needs {needs}{_other_base(adapter)}"
            )


def _fit_full(adapter: Adapter, model: nn.Module, where: str) -> tuple[dict[str, mx.array], tuple[str, ...]]:
    """(tensor name -> weight in MLX's layout, modules) of what was trained in full."""
    known, names = set(candidates(model)), {}
    for stored in adapter.modules:
        names[stored] = own_path(stored, known) or stored
    if adapter.layout != "gemma_mlx":  # whose modules may hold what never trains, such as clip bounds
        names = {
            stored: path for stored, path in names.items() if path in known or not _unchanged(adapter, model, stored)
        }
    needed = saved_shapes(model, names.values(), where)
    found: dict[str, mx.array] = {}
    for name, tensor in adapter.full.items():
        owner, _, leaf = name.rpartition(".")
        path = f"{names.get(owner, owner)}.{leaf}"
        if path not in needed:
            if owner in names or adapter.layout == "gemma_mlx":
                _refuse_extra(adapter, model, name, path)
            continue
        axes = to_mlx_axes(path, tensor.shape, needed[path]) if adapter.torch_axes else None
        found[path] = tensor if axes is None else tensor.transpose(axes)
    for name, shape in needed.items():
        if name not in found:
            raise InputError(f"{adapter.where}: tensor {name} is missing")
        if found[name].shape != shape:
            raise InputError(f"{adapter.where}: tensor {name} has shape {found[name].shape}, the model needs {shape}")
    return found, tuple(names.values())


def _own_tensor(model: nn.Module, path: str) -> mx.array | None:
    """The model's tensor of this name, in any of its spellings."""
    tensors: dict[str, Any] = dict(tree_flatten(model.parameters()))
    name = own_path(path, tensors.keys())
    return None if name is None else tensors[name]


def _unchanged(adapter: Adapter, model: nn.Module, stored: str) -> bool:
    """Whether a module that cannot train holds what the base holds; raises InputError where it does not."""
    for name, tensor in adapter.full.items():
        if name.rpartition(".")[0] == stored:
            _refuse_extra(adapter, model, name, name)
            del tensor
    return True


def _refuse_extra(adapter: Adapter, model: nn.Module, name: str, path: str) -> None:
    """Raise InputError for a tensor that cannot train, unless it is the base's."""
    own, tensor = _own_tensor(model, path), adapter.full[name]
    if own is None:
        raise InputError(f"{adapter.where}: tensor {name} belongs to no layer of the model{_other_base(adapter)}")
    if own.shape != tensor.shape or not mx.array_equal(own.astype(mx.float32), tensor.astype(mx.float32)):
        raise InputError(f"{adapter.where}: tensor {name} differs from the base's, and this library never trains it")
