"""Rows -> CSV, JSON lines or Parquet, streamed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError

FORMATS = ("parquet", "jsonl", "csv")
GROUP_ROWS, GROUP_BYTES = 1000, 64 << 20
"""Most rows of a row group, and the bytes of media after which it ends."""

Values = dict[str, Any]
MakeRows = Callable[[bool], Iterable[tuple[Values, str]]]
"""Gives the rows as (values, where) from the first one on, with the bytes of embedded media or None in their place; may
be called twice."""


def write_csv(path: Path, columns: list[str], rows: MakeRows) -> int:
    """Write rows as CSV; lists and objects become JSON text. Returns how many."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(columns)
        for values, where in rows(True):
            out.writerow([_cell(values.get(name), name, where) for name in columns])
            count += 1
    return count


def _cell(value: Any, name: str, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return str(value) if isinstance(value, int | float) else _json(value, name, where)


def write_jsonl(path: Path, columns: list[str], rows: MakeRows) -> int:
    """Write each row as one JSON object; absent cells are left out. Returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for values, where in rows(True):
            kept = {name: values[name] for name in columns if values.get(name) not in (None, "")}
            file.write(_json(kept, "", where) + "\n")
            count += 1
    return count


def _json(value: Any, name: str, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as e:
        column = f"{name}: " if name else ""
        raise InputError(f"{where}: {column}cannot be written as JSON ({e}); leave the column out") from None


def write_parquet(path: Path, columns: list[str], rows: MakeRows, embedded: dict[str, dict[str, Any]]) -> int:
    """Write rows as Parquet, their types found in a first pass. Returns how many.

    Args:
        path: the file.
        columns: those to write, in order.
        rows: gives the rows; cells of `embedded` columns are ``{"bytes": …, "path": …}``.
        embedded: column -> its feature as the library ``datasets`` notes it, such as ``{"_type": "Audio"}``.

    Raises:
        InputError: pyarrow is missing, or a column holds what no one type can.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("--write parquet needs pyarrow: pip install pyarrow, or use --write jsonl") from None
    held = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: held if name in embedded else pa.null() for name in columns}
    loose = [name for name in columns if name not in embedded]
    for group in _groups(rows(False)):
        for name in loose:
            types[name] = _joined(types[name], [values.get(name) for values, _ in group])
    types = {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    features = json.dumps({"info": {"features": embedded}}) if embedded else ""
    schema = pa.schema(list(types.items()), {"huggingface": features} if features else None)
    count = 0
    with pq.ParquetWriter(path, schema) as out:
        for group in _groups(rows(True)):
            arrays = [_array(name, group, types[name]) for name in columns]
            out.write_table(pa.Table.from_arrays(arrays, schema=schema))
            count += len(group)
    return count


def _groups(rows: Iterable[tuple[Values, str]]) -> Iterator[list[tuple[Values, str]]]:
    """Row groups, each of bounded size."""
    group: list[tuple[Values, str]] = []
    size = 0
    for values, where in rows:
        group.append((values, where))
        size += sum(
            len(v["bytes"]) for v in values.values() if isinstance(v, dict) and isinstance(v.get("bytes"), bytes)
        )
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _joined(known: Any, values: list[Any]) -> Any:
    """A type that holds what `known` does and these values too; text where there is no other."""
    import pyarrow as pa

    try:
        found = pa.array(values).type
        fields = [pa.schema([("x", kind)]) for kind in (known, found)]
        return pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.string()


def _array(name: str, group: list[tuple[Values, str]], kind: Any) -> Any:
    """A column of a row group; where no one type holds its values, they are JSON text, which our readers understand."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return pa.array([None if v.get(name) is None else _cell(v[name], name, where) for v, where in group], kind)
    values = [values.get(name) for values, _ in group]
    if not pa.types.is_binary(kind):
        values = [None if v == "" else v for v in values]
    return pa.array(values, kind)


def write_rows(path: Path, columns: list[str], rows: MakeRows, embedded: dict[str, dict[str, Any]]) -> int:
    """Write rows in the format of the path's suffix. Returns how many."""
    if path.suffix == ".parquet":
        return write_parquet(path, columns, rows, embedded)
    return (write_csv if path.suffix == ".csv" else write_jsonl)(path, columns, rows)
