"""Columns of Arrow arrays as cells, for Parquet files and Hugging Face datasets alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_mlx.data.sources.cells import cell, label_of
from gemma_mlx.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ArrowCells:
    """Turns stored values of each column into what `Row.values` holds.

    Args:
        schema: the table's.
        features: column -> the feature that `datasets` describes it by, as JSON; classes become their names.
    """

    def __init__(self, schema: pa.Schema, features: dict[str, Any]):
        self.columns: tuple[str, ...] = tuple(schema.names)
        self._before = [_reviver(field.type) for field in schema]
        self._labels = [_class_names(features.get(name)) for name in schema.names]

    def values(self, arrays: list[pa.ChunkedArray], index: int, where: str) -> dict[str, Any]:
        """Cells of one row.

        Raises:
            InputError: text that is not UTF-8, JSON that is none, a class that has no name, an over-long text.
        """
        found = {}
        for name, array, before, labels in zip(self.columns, arrays, self._before, self._labels, strict=True):
            try:
                value = array[index].as_py()
                if before is not None:
                    value = before(value)
            except UnicodeDecodeError:
                raise InputError(f"{where}: {name!r} is not UTF-8; write the file again from text") from None
            except (ValueError, RecursionError, OverflowError) as e:
                raise InputError(f"{where}: {name!r} cannot be read ({e}); correct it") from None
            if labels is not None:
                value = label_of(value, labels, where, name)
            found[name] = cell(value, where, name)
        return found


def features_of(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` noted about the columns in a schema's metadata; empty where it did not."""
    try:
        noted = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _class_names(feature: Any) -> list[str] | None:
    while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values have bytes in them, such as media."""
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return True
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def microseconds(table: pa.Table) -> pa.Table:
    """The table with times cut to microseconds in UTC, the finest that Python's have."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_timestamp(kind):
            to = pa.timestamp("us", "UTC" if kind.tz else None)
        elif pa.types.is_time64(kind):
            to = pa.time64("us")
        elif pa.types.is_duration(kind):
            to = pa.duration("us")
        else:
            continue
        if to != kind:
            table = table.set_column(i, field.name, table.column(i).cast(to, safe=False))
    return table


def _reviver(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What is done to a value before it is a cell; None for nothing."""
    import pyarrow as pa

    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        # 0.1 rather than 0.10000000149011612.
        exact = np.float32 if pa.types.is_float32(kind) else np.float16
        return lambda value: None if value is None else float(str(exact(value)))
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_map(kind):
        return lambda value: None if value is None else dict(value)
    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: _reviver(kind.field(i).type) for i in range(kind.num_fields)}
        return _struct_reviver({name: revive for name, revive in inner.items() if revive is not None})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        revive = _reviver(kind.value_type)
        if revive is not None:
            return lambda value: None if value is None else [revive(one) for one in value]
    return None


def _struct_reviver(inner: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any] | None:
    if not inner:
        return None

    def revive(value: Any) -> Any:
        if value is None:
            return None
        return {name: inner[name](one) if name in inner else one for name, one in value.items()}

    return revive
