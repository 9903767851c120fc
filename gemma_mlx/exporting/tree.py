"""The merged model as tensors of a file: what the adapter leaves alone is copied from the base byte for byte, the rest
is computed stretch by stretch.

Names and layouts are transformers', so that a base in MLX's spelling, quantized or as a GGUF file, comes out as the
checkpoint that it was made from would; or, packed again, MLX's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.adapters.attach import attach, attached
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import Source
from gemma_mlx.exporting.tensors import CHUNK_BYTES, DTYPES, NAMES, Entry, Part, raw
from gemma_mlx.full import full_modules, tensor_names
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.lora import LoRALinear, lora_layers
from gemma_mlx.merging import float_rows, merged_rows
from gemma_mlx.models.families import build
from gemma_mlx.models.load import StoredTensor, chosen_dtype, load_model, stored_tensors
from gemma_mlx.models.names import (
    channels_last_parts,
    is_shared_kv,
    module_path,
    part_of,
    stored_name,
    to_mlx_axes,
    to_torch_axes,
)
from gemma_mlx.models.quantize import group_of, module_at, put_module, quantizable
from gemma_mlx.models.stacks import GATE, GATE_UP, UP, ExpertStacks
from gemma_mlx.models.tables import DiskTable

Rows = Callable[[slice], mx.array]
"""Gives a stretch of a tensor along its first axis, in the module's layout and any floating dtype."""


@dataclass
class Tree:
    """A base with its adapter on it, nothing read yet.

    Attributes:
        model: the loaded model.
        stored: module path -> tensor of the base's files; empty for a GGUF file.
        shapes: path -> shape of every parameter of the plain model, in the modules' layout.
        torch_layout: paths that the base holds as torch does.
        changed: paths that the adapter changes.
        dtype: of weights that the base holds packed.
    """

    model: Any
    stored: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    torch_layout: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    def dtype_of(self, path: str) -> str:
        """The dtype of a parameter as the base has it, unpacked; safetensors' name of it."""
        kept = self.stored.get(path)
        return kept.dtype if kept is not None and kept.dtype in DTYPES and kept.dtype != "U32" else self.dtype


def open_tree(source: Source) -> Tree:
    """The base and its adapter, checked against each other.

    Raises:
        InputError: as `load_model` and `attach`.
    """
    stored = {} if is_gguf(source.base) else stored_tensors(source.base)
    bits = source.remembered.get("quantize")
    model = load_model(source.base, _load_dtype(stored), audio_window=source.remembered.get("audio_window", 12))
    if bits:
        _pack_lazily(model, bits, chosen_dtype(None, model.spec))
    if source.adapter is not None:
        attach(model, source.adapter)
    spec = model.spec
    by_path = {module_path(t.name, spec.unified): t for t in stored.values()}
    shapes = {name: tuple(a.shape) for name, a in tree_flatten(build(spec).parameters())}
    last = channels_last_parts({path: t.shape for path, t in by_path.items()}, shapes)
    tree = Tree(model, by_path, shapes, _own_dtype(by_path, spec.dtype))
    for path, shape in shapes.items():
        kept = by_path.get(path)
        if kept is not None and (
            to_torch_axes(path, len(shape)) is None
            or to_mlx_axes(path, kept.shape, shape, part_of(path) in last) is not None
        ):
            tree.torch_layout.add(path)
    tree.changed = {f"{path}.weight" for path in lora_layers(model)}
    for path in full_modules(model):
        tree.changed |= {f"{path}.{leaf}" for leaf in tensor_names(module_at(model, path))}
    return tree


def _load_dtype(stored: dict[str, StoredTensor]) -> str:
    """A dtype that holds every floating tensor of the files exactly."""
    kinds = {t.dtype for t in stored.values()} & {"F64", "F32", "F16", "BF16"}
    return {"BF16": "bfloat16", "F16": "float16"}.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"


def _own_dtype(stored: dict[str, StoredTensor], named: str) -> str:
    """The dtype of packed weights once they are unpacked: that of their scales, else what config.json says."""
    scales = next((t.dtype for path, t in stored.items() if path.endswith(".scales")), None)
    return scales or next((name for name, dtype in DTYPES.items() if str(dtype).endswith(named)), "BF16")


def _pack_lazily(model: Any, bits: int, dtype: mx.Dtype) -> None:
    """`quantize_model` that computes nothing yet: the weights are those that the adapter was trained on."""
    for path, module in quantizable(model, bits):
        module.weight = module.weight.astype(dtype)
        put_module(model, path, module.to_quantized(group_size=group_of(module.weight.shape[-1]), bits=bits))


def rows_of(model: Any, name: str) -> Rows:
    """How a parameter of the plain model is had from the loaded one.

    Args:
        model: with quantized modules, adapters and tables on disk.
        name: of a parameter as `build` has it.
    """
    owner, _, leaf = name.rpartition(".")
    module = module_at(model, owner)
    if isinstance(module, LoRALinear):
        return partial(merged_rows, module) if leaf == "weight" else partial(_slice, module.linear[leaf])
    if isinstance(module, DiskTable):
        return partial(_table_rows, module.in_dtype(mx.float32) if module.packed else module)
    if isinstance(module, ExpertStacks) and leaf not in module and leaf == GATE_UP:
        return partial(_joined, module[GATE], module[UP])
    exact = attached(model).exact.get(name)  # trained in full: the model may hold it in a coarser dtype
    if exact is not None:
        return partial(_slice, exact)
    held = module[leaf]
    if isinstance(held, nn.Module):
        return partial(float_rows, held)
    if leaf == "weight" and "scales" in module:
        return partial(float_rows, module)
    return partial(_slice, held)


