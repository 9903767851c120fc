"""A merged model packed again, in the layout of MLX's conversions: mlx-lm, mlx-vlm and `load_model` read it.

What is packed is what `gemma_mlx.models.quantize` packs on a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.exporting.tensors import Entry, Part, raw
from gemma_mlx.exporting.tree import Rows, Tree, rounded, rows_of, stretches, unread
from gemma_mlx.models.families import build
from gemma_mlx.models.quantize import GROUP, group_of, quantizable
from gemma_mlx.models.stacks import GATE, GATE_UP, UP

_LEAVES = ("weight", "scales", "biases")


def mlx_name(path: str, model_type: str) -> str:
    """The name that MLX's conversions have for a module path (mlx-lm's Gemma 3n and Gemma 3 keep transformers')."""
    if model_type in ("gemma3n", "gemma3_text"):
        return path
    name = path.removeprefix("model.")
    if name.startswith("language_model."):
        name = "language_model.model." + name.removeprefix("language_model.")
    return name.replace(".experts.", ".experts.switch_glu.")


def packed_entries(tree: Tree, bits: int, dtype: str | None) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors of the packed tree, and what config.json says of it.

    Args:
        tree: the model.
        bits: 4, 6 or 8.
        dtype: of all that is not packed, and of scales; None for the base's own.

    Raises:
        InputError: other bits.
    """
    spec = tree.model.spec
    packed = {path: group_of(module.weight.shape[-1]) for path, module in quantizable(build(spec), bits)}
    held = [(path, shape, rows_of(tree.model, path)) for path, shape in tree.shapes.items()]
    for path, shape, rows in unread(tree):  # mlx-lm's Gemma 3n has places for them
        held.append((path, shape, rows))
        if len(shape) > 1 and shape[-1] % 32 == 0:
            packed[path.removesuffix(".weight")] = group_of(shape[-1])
    entries: list[Entry] = []
    overrides: dict[str, Any] = {}
    for path, shape, values in held:
        target, owner = dtype or tree.dtype_of(path), path.removesuffix(".weight")
        for name, inner, rows in _halves(path, shape, values):
            named = mlx_name(name, spec.config["model_type"])
            if owner not in packed and path not in packed:
                entries.append(Entry((Part(named, inner, target),), partial(_plain, rows, inner, target, named)))
                continue
            group = packed[owner] if owner in packed else packed[path]
            module = named.removesuffix(".weight")
            if group != GROUP:
                overrides[module] = {"group_size": group, "bits": bits}
            entries.append(_packed(module, inner, rows, target, group, bits))
    settings = {"group_size": GROUP, "bits": bits, "mode": "affine", **overrides}
    return entries, {"quantization": settings, "quantization_config": settings}


def _halves(path: str, shape: tuple[int, ...], rows: Rows) -> list[tuple[str, tuple[int, ...], Rows]]:
    """A parameter as MLX has it: experts' gate and up apart, stacks as modules with a weight."""
    owner, _, leaf = path.rpartition(".")
    if not owner.endswith(".experts"):
        return [(path, shape, rows)]
    if leaf != GATE_UP:
        return [(f"{path}.weight", shape, rows)]
    n, both, inner = shape
    half = both // 2

    def part(start: int, stretch: slice) -> mx.array:
        return rows(stretch)[:, start : start + half]

    return [
        (f"{owner}.{name}.weight", (n, half, inner), partial(part, start)) for name, start in ((GATE, 0), (UP, half))
    ]


def _plain(rows: Rows, shape: tuple[int, ...], target: str, name: str) -> Iterator[tuple[int, np.ndarray]]:
    for stretch in stretches(shape):
        yield 0, raw(rounded(rows(stretch), target, None, name))


def _packed(module: str, shape: tuple[int, ...], rows: Rows, target: str, group: int, bits: int) -> Entry:
    *outer, inner = shape
    shapes = ((*outer, inner * bits // 32), (*outer, inner // group), (*outer, inner // group))
    dtypes = ("U32", target, target)
    parts = tuple(
        Part(f"{module}.{leaf}", tuple(size), kind) for leaf, size, kind in zip(_LEAVES, shapes, dtypes, strict=True)
    )

    def chunks() -> Iterator[tuple[int, np.ndarray]]:
        for stretch in stretches(shape):
            values = rounded(rows(stretch), target, None, module)
            for i, array in enumerate(mx.quantize(values, group, bits)):
                yield i, raw(array)

    return Entry(parts, chunks)
