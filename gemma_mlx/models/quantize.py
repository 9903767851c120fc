"""Which weights may be quantized, quantizing them after a load, and loading files that hold quantized ones.

MLX's affine form: groups of consecutive inputs share a scale and a bias, w ≈ scale · q + bias with q of 4, 6 or 8
bits. Only matrices of the text decoder are quantized, stacks of experts among them. What stays in floating point:
towers and their embedders (their clip bounds, relative positions and small widths do not bear it), norms and scalars,
routers and AltUp's predictors (small, and everything depends on them), LAuReL's two narrow matrices (16 MB of E2B, and
all that they say passes through 64 values), and matrices of fewer than `SMALL` weights. Conversions pack some of these
too; they load as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.errors import InputError
from gemma_mlx.models.names import module_path
from gemma_mlx.models.stacks import ExpertStacks, PackedStack, Stack, float_stacks, settle

BITS = (4, 6, 8)
GROUP = 64
"""Weights that share a scale; 32 where the input size is no multiple of it."""
SMALL = 4096
FLOAT_PARTS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
FLOAT_NAMES = ("router", "modality_router", "prediction_coefs", "correction_coefs", "relative_k_proj", "laurel")

_LOADABLE_BITS = (2, 3, 4, 5, 6, 8)
_FLOAT = (nn.Linear, nn.Embedding, Stack)
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, PackedStack)


@dataclass(frozen=True)
class Packed:
    """How one matrix, or stack of matrices, is stored: bits a weight, weights a group."""

    bits: int
    group_size: int


def stays_float(path: str, module: nn.Module) -> str | None:
    """Why a module's weight is not quantized on load; None where it is."""
    parts = path.split(".")
    if not isinstance(module, _FLOAT):
        return "not a matrix"
    if any(part in parts for part in FLOAT_PARTS):
        return "a tower or its embedder"
    if any(part in parts for part in FLOAT_NAMES):
        return "small, and much depends on it"
    inner = module.weight.shape[-1]
    if module.weight.size < SMALL:
        return f"fewer than {SMALL} weights"
    return f"{inner} inputs are no multiple of 32" if inner % 32 else None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, _FLOAT + _QUANTIZED)}


def module_at(model: nn.Module, path: str) -> Any:
    """The module, or array, at a dotted path; the model itself at ""."""
    node: Any = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else getattr(node, part)
    return node


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    owner, _, last = path.rpartition(".")
    node = module_at(model, owner)
    if isinstance(node, list):
        node[int(last)] = module
    else:
        setattr(node, last, module)


def quantized_paths(model: nn.Module) -> dict[str, Packed]:
    """Path -> form of every quantized matrix of a model."""
    found = {path: m for path, m in _modules(model).items() if isinstance(m, _QUANTIZED)}
    return {path: Packed(m.bits, m.group_size) for path, m in found.items()}


def packing(model: nn.Module, path: str) -> dict[str, int]:
    """`group_size` and `bits` of the module at a path, as keywords; none where it is not quantized."""
    form = quantized_paths(model).get(path)
    return {} if form is None else {"group_size": form.group_size, "bits": form.bits}


def group_of(inner: int) -> int:
    """Weights a group, for rows of so many."""
    return GROUP if inner % GROUP == 0 else 32


def quantize_model(model: nn.Module, bits: int, parts: Iterable[str] = ()) -> list[str]:
    """Quantize the decoder's matrices in place; returns their paths. The model stays frozen.

    Each matrix (or stack of experts) is computed at once, so that the peak holds one in floating point beside what is
    already packed.

    Args:
        bits: 4, 6 or 8.
        parts: module names (mlp, embed_tokens, ...) of which a path must have one; all paths by default.

    Raises:
        InputError: other bits, or a model that holds quantized weights already.
    """
    done, parts = [], set(parts)
    for path, module in quantizable(model, bits):
        if parts and not parts.intersection(path.split(".")):
            continue
        packed = module.to_quantized(group_size=group_of(module.weight.shape[-1]), bits=bits)
        mx.eval(packed.parameters())
        put_module(model, path, packed)
        done.append(path)
    model.freeze()
    return done


def _matrix(model: nn.Module, path: str) -> nn.Module:
    """The matrix, or stack of matrices, at a path."""
    found = module_at(model, path)
    return Stack(found) if isinstance(found, mx.array) else found


