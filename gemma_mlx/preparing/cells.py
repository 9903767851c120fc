"""Where the media stand in a row's cells, and how they are exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_mlx.data.messages import MEDIA_TYPES, spellings
from gemma_mlx.data.values import KEYS, filled, listed

Address = tuple[str | int, ...]
"""Keys and positions from the row down to a cell: ``("messages", 0, "content", 1, "audio")``."""


def normal(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with its lists as lists, where they were JSON text, and every medium of a message in the key of its kind.

    Args:
        values: column -> cell.
        columns: column -> kind, of those that hold media.
    """
    return {
        name: listed(cell) if name in columns else _normal_messages(_messages(cell)) for name, cell in values.items()
    }


def _messages(cell: Any) -> Any:
    """A conversation, from its JSON text too; any other cell as it is."""
    found = listed(cell)
    return found if _is_conversation(found) else cell


def _is_conversation(cell: Any) -> bool:
    return (
        isinstance(cell, list | tuple)
        and bool(cell)
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in cell)
    )


def _normal_messages(cell: Any) -> Any:
    if not _is_conversation(cell):
        return cell
    found = []
    for message in cell:
        key = "content" if message.get("content") is not None else "value"
        content = message.get(key)
        if isinstance(content, list | tuple):
            message = {**message, key: [_normal_part(part) for part in content]}
        found.append(message)
    return found


def _normal_part(part: Any) -> Any:
    kind = _kind_of(part)
    if not kind:
        return part
    named = next((key for key in spellings(kind) if filled(part.get(key))), None)
    cell = part[named] if named else {key: part[key] for key in (*KEYS, "format") if filled(part.get(key))}
    return {"type": kind, kind: cell} if filled(cell) else {"type": kind}


def _kind_of(part: Any) -> str:
    """ "audio" of a part of the type "audio", "audio_url" or "input_audio"; "" of any other."""
    return MEDIA_TYPES.get(str(part.get("type"))) or "" if isinstance(part, Mapping) else ""


def media_cells(values: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[tuple[Address, str, Any]]:
    """(address, kind, cell) of every medium of a `normal` row."""
    for name, cell in values.items():
        if name in columns:
            items = enumerate(cell) if isinstance(cell, list | tuple) else [(None, cell)]
            yield from (((name,) if i is None else (name, i), columns[name], item) for i, item in items if filled(item))
        elif _is_conversation(cell):
            for i, message in enumerate(cell):
                for key in ("content", "value"):
                    parts = message.get(key)
                    for j, part in enumerate(parts if isinstance(parts, list | tuple) else ()):
                        kind = _kind_of(part)
                        if kind and filled(part.get(kind)):
                            yield (name, i, key, j, kind), kind, part[kind]


def exchanged(values: Mapping[str, Any], new: Mapping[Address, Any]) -> dict[str, Any]:
    """A row with some cells exchanged; nothing of the given one is changed."""
    return {column: _rebuilt((column,), cell, new) for column, cell in values.items()} if new else dict(values)


def _rebuilt(address: Address, node: Any, new: Mapping[Address, Any]) -> Any:
    if address in new:
        return new[address]
    if isinstance(node, dict):
        return {key: _rebuilt((*address, key), item, new) for key, item in node.items()}
    if isinstance(node, list | tuple):
        return [_rebuilt((*address, i), item, new) for i, item in enumerate(node)]
    return node
