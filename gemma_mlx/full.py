"""Full fine-tuning of chosen modules, beside adapters or alone; PEFT calls it ``modules_to_save``.

What trains is the ``weight`` and ``bias`` of linears, norms, convolutions and embeddings, and the stacks of experts.
Clip bounds, layer scalars, position tables and statistics never do: MLX takes every array of a module for trainable
that is not frozen, so that the tensors are unfrozen one by one. The unfrozen tensors of a model are its trained ones;
nothing else remembers them.

A run keeps trained weights in float32, whatever the dtype of the base, since AdamW's small steps vanish in bfloat16's
8 bits; they are rounded to the module's dtype where they are put into it. Without these masters a bfloat16 weight is
the module's own array, and ``gemma_mlx.optimizers.update`` rounds at random.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.lora import GROUPS, LoRALinear, _ends_with, _group_of, _natural, lora_layers
from gemma_mlx.models.gemma4.experts import Experts
from gemma_mlx.models.tables import TABLE

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Place:
    """Where a trained tensor lies in the model, and the dtype that it has there."""

    owner: nn.Module
    leaf: str
    dtype: mx.Dtype

    def get(self) -> mx.array:
        """The tensor in the module."""
        return self.owner[self.leaf]

    def put(self, value: mx.array) -> None:
        """Put a tensor there, in the place's dtype."""
        self.owner[self.leaf] = value.astype(self.dtype)


def tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own arrays that may train."""
    names = ("gate_up_proj", "down_proj") if isinstance(module, Experts) else ("weight", "bias")
    return tuple(name for name in names if isinstance(module.get(name), mx.array))


def _is_table(path: str) -> bool:
    """The table of per-layer embeddings: it never trains, and need not be in memory."""
    return path.rpartition(".")[2] == TABLE


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module with such arrays, or that would have but for an adapter or its size, in natural order."""
    adapters = tuple(f"{path}." for path in lora_layers(model))
    found = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, LoRALinear) or tensor_names(module) or _is_table(path)) and not path.startswith(adapters)
    }
    return {path: found[path] for path in sorted(found, key=_natural)}


def _chooses(name: str, path: str, module: nn.Module) -> bool:
    """Whether a group or module name means this module: itself, or one that it lies in.

    Embedding tables must be named themselves: they are large, and a decoder's is its head as well.
    """
    parts, wanted = path.split("."), name.split(".")
    by_name = isinstance(module, nn.Embedding | nn.QuantizedEmbedding) or _is_table(path)
    if wanted[0] == "all" or wanted[0] in GROUPS:
        if wanted[0] not in ("all", _group_of(parts) or "decoder"):  # outside of the other groups all is decoder
            return False
        if len(wanted) == 1:
            return not by_name
        wanted = wanted[1:]
    if by_name:
        return _ends_with(parts, wanted)
    return any(_ends_with(parts[:i], wanted) for i in range(len(wanted), len(parts) + 1))