def quantizable(model: nn.Module, bits: int) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the matrices and stacks that quantizing to so many bits packs.

    Raises:
        InputError: as `quantize_model`.
    """
    if bits not in BITS:
        raise InputError(f"quantize {bits}: expected one of {', '.join(map(str, BITS))}")
    if found := quantized_paths(model):
        path, form = next(iter(found.items()))
        held = f"{path}: {form.bits} bits"
        raise InputError(f"quantize {bits}: the checkpoint is quantized already ({held}); leave it out")
    paths = [*_modules(model), *float_stacks(model)]
    for path in paths:
        module = _matrix(model, path)
        if not stays_float(path, module):
            yield path, module


def empty_quantized(model: nn.Module, bits: int) -> None:
    """`quantize_model` without reading a weight: the packed matrices' values mean nothing."""
    for path, module in quantizable(model, bits):
        put_empty(model, path, module, Packed(bits, group_of(module.weight.shape[-1])))


def put_empty(model: nn.Module, path: str, module: nn.Module, form: Packed) -> None:
    """Put an empty packed matrix of this form in the place of a float one, its scales in that one's dtype."""
    packed = _empty(module, form)
    packed.set_dtype(module.weight.dtype)
    put_module(model, path, packed)


def expect_packed(
    model: nn.Module, stored: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str
) -> int:
    """Make quantized modules of those that a file holds packed, in place, so that its tensors fit; how many they are.

    Experts get the file's form too, packed or not; `stacks.settle` brings what is float back after the load.

    Bits and group follow from the shapes, matrix by matrix: conversions mix them.

    Args:
        stored: module path of each stored tensor -> its shape.
        config: config.json, whose `quantization` names the mode.
        where: for messages.

    Raises:
        InputError: a mode other than affine, or shapes that no number of bits explains.
    """
    for path, module in model.named_modules():
        if isinstance(module, ExpertStacks):
            module.expect(stored, path)
    modules, count = _modules(model), 0
    settings = config.get("quantization") or config.get("quantization_config") or {}
    settings = {module_path(key): value for key, value in settings.items()}
    for path, module in modules.items():
        scales, weight = stored.get(f"{path}.scales"), stored.get(f"{path}.weight")
        if scales is None or weight is None:
            continue
        own = settings.get(path)
        mode = (own if isinstance(own, Mapping) else settings).get("mode", "affine")
        if mode != "affine" or f"{path}.biases" not in stored:
            raise InputError(f"{where}: {path} is quantized in mode {mode!r}; only 'affine' is supported")
        shape = module.weight.shape
        form = _form(shape, weight, scales)
        if form is None:
            raise InputError(
                f"{where}: {path}.weight {list(weight)} with scales {list(scales)} is no packing of {list(shape)}"
            )
        put_module(model, path, _empty(module, form))
        count += 1
    return count


def _empty(module: nn.Module, form: Packed) -> nn.Module:
    """A quantized module in place of a float one, its weights still to be loaded."""
    own = {"group_size": form.group_size, "bits": form.bits}
    if isinstance(module, Stack):
        return PackedStack(module.weight.shape, **own)
    out, inner = module.weight.shape
    if isinstance(module, nn.Embedding):
        return nn.QuantizedEmbedding(out, inner, **own)
    return nn.QuantizedLinear(inner, out, bias="bias" in module, **own)


def _form(shape: tuple[int, ...], weight: tuple[int, ...], scales: tuple[int, ...]) -> Packed | None:
    """The packing of a weight of this shape that has these shapes, or None."""
    *rows, inner = shape
    if [*weight[:-1]] != rows or len(scales) != len(shape) or weight[-1] * 32 % inner or inner % (scales[-1] or 1):
        return None
    form = Packed(weight[-1] * 32 // inner, inner // (scales[-1] or 1))
    return form if form.bits in _LOADABLE_BITS and form.group_size in (32, 64, 128) else None


def dequantize_model(model: nn.Module, dtype: mx.Dtype = mx.float32) -> list[str]:
    """Replace quantized matrices by the floating-point ones that they stand for, in place; returns their paths."""
    done = []
    for path, module in _modules(model).items():
        if isinstance(module, _QUANTIZED):
            plain = module.to_float(dtype) if isinstance(module, PackedStack) else _plain(module, dtype)
            put_module(model, path, plain)
            done.append(path)
    settle(model)
    model.freeze()
    return done


def _plain(module: nn.QuantizedLinear | nn.QuantizedEmbedding, dtype: mx.Dtype) -> nn.Module:
    weight = mx.dequantize(module.weight, module.scales, module.get("biases"), module.group_size, module.bits)
    out, inner = weight.shape
    embeds = isinstance(module, nn.QuantizedEmbedding)
    plain = nn.Embedding(out, inner) if embeds else nn.Linear(inner, out, bias=False)
    plain.weight = weight.astype(dtype)
    if "bias" in module:
        plain.bias = module.bias.astype(dtype)
    return plain