def _slice(array: mx.array, rows: slice) -> mx.array:
    return array[rows] if array.ndim else array


def _table_rows(table: DiskTable, rows: slice) -> mx.array:
    return table(np.arange(*rows.indices(table.shape[0])))


def _joined(gate: nn.Module, up: nn.Module, rows: slice) -> mx.array:
    return mx.concatenate([float_rows(gate, rows), float_rows(up, rows)], axis=1)


def stretches(shape: tuple[int, ...], item: int = 4) -> Iterator[slice]:
    """Slices along the first axis of about `CHUNK_BYTES` each."""
    if not shape:
        yield slice(None)
        return
    row = max(1, item * int(np.prod(shape[1:])))
    step = max(1, CHUNK_BYTES // row)
    yield from (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))


def plain_entries(tree: Tree, dtype: str | None = None) -> list[Entry]:
    """Every tensor as transformers has it, and those that the base's files hold though nothing reads them.

    Args:
        tree: the model; its arrays move into the entries, so that each is let go once it is written.
        dtype: "F32", "BF16" or "F16" of all; None for the base's own.
    """
    spec, entries = tree.model.spec, []
    for path, shape in tree.shapes.items():
        kept = tree.stored.get(path)
        target, name = dtype or tree.dtype_of(path), stored_name(path, spec.unified)
        axes = to_torch_axes(path, len(shape))
        final = shape if axes is None else tuple(shape[a] for a in axes)
        part = Part(name, final, target)
        if path in tree.torch_layout and path not in tree.changed and kept.dtype == target and _is_plain(tree, path):
            entries.append(Entry((part,), partial(copied, kept)))
        else:
            rows = rows_of(tree.model, path)
            entries.append(Entry((part,), partial(computed, rows, shape, target, axes, name)))
    return entries + _unread(tree, dtype)


def _is_plain(tree: Tree, path: str) -> bool:
    """Whether the model's tensor is what the file holds: not packed, in the file or as it was loaded."""
    owner, _, leaf = path.rpartition(".")
    module = module_at(tree.model, owner)
    if isinstance(module, DiskTable):
        return not module.packed
    return (isinstance(module.get(leaf), mx.array) and "scales" not in module) or isinstance(module, LoRALinear)


def _unread(tree: Tree, dtype: str | None) -> list[Entry]:
    """Key and value tensors of layers that share another's: in published files, so they belong to a whole one."""
    found = []
    for path, shape, rows in unread(tree):
        kept = tree.stored[path]
        packed = kept.dtype == "U32"
        target = dtype or (tree.dtype if packed else kept.dtype)
        part = Part(stored_name(path, tree.model.spec.unified), shape, target)
        if kept.dtype == target:
            found.append(Entry((part,), partial(copied, kept)))
        else:
            found.append(Entry((part,), partial(computed, rows, shape, target, None, part.name)))
    return found


def unread(tree: Tree) -> Iterator[tuple[str, tuple[int, ...], Rows]]:
    """(path, shape, how its values are had) of key and value weights that the model has no place for."""
    for path, kept in tree.stored.items():
        if path in tree.shapes or not path.endswith(".weight") or not is_shared_kv(path):
            continue
        weight = mx.load(str(kept.file))[kept.name]
        scales = tree.stored.get(f"{path.removesuffix('weight')}scales")
        if scales is None:
            yield path, kept.shape, partial(_slice, weight)
            continue
        inner, rows = tree.model.spec.text.hidden_size, kept.shape[0]
        packed = nn.QuantizedLinear(inner, rows, False, inner // scales.shape[-1], kept.shape[-1] * 32 // inner)
        packed.weight = weight
        for leaf in ("scales", "biases"):
            beside = tree.stored[f"{path.removesuffix('weight')}{leaf}"]
            packed[leaf] = mx.load(str(beside.file))[beside.name]
        yield path, (rows, inner), partial(float_rows, packed)


def copied(kept: StoredTensor) -> Iterator[tuple[int, bytes]]:
    """A tensor's bytes out of its file."""
    left = int(np.prod(kept.shape)) * DTYPES[kept.dtype].size
    with kept.file.open("rb") as f:
        f.seek(kept.offset)
        while left:
            data = f.read(min(left, CHUNK_BYTES))
            if not data:
                raise InputError(f"{kept.file}: ends within {kept.name}; download it again")
            left -= len(data)
            yield 0, data


def computed(
    rows: Rows, shape: tuple[int, ...], target: str, axes: tuple[int, ...] | None, name: str
) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor computed stretch by stretch, rounded once, in torch's layout."""
    for stretch in stretches(shape):
        yield 0, raw(rounded(rows(stretch), target, axes, name))


def rounded(values: mx.array, target: str, axes: tuple[int, ...] | None, name: str) -> mx.array:
    """Values in the dtype and layout of the file.

    Raises:
        InputError: a value is too large for the dtype.
    """
    out = values.astype(DTYPES[target])
    if target == "F16" and bool(mx.any(mx.isinf(out) & ~mx.isinf(values)).item()):
        raise InputError(f"{name}: holds values that float16 has no room for; export it as bfloat16 or float32")
    return mx.contiguous(out if axes is None else out.transpose(axes))


def dtype_name(dtype: str | None) -> str | None:
    """ "bfloat16" -> "BF16".

    Raises:
        InputError: another dtype than the three.
    """
    if dtype is None:
        return None
    found = {str(d).removeprefix("mlx.core."): name for d, name in NAMES.items() if d != mx.uint32}
    if dtype not in found:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(found)}")
    return found[dtype]
