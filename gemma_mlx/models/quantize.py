"""Which weights may be quantized, quantizing them after a load, and loading files that hold quantized ones.

MLX's affine form: groups of consecutive inputs share a scale and a bias, w ≈ scale · q + bias with q of 4, 6 or 8
bits. Only matrices of the text decoder are quantized. What stays in floating point: towers and their embedders (their
clip bounds, relative positions and small widths do not bear it), norms and scalars, routers and AltUp's predictors
(small, and everything depends on them), and matrices of fewer than `SMALL` weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.errors import InputError
from gemma_mlx.models.names import module_path

BITS = (4, 6, 8)
GROUP = 64
"""Weights that share a scale; 32 where the input size is no multiple of it."""
SMALL = 4096
FLOAT_PARTS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
FLOAT_NAMES = ("router", "modality_router", "prediction_coefs", "correction_coefs", "relative_k_proj")

_LOADABLE_BITS = (2, 3, 4, 5, 6, 8)
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Packed:
    """How one matrix is stored: bits a weight, weights a group."""

    bits: int
    group_size: int


def stays_float(path: str, module: nn.Module) -> str | None:
    """Why a module's weight is not quantized on load; None where it is."""
    parts = path.split(".")
    if not isinstance(module, nn.Linear | nn.Embedding):
        return "not a matrix"
    if any(part in parts for part in FLOAT_PARTS):
        return "a tower or its embedder"
    if any(part in parts for part in FLOAT_NAMES):
        return "a router or a table of positions"
    out, inner = module.weight.shape
    if out * inner < SMALL:
        return f"fewer than {SMALL} weights"
    return f"{inner} inputs are no multiple of 32" if inner % 32 else None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Embedding, *_QUANTIZED)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    node: Any = model
    *way, last = path.split(".")
    for part in way:
        node = node[int(part)] if isinstance(node, list) else getattr(node, part)
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


def quantize_model(model: nn.Module, bits: int, parts: Iterable[str] = ()) -> list[str]:
    """Quantize the decoder's matrices in place; returns their paths. The model stays frozen.

    Each matrix is computed at once, so that the peak holds one in floating point beside what is already packed.

    Args:
        bits: 4, 6 or 8.
        parts: module names (mlp, embed_tokens, ...) of which a path must have one; all paths by default.

    Raises:
        InputError: other bits, or a model that holds quantized weights already.
    """
    if bits not in BITS:
        raise InputError(f"quantize {bits}: expected one of {', '.join(map(str, BITS))}")
    if found := quantized_paths(model):
        path, form = next(iter(found.items()))
        held = f"{path}: {form.bits} bits"
        raise InputError(f"quantize {bits}: the checkpoint is quantized already ({held}); leave it out")
    done, modules, parts = [], _modules(model), set(parts)
    for path in list(modules):
        module = modules.pop(path)  # nothing else may hold the float weight
        if stays_float(path, module) or (parts and not parts.intersection(path.split("."))):
            continue
        group = GROUP if module.weight.shape[1] % GROUP == 0 else 32
        packed = module.to_quantized(group_size=group, bits=bits)
        mx.eval(packed.parameters())
        put_module(model, path, packed)
        done.append(path)
    model.freeze()
    return done


def expect_packed(
    model: nn.Module, stored: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str
) -> int:
    """Make quantized modules of those that a file holds packed, in place, so that its tensors fit; how many they are.

    Bits and group follow from the shapes, matrix by matrix: conversions mix them.

    Args:
        stored: module path of each stored tensor -> its shape.
        config: config.json, whose `quantization` names the mode.
        where: for messages.

    Raises:
        InputError: a mode other than affine, or shapes that no number of bits explains.
    """
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
        out, inner = module.weight.shape
        form = _form(inner, weight, scales)
        if form is None or weight[0] != out:
            raise InputError(
                f"{where}: {path}.weight {list(weight)} with scales {list(scales)} is no packing of {[out, inner]}"
            )
        kind = nn.QuantizedEmbedding if isinstance(module, nn.Embedding) else nn.QuantizedLinear
        extra = {} if kind is nn.QuantizedEmbedding else {"bias": "bias" in module}
        put_module(model, path, kind(*_sizes(kind, out, inner), group_size=form.group_size, bits=form.bits, **extra))
        count += 1
    return count


def _sizes(kind: type, out: int, inner: int) -> tuple[int, int]:
    return (out, inner) if kind is nn.QuantizedEmbedding else (inner, out)


def _form(inner: int, weight: tuple[int, ...], scales: tuple[int, ...]) -> Packed | None:
    """The packing of rows of `inner` weights that has these shapes, or None."""
    if len(weight) != 2 or len(scales) != 2 or weight[1] * 32 % inner or inner % scales[1]:
        return None
    form = Packed(weight[1] * 32 // inner, inner // scales[1])
    return form if form.bits in _LOADABLE_BITS and form.group_size in (32, 64, 128) else None


def dequantize_model(model: nn.Module, dtype: mx.Dtype = mx.float32) -> list[str]:
    """Replace quantized matrices by the floating-point ones that they stand for, in place; returns their paths."""
    done = []
    for path, module in _modules(model).items():
        if not isinstance(module, _QUANTIZED):
            continue
        weight = mx.dequantize(module.weight, module.scales, module.get("biases"), module.group_size, module.bits)
        out, inner = weight.shape
        kind = nn.Embedding if isinstance(module, nn.QuantizedEmbedding) else nn.Linear
        plain = kind(out, inner) if kind is nn.Embedding else kind(inner, out, bias=False)
        plain.weight = weight.astype(dtype)
        if "bias" in module:
            plain.bias = module.bias.astype(dtype)
        put_module(model, path, plain)
        done.append(path)
    model.freeze()
    return done
