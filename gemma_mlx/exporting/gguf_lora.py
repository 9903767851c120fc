"""An adapter as llama.cpp loads it beside a base: a GGUF file with two matrices for each adapted one.

llama.cpp computes y = W·x + (alpha / rank) · B·(A·x), with A [rank, in] and B [out, rank], alpha the same for all. It
loads an adapter of any matrix, but its graph leaves out those that it does not multiply through its LoRA path: such are
refused here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.adapters.adapter import Adapter, LowRank, in_tower
from gemma_mlx.adapters.fitting import fit_to_base
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.gguf_converter import HINT
from gemma_mlx.exporting.options import Source
from gemma_mlx.models.gguf import PARTS

ARCHITECTURES = {
    "gemma3": "gemma3", "gemma3_text": "gemma3", "gemma3n": "gemma3n", "gemma3n_text": "gemma3n",
    "gemma4": "gemma4", "gemma4_text": "gemma4", "gemma4_unified": "gemma4", "gemma4_unified_text": "gemma4",
}  # fmt: skip
"""model_type of config.json -> llama.cpp's architecture."""
NAMES = {path: name for name, path in PARTS.items() if path.endswith("_proj")} | {
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj", "router.proj": "ffn_gate_inp",
    "laurel.linear_left": "laurel_l", "laurel.linear_right": "laurel_r",
}  # fmt: skip
"""Linears of a layer -> llama.cpp's names, of those that its graphs multiply through the LoRA path."""
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)")
_ELSE = "leave out --gguf-lora for a merged model"


def write_lora(source: Source, path: Path, model_type: str) -> list[str]:
    """Write the LoRA GGUF; returns lines for the user.

    Raises:
        InputError: there is no adapter, it does not fit the base, or llama.cpp cannot apply all of it.
    """
    if source.adapter is None:
        raise InputError("--gguf-lora: there is no adapter to write; name a run or an adapter")
    adapter = fit_to_base(read_adapter(source.adapter), source.base)
    check(adapter)
    rank = max(layer.rank for layer in adapter.layers.values())
    alpha = alpha_of(adapter)
    import_gguf()  # before anything is written
    tensors = dict(pair for name, layer in named(adapter).items() for pair in matrices(name, layer, alpha))
    _write(path, ARCHITECTURES[model_type], source, alpha, tensors)
    return [f"{path.name}: {len(adapter.layers)} layers, rank {rank}, alpha {alpha:g}"]


def check(adapter: Adapter) -> None:
    """Raise InputError for an adapter that llama.cpp has no form for, or would apply in part."""
    outside = [path for path in adapter.layers if in_tower(path)]
    if outside:
        raise InputError(
            f"--gguf-lora: {len(outside)} of {len(adapter.layers)} adapted layers are in towers ({outside[0]} first), "
            f"where llama.cpp applies no adapter; {_ELSE}, which has them in its mmproj file"
        )
    if adapter.modules:
        raise InputError(f"--gguf-lora: {adapter.modules[0]} was trained in full, which is no low-rank change; {_ELSE}")
    if adapter.dora:
        raise InputError(f"--gguf-lora: llama.cpp knows LoRA, not DoRA; {_ELSE}")
    if not adapter.layers:
        raise InputError(f"--gguf-lora: {adapter.where} adapts no layer")
    for path in adapter.layers:
        if tensor_name(path) is None:
            raise InputError(f"--gguf-lora: llama.cpp applies no adapter to {path}; {_ELSE}")


def tensor_name(path: str) -> str | None:
    """llama.cpp's name of a linear's weight; None where it applies no adapter."""
    found = _LAYER.fullmatch(path)
    part = NAMES.get(found[2]) if found else None
    return f"blk.{found[1]}.{part}.weight" if part else None


def named(adapter: Adapter) -> dict[str, LowRank]:
    """llama.cpp's tensor name -> the change of it."""
    return {str(tensor_name(path)): layer for path, layer in adapter.layers.items()}


def alpha_of(adapter: Adapter) -> float:
    """One alpha for all: the first layer's, as llama.cpp stores it (float32)."""
    layer = next(iter(adapter.layers.values()))
    return float(np.float32(layer.scale * layer.rank))


def matrices(name: str, layer: LowRank, alpha: float) -> list[tuple[str, np.ndarray]]:
    """A [rank, in] and B [out, rank], float32; B takes up what the layer's scale differs from alpha / rank."""
    a, b = (np.array(tensor.astype(mx.float32)).T for tensor in (layer.a, layer.b))
    factor = layer.scale * layer.rank / alpha if alpha else 0.0
    if abs(factor - 1) > 1e-7:
        b = (b.astype(np.float64) * factor).astype(np.float32)
    return [(f"{name}.lora_a", np.ascontiguousarray(a)), (f"{name}.lora_b", np.ascontiguousarray(b))]


def import_gguf() -> Any:
    """The package ``gguf``.

    Raises:
        InputError: it is missing.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(f"--format gguf: writing GGUF needs the package gguf: {HINT}") from None
    return gguf


def _write(path: Path, architecture: str, source: Source, alpha: float, tensors: dict[str, np.ndarray]) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(f"adapter for {Path(source.base_name).name}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
