"""An adapter in the files of mlx-lm and mlx-vlm: ``adapters.safetensors`` and ``adapter_config.json``.

Both name layers by their paths in their own modules, and have one rank and one scale for all layers. Layers of a lower
rank get columns of zeros, and B takes the difference of scales, so that every product is the same. Layers are named by
their whole paths: neither program then looks into its last ``num_layers`` blocks.

mlx-lm has the decoder alone. What lies in towers goes into a folder of its own, ``mlx-vlm/``, with the decoder's part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters.adapter import Adapter, LowRank, in_tower
from gemma_mlx.adapters.combine import of_rank
from gemma_mlx.adapters.fitting import fit_to_base
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.adapters.writing import low_rank_tensors, write_files
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.models.load import DTYPES
from gemma_mlx.models.names import stored_name
from gemma_mlx.spec import read_spec

VLM = "mlx-vlm"
"""Folder of the files that mlx-vlm alone can read."""
_DECODER = "model.language_model."
_COEFFICIENTS = ("prediction_coefs", "correction_coefs")
"""Linears of Gemma 3n whose weights mlx-lm and mlx-vlm clip in place, so that nothing can be put on them."""


def write(source: Source, folder: Path, options: ExportOptions) -> list[str]:
    """Write the adapter into an empty folder.

    Returns:
        Lines for the user.

    Raises:
        InputError: there is no adapter, it does not fit the base, or neither program has a form for it.
    """
    if source.adapter is None:
        raise InputError("format mlx: there is no adapter to write; name a run or an adapter")
    adapter = fit_to_base(read_adapter(source.adapter), source.base)
    _refuse(adapter)
    adapter, lines = of_rank(adapter, options.adapter_rank)
    spec, dtype = read_spec(source.base), DTYPES.get(options.dtype or "")
    kind = spec.config["model_type"]
    decoder = adapter.only(lambda path: not in_tower(path))
    towers = len(adapter.layers) + len(adapter.modules) - len(decoder.layers) - len(decoder.modules)
    if decoder.layers or decoder.modules:
        write_one(decoder, lm_names(kind), folder, dtype, source.shown_name)
        lines.append(f"{len(decoder.layers) + len(decoder.modules)} layers of the decoder, for mlx-lm")
    if kind != "gemma3_text" and adapter.layers and (towers or kind == "gemma3n"):
        write_one(adapter, vlm_names(spec.unified), folder / VLM, dtype, source.shown_name)
        lines.append(f"all {len(adapter.layers)} layers, for mlx-vlm, in its folder {VLM}/")
    if towers:
        lines.append(f"mlx-lm has no towers: the {towers} layers there are in the files for mlx-vlm alone")
    return [*lines, *_notes(adapter, source)]


def _refuse(adapter: Adapter) -> None:
    """Raise InputError for what neither program can apply."""
    if adapter.layers and adapter.modules:
        raise InputError(
            f"format mlx: {adapter.modules[0]} was trained in full, other layers have low-rank weights; mlx-lm reads "
            "one kind or the other; use --format hf"
        )
    if tower := next((path for path in adapter.modules if in_tower(path)), None):
        raise InputError(f"format mlx: {tower} was trained in full, and mlx-lm has no towers; use --format hf")
    if len({layer.m is None for layer in adapter.layers.values()}) > 1:
        raise InputError("format mlx: some layers have DoRA and some do not; mlx-lm has one kind for all")
    if stuck := next((path for path in adapter.layers if path.rpartition(".")[2] in _COEFFICIENTS), None):
        raise InputError(f"format mlx: {stuck}: mlx-lm clips this linear's weight itself; use --format hf")
    if experts := next((name for name in adapter.full if ".experts." in name), None):
        raise InputError(f"format mlx: {experts}: mlx-lm holds experts in other stacks; use --format hf")


def lm_names(kind: str) -> Callable[[str], str]:
    """How mlx-lm's model of this `model_type` names a path of the decoder: Gemma 4's wraps a text model with a head."""
    if kind.startswith("gemma4"):
        return lambda path: path.replace(_DECODER, "language_model.model.", 1)
    return lambda path: path


def vlm_names(unified: bool) -> Callable[[str], str]:
    """How mlx-vlm names a path: the decoder is wrapped, the other parts lie at the top under their names in files."""

    def name(path: str) -> str:
        if path.startswith(_DECODER):
            return path.replace(_DECODER, "language_model.model.", 1)
        return stored_name(f"{path}.", unified)[:-1].removeprefix("model.")  # names of tensors are what it knows

    return name


def write_one(
    adapter: Adapter, name: Callable[[str], str], folder: Path, dtype: mx.Dtype | None, base: str
) -> None:  # fmt: skip
    """Write an adapter's two files under the names that `name` makes."""
    config: dict[str, Any] = {"fine_tune_type": "full", "num_layers": -1, "model": base}
    tensors = {name(path): tensor for path, tensor in adapter.full.items()}
    if adapter.layers:
        layers, scale = uniform(adapter.layers)
        rank = next(iter(layers.values())).rank
        config["fine_tune_type"] = "dora" if adapter.dora else "lora"
        config["lora_parameters"] = {
            "rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": [name(path) for path in layers],
        }  # fmt: skip
        tensors |= low_rank_tensors(layers, name)
    write_files(folder, {n: mx.contiguous(t if dtype is None else t.astype(dtype)) for n, t in tensors.items()}, config)


def uniform(layers: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], float]:
    """(the same changes with one rank and one scale, that scale): zeros beside A and below B, B times the quotient."""
    rank = max(layer.rank for layer in layers.values())
    scales = Counter(layer.scale for layer in layers.values() if layer.scale)
    scale = scales.most_common(1)[0][0] if scales else 0.0
    return {path: _brought_to(layer, rank, scale) for path, layer in layers.items()}, scale


def _brought_to(layer: LowRank, rank: int, scale: float) -> LowRank:
    a, b, more = layer.a, layer.b, rank - layer.rank
    if more:
        a, b = mx.pad(a, [(0, 0), (0, more)]), mx.pad(b, [(0, more), (0, 0)])
    if layer.scale != scale:
        b = b.astype(mx.float32) * (layer.scale / scale)
    return replace(layer, a=a, b=b, scale=scale)


def _notes(adapter: Adapter, source: Source) -> list[str]:
    lines = []
    if len({(layer.rank, layer.scale) for layer in adapter.layers.values()}) > 1:
        lines.append("ranks or scales differ between layers: brought to one, with zeros and within B; equal products")
    if bits := source.remembered.get("quantize"):
        lines.append(f"trained on a base of {bits} bits; use it with one of {bits} bits (--format hf --bits {bits})")
    return lines
