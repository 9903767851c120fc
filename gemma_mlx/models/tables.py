"""Embedding tables that stay in their file: of E2B's 10 GB, 4.7 are per-layer rows of which a batch reads a few.

The rows that a batch needs are read from the memory-mapped safetensors file; the values are those that the whole table
in memory would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.models.padding import host

if TYPE_CHECKING:
    from gemma_mlx.models.load import StoredTensor

DISK_BYTES = 1 << 28
"""A per-layer table at least this large stays on disk."""
TABLE = "embed_tokens_per_layer"

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}


@dataclass(frozen=True)
class TableRows:
    """Rows as they lie in the file, each once.

    Attributes:
        parts: tensor name -> [n, ...]; bfloat16 as uint16.
        index: int [...], which of the n each id has.
    """

    parts: dict[str, np.ndarray]
    index: np.ndarray


class DiskTable(nn.Module):
    """An embedding whose rows are read when they are asked for; no parameter of the model, so it cannot train.

    Args:
        stored: `weight`, and for a packed table `scales` and `biases`.
        dtype: of the rows that come out.
        group_size, bits: of a packed table.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], dtype: mx.Dtype, group_size: int = 0, bits: int = 0):
        super().__init__()
        self._stored, self._dtype, self._form = dict(stored), dtype, (group_size, bits)
        self._maps = {name: self._map(tensor) for name, tensor in self._stored.items()}

    @staticmethod
    def _map(stored: StoredTensor) -> np.ndarray:
        return np.memmap(stored.file, _NUMPY[stored.dtype], "r", stored.offset, stored.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(m.nbytes for m in self._maps.values())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and values of a row once it is unpacked."""
        rows, width = self._stored["weight"].shape
        return rows, width * 32 // self._form[1] if self._form[1] else width

    @property
    def packed(self) -> bool:
        """Whether the file holds it quantized."""
        return "scales" in self._stored

    def __call__(self, ids: Any) -> mx.array:
        """Rows [..., width] for integer ids [...] whose values are known: this cannot be traced."""
        known = host(ids)
        if known is None:
            raise RuntimeError("rows of a table on disk: ids are being traced; read the rows before, outside")
        return self._rows(known)

    def in_dtype(self, dtype: mx.Dtype) -> DiskTable:
        """The same table with rows that come out in another dtype; a packed one is unpacked in it."""
        return type(self)(self._stored, dtype, *self._form)

    def whole(self) -> mx.array:
        """All rows, in memory."""
        return self._rows(np.arange(self._stored["weight"].shape[0]))

    def read(self, ids: np.ndarray) -> TableRows:
        """The rows for ids [...], in NumPy: may be called from any thread."""
        each, index = np.unique(ids, return_inverse=True)
        return TableRows({name: m[each] for name, m in self._maps.items()}, index.reshape(ids.shape).astype(np.int32))

    def unpacked(self, read: TableRows) -> mx.array:
        """Rows [..., width] of what `read` gave."""
        parts = {name: self._typed(name, rows) for name, rows in read.parts.items()}
        rows = parts["weight"]
        if self.packed:
            rows = mx.dequantize(rows, parts["scales"], parts.get("biases"), *self._form)
        return rows[mx.array(read.index)]

    def _rows(self, ids: np.ndarray) -> mx.array:
        return self.unpacked(self.read(ids))

    def _typed(self, name: str, stored: np.ndarray) -> mx.array:
        rows, kind = mx.array(stored), self._stored[name].dtype
        rows = rows.view(mx.bfloat16) if kind == "BF16" else rows
        return rows if kind == "U32" else rows.astype(self._dtype)


class ShapeTable(DiskTable):
    """A table of which only the shape is known; all its rows are zeros."""

    @staticmethod
    def _map(stored: StoredTensor) -> np.ndarray:
        return np.broadcast_to(np.zeros((), _NUMPY[stored.dtype]), stored.shape)


def tables_on_disk(model: nn.Module) -> dict[str, DiskTable]:
    """Module path -> table, of those that were left in their file."""
    return {path: m for path, m in model.named_modules() if isinstance(m, DiskTable)}
