"""What a table's cell is, whatever the format: text, plain JSON values, or a medium's bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from gemma_mlx.data.blob import Embedded, suffix_of
from gemma_mlx.errors import InputError

AUDIO = frozenset((".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac"))
IMAGE = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"))
VIDEO = frozenset((".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"))
MEDIA_KINDS = ("image", "video", "audio")
"""In the order in which a turn has them."""
MAX_TEXT_BYTES = 1 << 24
"""Of one text; the same limit as a cell of a CSV."""


def kind_of(suffix: str) -> str:
    """``audio``, ``image`` or ``video`` for a medium's suffix (``.wav``, lower case); "" for any other."""
    for kind, suffixes in (("audio", AUDIO), ("image", IMAGE), ("video", VIDEO)):
        if suffix in suffixes:
            return kind
    return ""


def names_media(column: str) -> bool:
    """Whether a column's name says that it holds media."""
    name = column.lower()
    words = name.replace("-", "_").split("_")
    return (
        any(kind in name for kind in ("audio", "image", "video"))
        or not {"img", "photo", "picture", "clip", "speech"}.isdisjoint(words)
        or any(kind_of(f".{word}") for word in words)
    )


_MAGIC = (
    (0, b"fLaC", ".flac"),
    (0, b"OggS", ".ogg"),
    (0, b"ID3", ".mp3"),
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (0, b"\x1a\x45\xdf\xa3", ".mkv"),
    (8, b"WAVE", ".wav"),
    (8, b"WEBP", ".webp"),
)
_BRANDS = {b"M4A ": ".m4a", b"M4B ": ".m4a", b"qt  ": ".mov", b"heic": ".heic", b"avif": ".avif", b"mif1": ".heic"}


def sniffed(data: bytes) -> str:
    """A medium's suffix by its first bytes: ``.wav``, ``.flac``, ``.ogg``, ``.mp3``, ``.m4a``, ``.mp4``, ``.mov``,
    ``.mkv`` (and WebM), ``.png``, ``.jpg``, ``.webp``, ``.gif``, ``.heic``, ``.avif``; "" where they tell nothing."""
    for at, magic, suffix in _MAGIC:
        if data[at : at + len(magic)] == magic and (at == 0 or data[:4] in (b"RIFF", b"RF64")):
            return suffix
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], ".mp4")
    # An MPEG audio frame: 11 bits of synchronisation, then layer III.
    return ".mp3" if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2 else ""


def embedded(data: bytes, path: str, where: str, column: str) -> Embedded:
    """A medium inside a table; its suffix is the one of `path` where that is a medium's, else what its bytes say."""
    suffix = suffix_of(path)
    return Embedded(f"{where} {column}", data, suffix if kind_of(suffix) else sniffed(data) or suffix)


def cell(value: Any, where: str, column: str) -> Any:
    """What `Row.values` holds for a value that a format gives as a Python object.

    Text stays; an absent value (None, a float that is not a number) is ""; numbers, truth values, dates and decimals
    become their shortest text, as a CSV or JSON would have them. ``{bytes, path}``, as Hugging Face datasets stores
    media, becomes a `gemma_mlx.data.blob.Embedded`, or its path where it has no bytes. Lists and dicts stay, with plain
    JSON values in them; absent fields of dicts go. Plain bytes are a medium if they look like one or the column's name
    says so, else text if they are UTF-8.

    Raises:
        InputError: a text of more than `MAX_TEXT_BYTES` characters.
    """
    if isinstance(value, str):
        if len(value) > MAX_TEXT_BYTES:
            raise InputError(f"{where}: {column!r} has {len(value)} characters; at most {MAX_TEXT_BYTES} are read")
        return value
    if value is None:
        return ""
    if isinstance(value, bytes | list | tuple | dict):
        return _nested(value, where, column)
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and math.isnan(value):
        return ""
    return str(value)


def _nested(value: Any, where: str, column: str) -> Any:
    if isinstance(value, bytes):
        return _from_bytes(value, where, column)
    if isinstance(value, dict):
        return _from_dict(value, where, column)
    if isinstance(value, list | tuple):
        return [_nested(one, where, column) for one in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return str(value)


def _from_bytes(data: bytes, where: str, column: str) -> Any:
    if sniffed(data) or names_media(column):
        return embedded(data, "", where, column)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return embedded(data, "", where, column)


def _from_dict(value: dict[Any, Any], where: str, column: str) -> Any:
    data, path = value.get("bytes"), value.get("path")
    if value.keys() <= {"bytes", "path"} and "bytes" in value and isinstance(data, bytes | None):
        if data is None:
            return {"path": path} if path else ""
        return embedded(data, path or "", where, column)
    return {str(k): _nested(v, where, column) for k, v in value.items() if v is not None}


def decoded(data: bytes, where: str) -> str:
    """UTF-8 text, a byte-order mark taken off.

    Raises:
        InputError: other encodings, NUL characters, or more than `MAX_TEXT_BYTES`.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{where}: {len(data)} bytes of text; at most {MAX_TEXT_BYTES} are read: split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 (byte {data[e.start]:#04x}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where}: contains a NUL character; remove it")
    return text


def parsed(data: bytes, where: str) -> Any:
    """The value of a JSON text; errors as for `decoded`, and for what is no JSON."""
    text = decoded(data, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({e}); correct it") from None


def label_of(value: Any, names: list[str], where: str, column: str) -> Any:
    """The name of a class; "" for an absent one (None, −1), and lists one by one.

    Raises:
        InputError: there is no such class.
    """
    if isinstance(value, list):
        return [label_of(one, names, where, column) for one in value]
    if value is None or value == -1:
        return ""
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(f"{where}: {column!r} is class {value}; the file names {len(names)} classes")
    return names[value]
