"""An adapter as it was read -> the same under the model's own paths, every shape checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError
from gemma_mlx.full import candidates, saved_shapes
from gemma_mlx.lora import _natural, linear_paths, linear_shape
from gemma_mlx.models.names import module_path, to_mlx_axes
from gemma_mlx.models.quantize import module_at
from gemma_mlx.skeleton import skeleton
from gemma_mlx.spec import read_spec

_DECODER, _HEAD = "model.language_model.", "lm_head"


def _spellings(path: str) -> Iterator[str]:
    """Names that a module may have in the model: as stored, in MLX's spelling, of a decoder beside towers and alone."""
    stored = f"{path}."  # as the beginning of a tensor's name
    for name in dict.fromkeys((path, module_path(stored)[:-1], module_path(stored, unified=True)[:-1])):
        yield name
        yield f"{name}.linear"
        if name.startswith(_DECODER):
            yield "model." + name.removeprefix(_DECODER)
        elif name.startswith("model."):
            yield _DECODER + name.removeprefix("model.")


def own_path(path: str, known: Collection[str]) -> str | None:
    """The one of `known` that a stored path means; None where there is none."""
    return next((name for name in _spellings(path) if name in known), None)


def fit(adapter: Adapter, model: nn.Module, compare: bool = True) -> Adapter:
    """The adapter under the model's paths; the model is only looked at, and must have no adapter.

    Args:
        compare: the model's weights may be read, to see that what an adapter holds beside its trained weights is the
            base's.

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
    layers = {path: layers[path] for path in sorted(layers, key=_natural)}
    full, modules = _fit_full(adapter, model, str(where), compare)
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


def _fit_full(
    adapter: Adapter, model: nn.Module, where: str, compare: bool
) -> tuple[dict[str, mx.array], tuple[str, ...]]:  # fmt: skip
    """(tensor name -> weight in MLX's layout, modules) of what was trained in full."""
    known = set(candidates(model))
    modules = {stored: own_path(stored, known) or stored for stored in adapter.modules}
    if adapter.layout != "gemma_mlx":  # the modules that those save hold what never trains too, such as clip bounds
        modules = {stored: path for stored, path in modules.items() if path in known}
    needed, found = saved_shapes(model, modules.values(), where), {}
    for name, tensor in adapter.full.items():
        owner, _, leaf = name.rpartition(".")
        path = f"{modules.get(owner, owner)}.{leaf}"
        if owner == _HEAD and name not in needed:
            _refuse_own_head(adapter, name)
            continue
        if path not in needed:
            _refuse_unless_same(adapter, model, name, compare)
            continue
        axes = to_mlx_axes(path, tensor.shape, needed[path]) if adapter.torch_axes else None
        found[path] = tensor if axes is None else tensor.transpose(axes)
    for name, shape in needed.items():
        if name not in found:
            raise InputError(f"{adapter.where}: tensor {name} is missing")
        if found[name].shape != shape:
            raise InputError(f"{adapter.where}: tensor {name} has shape {found[name].shape}, the model needs {shape}")
    return found, tuple(modules.values())


def _refuse_own_head(adapter: Adapter, name: str) -> None:
    """Raise InputError where a head was trained apart from the embedding, which is the head of all these models."""
    tied = [tensor for other, tensor in adapter.full.items() if other.endswith(".embed_tokens.weight")]
    if not tied or not mx.array_equal(tied[0], adapter.full[name]):
        raise InputError(f"{adapter.where}: tensor {name}: the model's head is its embedding; it cannot train apart")


def _refuse_unless_same(adapter: Adapter, model: nn.Module, name: str, compare: bool) -> None:
    """Raise InputError for a tensor that no module trains, unless it is the base's own."""
    own, tensor = dict(tree_flatten(model.parameters())), adapter.full[name]
    path = own_path(name, own.keys())
    if path is None or adapter.layout == "gemma_mlx":
        raise InputError(f"{adapter.where}: tensor {name} belongs to no layer of the model{_other_base(adapter)}")
    same = own[path].shape == tensor.shape
    if not same or (compare and not mx.array_equal(own[path].astype(mx.float32), tensor.astype(mx.float32))):
        raise InputError(f"{adapter.where}: tensor {name} differs from the base's, and this library never trains it")


def fit_to_base(adapter: Adapter, base: Path) -> Adapter:
    """`fit` to a checkpoint's folder, of which no weight is read."""
    return fit(adapter, skeleton(read_spec(base), "float32"), compare=False)