def _unknown(name: str, paths: Iterable[str]) -> InputError:
    parts = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    close = difflib.get_close_matches(name, [*GROUPS, "all", *parts], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known groups: {', '.join([*GROUPS, 'all'])}"
    return InputError(f"full: {name!r} names no module of this model whose weights can train; {hint}")


def _refuse(path: str, module: nn.Module, where: str) -> None:
    if isinstance(module, LoRALinear):
        raise InputError(f"{where}: {path} has an adapter; name it in targets or in full, not in both")
    if _is_table(path):
        raise InputError(
            f"{where}: {path} cannot train: a step touches a few of its rows, and AdamW would hold 16 bytes for every "
            "weight (38 GB for E2B); leave it out"
        )
    if not all(mx.issubdtype(module[name].dtype, mx.floating) for name in tensor_names(module)):
        raise InputError(
            f"{where}: {path} is quantized, and packed weights cannot train; leave it out, or load the base unquantized"
        )


def resolve_full(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """Paths of the modules whose weights ``names`` choose (a list or comma separated), in natural order.

    A name is a group (``audio``), the end of a module's path (``embed_audio``, ``layers.3.mlp.down_proj``), which means
    all that lies in it, or a group and such an end (``decoder.layers.3``).

    Raises InputError for a name that chooses nothing, and for a module that cannot train: it has an adapter, it is
    quantized, or it is the table of per-layer embeddings.
    """
    wanted = [n.strip() for n in (names.split(",") if isinstance(names, str) else names) if n.strip()]
    if not wanted:
        raise InputError(f"full: no modules named; known groups: {', '.join([*GROUPS, 'all'])}")
    modules, chosen = candidates(model), set()
    for name in wanted:
        matched = [path for path, module in modules.items() if _chooses(name, path, module)]
        if not matched:
            raise _unknown(name, modules)
        chosen.update(matched)
    paths = [path for path in modules if path in chosen]
    for path in paths:
        _refuse(path, modules[path], "full")
    return paths


def train_fully(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """Make the weights of the chosen modules trainable, beside what is so already; returns their paths.

    Raises InputError as ``resolve_full``.
    """
    paths = resolve_full(model, names)
    unfreeze(model, paths)
    return paths


def unfreeze(model: nn.Module, paths: Iterable[str]) -> None:
    """Make the weights of modules trainable, by their paths."""
    modules = candidates(model)
    for path in paths:
        modules[path].unfreeze(recurse=False, keys=list(tensor_names(modules[path])))


def refuse_trained(model: nn.Module) -> None:
    """Raise InputError where a model's own weights are unfrozen: an earlier run trained them, so it is no base."""
    if modules := full_modules(model):
        raise InputError(f"{modules[0]}: trained in full by an earlier run (it is unfrozen); load the base model again")


def _full_names(model: nn.Module) -> list[str]:
    adapters = tuple(f"{path}." for path in lora_layers(model))
    names = (name for name, _ in tree_flatten(model.trainable_parameters()))
    return sorted((name for name in names if not name.startswith(adapters)), key=_natural)


def full_modules(model: nn.Module) -> list[str]:
    """Paths of the modules whose own weights train, in natural order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in _full_names(model)))


def trained_places(model: nn.Module) -> dict[str, Place]:
    """Tensor name -> place of everything that trains: the adapters' tensors, then those of whole modules."""
    places = {
        f"{path}.{leaf}": Place(layer, leaf, layer[leaf].dtype)
        for path, layer in lora_layers(model).items()
        for leaf in layer.TENSORS
    }
    modules = dict(model.named_modules())
    for name in _full_names(model):
        owner, _, leaf = name.rpartition(".")
        places[name] = Place(modules[owner], leaf, modules[owner][leaf].dtype)
    return places


def trained_parameters(model: nn.Module, masters: bool = True) -> Weights:
    """Tensor name -> weight in float32 of everything that trains, in MLX's layouts; without ``masters``, bfloat16
    weights as they are (adapters are float32)."""
    weights = {name: place.get() for name, place in trained_places(model).items()}
    return {name: w if w.dtype == mx.bfloat16 and not masters else w.astype(mx.float32) for name, w in weights.items()}


def refuse_without_masters(model: nn.Module) -> None:
    """Raise InputError where no weight that trains in full is bfloat16: there is nothing to keep in it."""
    if all(w.dtype == mx.float32 for w in trained_parameters(model, masters=False).values()):
        raise InputError("master_weights: none needs a bfloat16 base (dtype bfloat16)")


def saved_shapes(model: nn.Module, paths: Iterable[str], where: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of what an adapter's file must hold for these modules.

    Raises InputError for a module that the model does not have, or that cannot take weights.
    """
    modules, shapes = candidates(model), {}
    for path in paths:
        if path not in modules:
            raise InputError(f"{where}: the model has no module {path} with weights to train")
        _refuse(path, modules[path], where)
        shapes |= {f"{path}.{leaf}": modules[path][leaf].shape for leaf in tensor_names(modules[path])}
    return shapes


def put_full(model: nn.Module, paths: Iterable[str], weights: Mapping[str, mx.array]) -> None:
    """Put saved weights into modules and make them trainable."""
    chosen = set(paths)
    unfreeze(model, chosen)
    for name, place in trained_places(model).items():
        if name.rpartition(".")[0] in chosen:
            place.put(weights[name])
