"""What the answers of an evaluation depend on, as digests: rows with their media, prompts, base weights, adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.turns import Example, Text
from gemma_mlx.full import trained_parameters
from gemma_mlx.lora import lora_layers

SAMPLED = 64
"""Entries of a base tensor that are looked at."""


def data_digest(examples: Sequence[Example]) -> str:
    """sha256 of all texts, names and media; files by name, size and time of their last change, not by content."""
    found = hashlib.sha256()
    for example in examples:
        parts = [
            (turn.role, [part.text if isinstance(part, Text) else _medium(part.path) for part in turn.parts])
            for turn in example.turns
        ]
        found.update(json.dumps([example.row_id, example.task, parts, list(example.tools)], default=str).encode())
    return found.hexdigest()


def _medium(medium: Medium) -> list[Any]:
    if isinstance(medium, Path):
        try:
            told = medium.stat()
        except OSError:  # said when it is read
            return [medium.name]
        return [medium.name, told.st_size, told.st_mtime_ns]
    if hasattr(medium, "url"):  # asking for its size would fetch it
        return [medium.name]
    if (data := getattr(medium, "data", None)) is not None:
        return [medium.name, hashlib.sha256(data).hexdigest()]
    return [medium.name, medium.size()]


def prompts_digest(prompts: Iterable[np.ndarray]) -> str:
    """sha256 of token ids, int32 [n] each: of tokenizer, template, system prompt and media budgets at once."""
    found = hashlib.sha256()
    for ids in prompts:
        found.update(len(ids).to_bytes(4, "little") + np.ascontiguousarray(ids, np.int32).tobytes())
    return found.hexdigest()


def model_digests(model: Any) -> dict[str, str]:
    """sha256 of ``model`` (configuration, and ``SAMPLED`` entries of every base tensor) and of ``adapter`` (all that
    was trained, in full; "none" without one).

    The weights in memory count, not files: another dtype or packing is another model.
    """
    base, adapter = hashlib.sha256(repr(model.spec).encode()), hashlib.sha256()
    layers, trained = lora_layers(model), trained_parameters(model, masters=False)
    adapter.update(json.dumps({name: layer.scale for name, layer in layers.items()}, sort_keys=True).encode())
    for name, tensor in sorted(trained.items()):
        adapter.update(_told(name, tensor, tensor))
    inside = {f"{path}.linear": path for path in layers}
    plain = {}  # names as without an adapter
    for name, tensor in tree_flatten(model.parameters()):
        owner, _, leaf = name.rpartition(".")
        if name not in trained:
            plain[f"{inside.get(owner, owner)}.{leaf}"] = tensor
    for name, tensor in sorted(plain.items()):
        base.update(_told(name, tensor, _sampled(tensor)))
    return {"model": base.hexdigest(), "adapter": adapter.hexdigest() if trained else "none"}


def _sampled(tensor: mx.array) -> mx.array:
    """Entries evenly spread over a tensor."""
    flat = tensor.reshape(-1)
    return flat[mx.array(np.linspace(0, flat.size - 1, min(SAMPLED, flat.size)).astype(np.int64))]


def _told(name: str, tensor: mx.array, looked_at: mx.array) -> bytes:
    return f"{name} {tensor.shape} {tensor.dtype}".encode() + bytes(memoryview(looked_at.reshape(-1).view(mx.uint8)))
