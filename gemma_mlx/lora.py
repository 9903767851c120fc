"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): which layers get them, and their files.

A frozen linear W gets two small matrices: y = W·x + (alpha / rank) · (dropout(x) · A) · B. Names and orientation are
mlx-lm's: ``lora_a`` [in, rank] and ``lora_b`` [rank, out], the transposes of PEFT's ``lora_A.weight`` and
``lora_B.weight``. The layer that is replaced is the linear itself: where a tower wraps a linear in clip bounds
(Gemma 4's ``Gemma4ClippableLinear``), that is the inner ``.linear``, so the adapter lies inside the clips, as PEFT
puts it.

The linear may be quantized (``nn.QuantizedLinear``; Dettmers et al. 2023, arXiv:2305.14314). DoRA (Liu et al. 2024,
arXiv:2402.09353) also learns the length of each row of the adapted weight.

The adapter's weights are float32 whatever the base is (AdamW's small steps vanish in bfloat16's 8 bits); they are
cast to the input's dtype where they are used.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.errors import InputError
from gemma_mlx.models.quantize import module_at, put_module

ADAPTER_WEIGHTS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FORMAT = 1
"""Version of our part of ``adapter_config.json``, under the key ``gemma_mlx``."""

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS: dict[str, tuple[str, ...]] = {
    "decoder": ("language_model",),
    "vision": ("vision_tower",),
    "audio": ("audio_tower",),
    "embedders": ("embed_vision", "embed_audio"),
}
"""Group -> the module names that hold it. ``decoder`` means its attention and MLP linears (``DECODER_LINEARS``); the
per-layer-embedding linears can be named one by one. ``all`` is the four groups together."""


Linear = nn.Linear | nn.QuantizedLinear


class LoRALinear(nn.Module):
    """A frozen linear with a trainable low-rank side path; x [..., in] -> [..., out] in x's dtype.

    ``linear`` stays the same object, so its weights stay bit-equal. ``scale`` is alpha / rank.
    """

    TENSORS: tuple[str, ...] = ("lora_a", "lora_b")
    """Names of the trainable arrays."""

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float = 0.0, key: mx.array | None = None):
        super().__init__()
        out, inner = linear_shape(linear)
        bound = 1.0 / math.sqrt(inner)  # kaiming_uniform(a=√5), PEFT's choice, is U(−1/√in, 1/√in)
        self.linear = linear
        self.scale = alpha / rank
        self.dropout = dropout
        self.lora_a = mx.random.uniform(-bound, bound, (inner, rank), dtype=mx.float32, key=key)
        self.lora_b = mx.zeros((rank, out), dtype=mx.float32)
        self._dropout_key: mx.array | None = None  # set for one training forward; None means no dropout

    @property
    def weight(self) -> mx.array:
        """The base's weight [out, in], dequantized where it is quantized."""
        return float_weight(self.linear)

    def _low_rank(self, x: mx.array) -> mx.array:
        low = _dropout(x, self.dropout, self._dropout_key) @ self.lora_a.astype(x.dtype)
        return (self.scale * low) @ self.lora_b.astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._low_rank(x)


