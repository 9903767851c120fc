"""What stands in a cell, whatever format it comes from: text, JSON, one medium or several."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from gemma_mlx.data.blob import Blob, Embedded, Medium, suffix_of
from gemma_mlx.data.places import Folders, shown
from gemma_mlx.errors import InputError

MAX_INLINE = 64 << 20
"""Bytes of a medium written into a row as base64."""
MAX_DEPTH = 32
"""Levels of lists and objects inside each other (schemas and arguments of tools)."""
_SUFFIXES = {
    **{
        "audio/wav": ".wav",
        "audio/x-wav": ".wav",
        "audio/wave": ".wav",
        "audio/flac": ".flac",
        "audio/x-flac": ".flac",
    },
    **{"audio/mpeg": ".mp3", "audio/mp3": ".mp3", "audio/ogg": ".ogg", "audio/mp4": ".m4a", "audio/x-m4a": ".m4a"},
    **{"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif", "image/heic": ".heic"},
    **{"video/mp4": ".mp4", "video/webm": ".webm", "video/quicktime": ".mov"},
}


def filled(value: Any) -> bool:
    """Whether there is something in a cell: not null, no blank text, no empty list, object or bytes."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, Mapping, bytes)) and not len(value))


def kind_of(value: Any) -> str:
    """What a value of the wrong type is, for messages."""
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def text_of(value: Any, told: str) -> str:
    """Text, or a number written out.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{told} holds {kind_of(value)}; expected text")


def parsed(text: str, told: str) -> Any:
    """The value of JSON text.

    Raises:
        InputError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{told}: JSON nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except ValueError as e:
        raise InputError(f"{told} {shown(text)} is not JSON ({e}); correct it") from None


def objects_of(value: Any, told: str) -> list[Mapping[str, Any]]:
    """A list of objects, or the JSON text of one.

    Raises:
        InputError: anything else, or nested too deeply.
    """
    value = parsed(value, told) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{told} holds {kind_of(value)}; expected a list of objects")
    for i, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise InputError(f"{told}: item {i} is {kind_of(item)}; expected a list of objects")
    return list(value)


def check_depth(value: Any, told: str) -> None:
    """Refuses what is nested more than `MAX_DEPTH` levels deep."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise InputError(f"{told}: nested too deeply; at most {MAX_DEPTH} levels are read")
        level = [inner for outer in level for inner in _inside(outer)]
        depth += 1


def _inside(value: Any) -> list[Any]:
    found = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [inner for inner in found if isinstance(inner, (Mapping, list, tuple))]


def is_path(value: Any) -> bool:
    """Whether a media cell is the name of one file."""
    return isinstance(value, str) and not value.lstrip().startswith(("[", "data:"))


def first_medium(cells: Mapping[str, Any]) -> str | None:
    """The name of the cell that a row's media of one kind are read from: bytes at hand need no look-up, so they come
    before names of files."""
    return next((name for name, cell in cells.items() if not is_path(cell)), next(iter(cells), None))


def listed(value: Any) -> Any:
    """The list that a cell's text spells in JSON, or the cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # then it is the name of a file
            pass
    return value


def media_of(value: Any, folders: Folders, column: str, where: str) -> list[Medium]:
    """The media of a cell, in order: one, or a list of them, or its JSON text.

    Raises:
        InputError: as `medium_of`.
    """
    value = listed(value)
    if isinstance(value, (list, tuple)):
        return [medium_of(item, folders, column, where) for item in value if filled(item)]
    return [medium_of(value, folders, column, where)]


def medium_of(value: Any, folders: Folders, column: str, where: str) -> Medium:
    """What one value refers to.

    Args:
        value: a path or a URL; ``data:audio/wav;base64,…``; bytes; a `Blob`; or an object that holds one of these,
            such as ``{"bytes": …, "path": …}``, ``{"url": …}``, ``{"data": base64, "format": "wav"}``.
        folders: where media are.
        column: the value's name, for messages.
        where: ``train.csv:8``, for messages.

    Raises:
        InputError: anything else, a medium that is not there or outside, or broken base64.
    """
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return _inline(value, column, where)
        return folders.find(value.strip(), column, where)
    if isinstance(value, (bytes, bytearray)):
        return Embedded(f"{where} {column}", bytes(value))
    if isinstance(value, Mapping):
        return _held(value, folders, column, where)
    if isinstance(value, Blob):
        return value
    raise InputError(f"{where}: {column} holds {kind_of(value)}; expected a path, a URL or the bytes of a file")


KEYS = ("bytes", "base64", "data", "path", "url")
"""What an object may hold its medium by."""


def _held(value: Mapping[str, Any], folders: Folders, column: str, where: str) -> Medium:
    """The medium of an object."""
    given = {key: value[key] for key in KEYS if filled(value.get(key))}
    path = given.get("path")
    form = str(value.get("format") or "").lower()
    suffix = suffix_of(path) if isinstance(path, str) else f".{form}" if form.isalnum() else ""
    held = given.get("bytes")
    if isinstance(held, (bytes, bytearray)):
        return Embedded(f"{where} {column}", bytes(held), suffix)
    if isinstance(held, Blob):
        return held
    for key in ("base64", "data"):
        if isinstance(text := given.get(key), str):
            if text[:5].lower() == "data:":
                return _inline(text, column, where)
            return Embedded(f"{where} {column}", _decoded(text, f"{where}: {column}"), suffix)
    if len(given) == 1 and not isinstance(inner := next(iter(given.values())), Mapping):
        return medium_of(inner, folders, column, where)
    if len(given) > 1:
        raise InputError(f"{where}: {column} names its file twice ({', '.join(given)}); leave one")
    hint = "; store the files' bytes, not decoded samples" if "array" in value else ""
    raise InputError(f"{where}: {column} has none of {', '.join(KEYS)}{hint}; found {', '.join(map(str, value))[:200]}")


def _inline(url: str, column: str, where: str) -> Embedded:
    """The bytes of a data: URL."""
    told = f"{where}: {column}"
    head, comma, text = url.partition(",")
    kind, *options = head[5:].lower().split(";")
    if not comma or "base64" not in map(str.strip, options):
        raise InputError(f"{told} {shown(url)}: expected data:TYPE;base64,BYTES")
    return Embedded(f"{where} {column}", _decoded(text, told), _SUFFIXES.get(kind.strip(), ""))


def _decoded(text: str, told: str) -> bytes:
    if len(text) > MAX_INLINE // 3 * 4 + 4:
        raise InputError(
            f"{told}: {len(text) >> 20} MiB of base64; at most {MAX_INLINE >> 20} MiB of bytes may stand in a row: "
            "write them to a file and give its path"
        )
    try:
        found = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as e:
        raise InputError(f"{told} {shown(text)} is not base64 ({e}); write the file's bytes again") from None
    if not found:
        raise InputError(f"{told}: base64 of nothing; write the file's bytes again")
    return found
