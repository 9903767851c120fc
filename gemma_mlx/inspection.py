"""What a checkpoint is: its parts and their sizes, what can be trained in it, and what stands against loading it.

Only headers are read; nothing is unpacked, and no weight is touched unless asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.full import candidates, resolve_full, tensor_names
from gemma_mlx.gguf_file import is_gguf, open_gguf
from gemma_mlx.lora import GROUPS, linear_paths, resolve_targets
from gemma_mlx.models.families import build
from gemma_mlx.models.gguf import check_gguf
from gemma_mlx.models.load import checkpoint_files, chosen_dtype, load_model, not_finite, read_header
from gemma_mlx.models.quantize import group_of, quantized_paths, stays_float
from gemma_mlx.models.stacks import Stack, float_stacks
from gemma_mlx.models.tables import TABLE, tables_on_disk
from gemma_mlx.spec import FULL, ModelSpec, read_spec

PARTS = {
    "vision_tower": "vision tower",
    "audio_tower": "audio tower",
    "embed_vision": "vision embedder",
    "embed_audio": "audio embedder",
    "embed_tokens_per_layer": "per-layer embeddings",
    "embed_tokens": "embeddings (and head)",
    "self_attn": "attention",
    "mlp": "mlp",
    "experts": "experts",
}
"""Module name -> part, the first that occurs in a path; anything else is norms, scalars and small projections."""
REST = "norms and the rest"


@dataclass
class Part:
    """One part of a model: numbers of tensors and weights, bytes as loaded and with the decoder packed."""

    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    packed: dict[int, int] = field(default_factory=lambda: {8: 0, 4: 0})


@dataclass
class Findings:
    """What `examine` found."""

    model: str
    family: str = ""
    facts: list[str] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    trainable: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Target -> (layers, adapter weights at the given rank)."""
    full: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Group -> (modules, weights) that would train in full; without groups that hold quantized modules."""
    by_name: list[str] = field(default_factory=list)
    """Linears that no group names: they get an adapter if they are named."""
    frozen: list[str] = field(default_factory=list)
    """Kinds of tensors that no option trains."""
    problems: list[str] = field(default_factory=list)
    """What stands against loading, one line each."""


def part_of(path: str) -> str:
    """The part that a module path belongs to."""
    names = path.split(".")
    return next((part for name, part in PARTS.items() if name in names), REST)


def examine(model: str | Path, dtype: str | None = None, rank: int = 16, read_weights: bool = False) -> Findings:
    """Look at a checkpoint folder or a GGUF file; what is wrong with it is found, not raised.

    Args:
        dtype: as for `load_model`.
        rank: of the adapters whose weights are counted.
        read_weights: read every weight and look for values that are not finite.
    """
    path, found = Path(model), Findings(str(model))
    try:
        spec = read_spec(path)
    except InputError as error:
        found.problems.append(str(error))
        return found
    found.facts = _facts(spec)
    found.facts += _gguf_facts(path) if is_gguf(path) else _file_facts(path, found.problems)
    try:
        loaded = build(spec) if found.problems else _loaded(path, spec, dtype, found.problems)
    except InputError as error:
        found.problems.append(str(error))
        loaded = build(spec)
    found.family = _family(loaded.spec)
    if packed := quantized_paths(loaded):
        forms = Counter(f"{form.bits} bits in groups of {form.group_size}" for form in packed.values())
        found.facts.append("quantized: " + ", ".join(f"{n} matrices of {form}" for form, n in forms.most_common()))
    for table, stored in tables_on_disk(loaded).items():
        name = table.rpartition(".")[2]
        found.facts.append(f"{name}: {size_text(stored.nbytes)} that stays on disk, read row by row")
    found.facts.append(_tokenizer_fact(path, spec))
    found.parts = parts_of_model(loaded)
    _trainable(loaded, rank, found)
    if read_weights and not found.problems:
        found.problems += not_finite(load_model(path, dtype) if is_gguf(path) else loaded, tables=True)
    return found


def _family(spec: ModelSpec) -> str:
    name = {"gemma4": "Gemma 4", "gemma3_text": "Gemma 3"}.get(spec.config.get("model_type"), "unknown")
    media = [kind for kind, tower in (("pictures", spec.vision), ("speech", spec.audio)) if tower is not None]
    return f"{name}: " + ", ".join(["text", *media])


def _facts(spec: ModelSpec) -> list[str]:
    text = spec.text
    full = sum(kind == FULL for kind in text.layer_types)
    shared = f", {text.num_kv_shared_layers} share keys and values" if text.num_kv_shared_layers else ""
    return [
        f"decoder: {text.num_hidden_layers} layers ({full} full, the others see {text.sliding_window} tokens{shared}), "
        f"width {text.hidden_size}, vocabulary {text.vocab_size:,}"
    ]


def _file_facts(path: Path, problems: list[str]) -> list[str]:
    """Size and number of safetensors files; damaged ones become problems."""
    try:
        files = checkpoint_files(path)
    except InputError as error:
        problems.append(str(error))
        return []
    for file in files:
        try:
            read_header(file)
        except InputError as error:
            problems.append(str(error))
    size = sum(file.stat().st_size for file in files)
    return [f"files: {len(files)} safetensors, {size_text(size)}"]


def _gguf_facts(path: Path) -> list[str]:
    kinds = Counter(tensor.tensor_type.name for tensor in open_gguf(path).tensors)
    forms = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return [f"file: GGUF, {size_text(path.stat().st_size)}; tensors: {forms}; unpacked when loaded"]


def _loaded(path: Path, spec: ModelSpec, dtype: str | None, problems: list[str]) -> Any:
    """The model, lazy; if only unexpected tensors are in the way, that is a problem and the model is given."""
    if is_gguf(path):
        model = build(spec)
        wanted = {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
        check_gguf(path, wanted)
        model.set_dtype(chosen_dtype(dtype, spec))
        return model
    try:
        return load_model(path, dtype)
    except InputError as error:
        problems.append(str(error))
        return load_model(path, dtype, allow_unexpected=True) if "unexpected" in str(error) else build(spec)


def _tokenizer_fact(path: Path, spec: ModelSpec) -> str:
    from gemma_mlx.data.processor import Processor

    processor = Processor(path, spec)
    try:
        own = processor.tokenizer.chat_template is not None
        ends = ", ".join(repr(processor.tokenizer.text_of(i)) for i in processor.eos_ids)
    except InputError as error:
        return f"tokenizer: none that can be used ({error})"
    return f"tokenizer: there, {'with' if own else 'without'} a chat template; answers end at {ends}"


def parts_of_model(model: Any) -> dict[str, Part]:
    """The parts that a model has, by name: their tensors, weights and bytes."""
    parts = {name: Part() for name in [*PARTS.values(), REST]}
    modules = dict(model.named_modules())
    packed, stacks = quantized_paths(model), set(float_stacks(model))
    for path, array in tree_flatten(model.parameters()):
        owner, _, leaf = (path, "", "weight") if path in stacks else path.rpartition(".")
        part, module = parts[part_of(owner)], Stack(array) if path in stacks else modules.get(owner)
        part.tensors += 1
        part.bytes += array.nbytes
        if owner in packed:
            part.weights += array.size * 32 // packed[owner].bits if leaf == "weight" else 0
        else:
            part.weights += array.size
        for bits in part.packed:
            packable = leaf == "weight" and owner not in packed and not stays_float(owner, module)
            part.packed[bits] += _packed_bytes(array, bits) if packable else array.nbytes
    for path, table in tables_on_disk(model).items():
        part = parts[part_of(path)]
        part.tensors, part.weights, part.bytes = part.tensors + 1, part.weights + math.prod(table.shape), table.nbytes
        part.packed = {bits: size + table.nbytes for bits, size in part.packed.items()}
    return {name: part for name, part in parts.items() if part.tensors}


def _packed_bytes(weight: mx.array, bits: int) -> int:
    """Bytes of a matrix after quantizing: the weights, and a scale and a bias for each group."""
    groups = weight.size // group_of(weight.shape[-1])
    return weight.size * bits // 8 + 2 * groups * weight.itemsize


def _trainable(model: Any, rank: int, found: Findings) -> None:
    """Which linears each target chooses, which need to be named, what trains in full, and what never trains."""
    shapes = _linear_shapes(model)
    chosen: set[str] = set()
    for group in [*GROUPS, "all"]:
        try:
            paths = resolve_targets(model, group)
        except InputError:
            continue  # this checkpoint has no such part
        chosen.update(paths)
        found.trainable[group] = len(paths), sum(rank * sum(shapes[path]) for path in paths)
    found.by_name = sorted({path.removesuffix(".linear").rsplit(".", 1)[-1] for path in set(shapes) - chosen})
    modules = candidates(model)
    for group in [*GROUPS, "all"]:
        try:
            paths = resolve_full(model, group)
        except InputError:
            continue  # no such part, or quantized
        sizes = (modules[path][leaf].size for path in paths for leaf in tensor_names(modules[path]))
        found.full[group] = len(paths), sum(sizes)
    whole = {f"{path}.{leaf}" for path, module in modules.items() for leaf in tensor_names(module)}
    whole = {name for name in whole if TABLE not in name}  # which never trains
    inside = tuple(f"{path}." for path in shapes)
    leaves = {n for n, _ in tree_flatten(model.parameters()) if n not in whole and not n.startswith(inside)}
    found.frozen = sorted({".".join(name.split(".")[-2:]) if name.endswith(".weight") else name.rsplit(".", 1)[-1]
                           for name in leaves})  # fmt: skip


def _linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    from gemma_mlx.lora import linear_shape

    modules = dict(model.named_modules())
    return {path: linear_shape(modules[path]) for path in linear_paths(model)}


def size_text(size: int) -> str:
    """Bytes in words: "1.25 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