class DoRALinear(LoRALinear):
    """LoRA whose sum with the base is brought to a trained length, row by row: m · (W + ΔW) / ‖W + ΔW‖.

    ``m`` [out] starts as the lengths of W's rows, so that the layer computes what it did before. The norm counts as a
    constant in the gradient (section 4.3 of the paper; PEFT and mlx-lm do so too).
    """

    TENSORS = ("lora_a", "lora_b", "m")

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float = 0.0, key: mx.array | None = None):
        super().__init__(linear, rank, alpha, dropout, key)
        self.m = mx.linalg.norm(self.weight.astype(mx.float32), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        change = self.scale * (self.lora_a @ self.lora_b).T
        length = mx.linalg.norm(self.weight.astype(mx.float32) + change, axis=1)
        stretch = self.m / mx.stop_gradient(length)
        out = self.linear(x) + self._low_rank(x)
        bias = self.linear.get("bias")
        if bias is None:
            return out * stretch.astype(x.dtype)
        return (out - bias) * stretch.astype(x.dtype) + bias


def linear_shape(linear: Linear) -> tuple[int, int]:
    """(out, in) of a linear, quantized or not."""
    out, inner = linear.weight.shape
    return (out, inner * 32 // linear.bits) if isinstance(linear, nn.QuantizedLinear) else (out, inner)


def float_weight(linear: Linear) -> mx.array:
    """The weight [out, in] that a linear multiplies with."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, linear.mode
    )


def _dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    if key is None or rate == 0.0:
        return x
    keep = mx.random.bernoulli(1.0 - rate, x.shape, key=key)
    return mx.where(keep, x * (1.0 / (1.0 - rate)), mx.zeros((), x.dtype))


@contextmanager
def dropout_keys(layers: list[LoRALinear], key: mx.array | None) -> Iterator[None]:
    """Give every layer its own dropout key, derived from ``key`` alone, for the forward inside the block.

    Keys are values, not hidden state: a compiled step takes ``key`` as an argument, and a resumed run draws the same
    masks because the key follows from the seed and the step.
    """
    keys = None if key is None else mx.random.split(key, max(len(layers), 1))
    for i, layer in enumerate(layers):
        layer._dropout_key = None if keys is None else keys[i]
    try:
        yield
    finally:
        for layer in layers:
            layer._dropout_key = None


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.split(".")]


def _ends_with(path: list[str], suffix: list[str]) -> bool:
    return len(suffix) <= len(path) and path[len(path) - len(suffix) :] == suffix


def _group_of(path: list[str]) -> str | None:
    found = next((name for name, roots in GROUPS.items() if any(root in path for root in roots)), None)
    return found or ("decoder" if "layers" in path else None)  # a model without towers is a decoder


def linear_paths(model: nn.Module) -> list[str]:
    """Dotted path of every linear layer (with or without an adapter), in natural order."""
    found = {p for p, m in model.named_modules() if isinstance(m, Linear | LoRALinear)}
    inside = {p for p in found if p.endswith(".linear") and p[: -len(".linear")] in found}  # a LoRALinear's own base
    return sorted(found - inside, key=_natural)


def _without_clip(path: str) -> list[str]:
    """Path as the user names it: a clipped linear's inner ``.linear`` is left out."""
    parts = path.split(".")
    return parts[:-1] if parts[-1] == "linear" and len(parts) > 1 else parts


def _matches(path: str, target: str) -> bool:
    """True if the group or module name ``target`` chooses ``path``.

    A target is a group (``audio``), the end of a path (``q_proj``, ``self_attn.q_proj``, a whole path), or a group
    and such an end (``audio.q_proj``).
    """
    parts, wanted = _without_clip(path), target.split(".")
    group = _group_of(parts)
    if wanted[0] == "all" or wanted[0] in GROUPS:
        if group is None or wanted[0] not in ("all", group):
            return False
        if len(wanted) == 1:
            return group != "decoder" or parts[-1] in DECODER_LINEARS
        wanted = wanted[1:]
    return _ends_with(parts, wanted) or _ends_with(path.split("."), wanted)


def _unknown(target: str, paths: list[str]) -> InputError:
    names = sorted({_without_clip(p)[-1] for p in paths})
    present = {_group_of(_without_clip(p)) for p in paths}
    known = [*(g for g in GROUPS if g in present), "all", *names]
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
    return InputError(f"targets: {target!r} names no linear layer of this model; {hint}")


def resolve_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Paths of the linears that ``targets`` (names or groups, a list or comma separated) choose, in natural order.

    Raises InputError for a target that chooses nothing, with the closest names.
    """
    wanted = targets.split(",") if isinstance(targets, str) else list(targets)
    wanted = [t.strip() for t in wanted if t.strip()]
    if not wanted:
        raise InputError(f"targets: no layers named; known groups: {', '.join([*GROUPS, 'all'])}")
    paths = linear_paths(model)
    chosen: set[str] = set()
    for target in wanted:
        matched = [p for p in paths if _matches(p, target)]
        if not matched:
            raise _unknown(target, paths)
        chosen.update(matched)
    return sorted(chosen, key=_natural)


def apply_lora(
    model: nn.Module, targets: str | Iterable[str] = "decoder", rank: int = 16, alpha: float | None = None,
    dropout: float = 0.0, seed: int = 0, dora: bool = False,
) -> list[str]:  # fmt: skip
    """Freeze ``model`` and put adapters on the chosen linears, in place; returns their paths in natural order.

    ``alpha`` defaults to ``rank`` (scale 1). A is drawn from ``seed`` alone, B is zero, so the model computes what it
    did before. With ``dora`` they are ``DoRALinear``. Raises InputError for unknown targets and for a layer that
    already has an adapter.
    """
    paths = resolve_targets(model, targets)
    taken = lora_layers(model)
    if clash := next((p for p in paths if p in taken), None):
        raise InputError(f"{clash}: this layer already has an adapter; load the base model again")
    keys = mx.random.split(mx.random.key(seed), len(paths))
    model.freeze()
    for path, key in zip(paths, keys, strict=True):
        linear = module_at(model, path)
        layer = (DoRALinear if dora else LoRALinear)(linear, rank, rank if alpha is None else alpha, dropout, key)
        put_module(model, path, layer)
    freeze_base(model)
    return paths


def freeze_base(model: nn.Module) -> None:
    """Make the adapters' weights the only trainable parameters."""
    model.freeze()
    for layer in lora_layers(model).values():
        layer.unfreeze(recurse=False, keys=list(layer.TENSORS))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> adapter layer, in natural order."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {p: found[p] for p in sorted(found, key=_natural)}


def lora_weights(model: nn.Module) -> dict[str, tuple[mx.array, mx.array]]:
    """Path -> (A [in, rank], B [rank, out]), float32. PEFT's ``lora_A.weight`` is A transposed, ``lora_B.weight`` B
    transposed; ``path`` is the name of the wrapped linear as in transformers."""
    return {path: (layer.lora_a, layer.lora_b) for path, layer in lora_layers(model).items()}


def lora_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Tensor name -> weight, as the adapter file names them: ``<path>.lora_a``, ``<path>.lora_b``; DoRA's ``.m``."""
    return {f"{path}.{name}": layer[name] for path, layer in lora_layers(model).items() for name in layer.TENSORS}


def set_lora_parameters(model: nn.Module, weights: dict[str, mx.array], where: str = "adapter") -> None:
    """Write adapter tensors into the model's adapter layers, cast to float32.

    Raises InputError for a missing, an extra or a misshapen tensor; then nothing has been written.
    """
    current = lora_parameters(model)
    if missing := sorted(current.keys() - weights.keys(), key=_natural):
        raise InputError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(weights.keys() - current.keys(), key=_natural):
        raise InputError(f"{where}: tensor {extra[0]} belongs to no adapter layer of this model ({len(extra)} in all)")
    for name, value in weights.items():
        if value.shape != current[name].shape:
            raise InputError(f"{where}: tensor {name} has shape {value.shape}, the model needs {current[name].shape}")
    for path, layer in lora_layers(model).items():
        for name in layer.TENSORS:
            layer[name] = weights[f"{path}.{name}"].astype(mx.float32)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_model: str | None = None,
    targets: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: dict[str, mx.array] | None = None,
) -> Path:
    """Write the adapter in mlx-lm's layout (``adapters.safetensors``, ``adapter_config.json``); returns the folder.

    Each file is replaced whole. Beside mlx-lm's fields the config holds, under ``gemma_mlx``, the format version, the
    base model's name, the targets as given, alpha, and ``options``: what the adapter must be used with again. Modules
    that train in full are listed under PEFT's key ``modules_to_save``; their weights lie under their own names, in
    MLX's layouts. ``weights``: all trained tensors, where they are more exact than what the model holds.
    """
    from gemma_mlx.adapters.writing import own_config, write_files
    from gemma_mlx.full import full_modules, trained_parameters

    layers, modules = lora_layers(model), full_modules(model)
    if not layers and not modules:
        raise InputError("this model has no adapter to save")
    own = {"format": ADAPTER_FORMAT, "base_model": base_model, "targets": targets, "options": dict(options or {})}
    first = next(iter(layers.values()), None)
    config = own_config(
        {path: layer.lora_a.shape[1] for path, layer in layers.items()},
        {path: layer.scale for path, layer in layers.items()},
        0.0 if first is None else first.dropout, isinstance(first, DoRALinear), modules, own,
    )  # fmt: skip
    folder = Path(folder)
    write_files(folder, trained_parameters(model) if weights is None else weights, config)
    return folder


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """An adapter's rank, scale, dropout, keys (its layers), dora, modules (trained in full) and raw (the file).

    Rank and scale are those of its first layer. Raises InputError if the folder holds no adapter that can be read.
    """
    from gemma_mlx.adapters.reading import read_adapter

    read = read_adapter(folder)
    first = next(iter(read.layers.values()), None)
    return {
        "rank": 1 if first is None else first.rank, "scale": 1.0 if first is None else first.scale,
        "dropout": read.dropout, "keys": list(read.layers), "dora": read.dora, "modules": list(read.modules),
        "raw": dict(read.config),
    }  # fmt: skip


def remembered_options(
    folder: str | Path | Sequence[str | Path] | None, given: Iterable[str] = (), names: Iterable[str] | None = None
) -> dict[str, Any]:  # fmt: skip
    """The options an adapter was trained with and must be used with (prompts, audio window, ...); {} for None.

    Of several adapters those of all; ``names``: of these options alone. Raises InputError where they do not agree on
    an option that is not among those ``given`` anew.
    """
    from gemma_mlx.adapters.reading import read_adapter

    found: dict[str, Any] = {}
    for name in [] if folder is None else [folder] if isinstance(folder, str | Path) else folder:
        for option, value in read_adapter(name).options.items():
            if names is not None and option not in names:
                continue
            if found.setdefault(option, value) != value and option not in given:
                raise InputError(
                    f"{name}: trained with {option} {value!r}, another adapter with {found[option]!r}; say which "
                    f"(--{option.replace('_', '-')})"
                )
    return found


def load_adapter(model: nn.Module, folder: str | Path | Sequence[str | Path]) -> list[str]:
    """Put the adapter of ``folder`` on a base model, in place; returns the paths with an adapter.

    Any layout that ``gemma_mlx.adapters.reading`` knows. Modules that were trained in full get their weights, in the
    dtype that they have.

    Raises InputError, before anything changes, if a layer that it names does not exist or has other shapes, or if
    tensors are missing or left over.
    """
    from gemma_mlx.adapters.attach import attach

    return attach(model, folder)
