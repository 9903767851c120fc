"""Safetensors files written stretch by stretch, so that a model larger than the memory can be written.

A file's header gives names, dtypes, shapes and places; all of them are known before the first value is made.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.load import INDEX

CHUNK_BYTES = 1 << 26
"""About so much of a tensor is in memory at a time."""
SINGLE = "model.safetensors"
NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}
"""safetensors' names of MLX's dtypes."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Part:
    """A tensor as its file's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: "BF16"."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Entry:
    """Tensors whose values are made together: one, or a packed matrix with its scales and biases.

    Attributes:
        parts: the tensors.
        chunks: gives (which of them, its next bytes) until all are there.
    """

    parts: tuple[Part, ...]
    chunks: Callable[[], Iterable[tuple[int, Any]]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def raw(array: mx.array) -> np.ndarray:
    """The bytes of an array as a file holds them; computes it."""
    return np.array(array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array).reshape(-1)


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError where the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, the disk has {free / 1e9:.2f} GB free; make room or choose "
            "another place"
        )


def in_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, cut into groups of at most `limit` bytes; one that is larger is alone."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if size and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_tensors(
    folder: Path, entries: list[Entry], limit: int, layout: str = "pt", told: Callable[[int], None] | None = None
) -> None:
    """Write model.safetensors, or shards and their index. `entries` is emptied on the way, so that memory is let go.

    Args:
        folder: where.
        entries: all tensors.
        limit: the most bytes of one file.
        layout: "pt" or "mlx", for the files' metadata.
        told: is given the bytes of each piece that was written.

    Raises:
        InputError: the disk has no room.
    """
    total = sum(entry.nbytes for entry in entries)
    check_space(folder, total)
    shards = in_shards(entries, limit)
    entries.clear()
    place: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        place |= {part.name: file for entry in shard for part in entry.parts}
        _write_file(folder / file, shard, layout, told or _nothing)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nothing(_bytes: int) -> None:
    """Tell nobody."""


def _write_file(path: Path, entries: list[Entry], layout: str, told: Callable[[int], None]) -> None:
    """Write one file. `entries` is emptied."""
    parts = [part for entry in entries for part in entry.parts]
    starts, end = {}, 0
    for part in sorted(parts, key=lambda p: -DTYPES[p.dtype].size):  # so that each lies on a multiple of its item
        starts[part.name] = end
        end += part.nbytes
    header: dict[str, Any] = {"__metadata__": {"format": layout}}
    for part in parts:
        at = starts[part.name]
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [at, at + part.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        while entries:
            entry = entries.pop(0)
            places = [8 + len(text) + starts[part.name] for part in entry.parts]
            ends = [at + part.nbytes for at, part in zip(places, entry.parts, strict=True)]
            for which, data in entry.chunks():
                f.seek(places[which])
                places[which] += f.write(data)
                told(memoryview(data).nbytes)
            if places != ends:
                raise RuntimeError(f"{path}: {entry.parts[0].name} came out shorter or longer than its shape")
