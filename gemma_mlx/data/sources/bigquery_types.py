"""BigQuery's Arrow types -> what a snapshot holds: times, dates and NUMERICs become text."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from gemma_mlx.errors import InputError


def text_schema(schema: Any, name: str) -> Any:
    """The snapshot's Arrow schema for a session's.

    Raises:
        InputError: a column of a type that has no text form here (INTERVAL).
    """
    import pyarrow as pa

    def changed(kind: Any, column: str) -> Any:
        types = pa.types
        if types.is_struct(kind):
            return pa.struct([kind.field(i).with_type(changed(kind.field(i).type, column)) for i in range(len(kind))])
        if types.is_list(kind):
            return pa.list_(kind.value_field.with_type(changed(kind.value_type, column)))
        if (types.is_temporal(kind) and not types.is_interval(kind)) or types.is_decimal(kind):
            return pa.string()
        plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        if plain or types.is_string(kind) or types.is_binary(kind):
            return kind
        raise InputError(
            f"{name}: column {column!r} has the type {kind}, which cannot be kept; read it as text with a query: "
            f"SELECT CAST({column} AS STRING) ..."
        )

    return pa.schema([pa.field(field.name, changed(field.type, field.name)) for field in schema])


def as_text(batch: Any, schema: Any) -> Any:
    """A record batch in the snapshot's schema."""
    import pyarrow as pa

    columns = [_column(array, field.type) for array, field in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(array: Any, kind: Any) -> Any:
    import pyarrow as pa

    if array.type == kind:
        return array
    if "decimal" not in str(array.type):
        return array.cast(kind)
    # Arrow writes 0.000000001 as 1E-9, and every NUMERIC with all its zeros.
    kept = array.cast(_with_decimals(array.type, kind))
    return pa.array([_plain(value) for value in kept.to_pylist()], kind)


def _with_decimals(given: Any, kind: Any) -> Any:
    """`kind` with the decimals of `given` left as they are."""
    import pyarrow as pa

    if pa.types.is_struct(given):
        fields = [
            given.field(i).with_type(_with_decimals(given.field(i).type, kind.field(i).type)) for i in range(len(given))
        ]
        return pa.struct(fields)
    if pa.types.is_list(given):
        return pa.list_(given.value_field.with_type(_with_decimals(given.value_type, kind.value_type)))
    return given if pa.types.is_decimal(given) else kind


def _plain(value: Any) -> Any:
    """NUMERICs inside a cell as BigQuery writes them: no exponent, no zeros at the end."""
    if isinstance(value, Decimal):
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
