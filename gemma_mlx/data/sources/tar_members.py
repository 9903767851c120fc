"""Where the members of a tar archive lie, read from its headers alone: ustar, pax and GNU long names."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from gemma_mlx.errors import InputError

BLOCK = 512
_END_BYTES = 1 << 16
"""How far behind the end mark more members are looked for."""
_MOST_NAME = 1 << 16
"""Bytes of an extended header."""
_RECORD = re.compile(rb"(\d{1,6}) ([^=\n]+)=")
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"PK\x03\x04", "zip", "unzip"),
)
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a part of a file that goes on in another archive",
}


@dataclass(slots=True)
class _Next:
    """What extended headers said about the member that follows."""

    name: bytes | None = None
    size: int | None = None


def members(file: BinaryIO, name: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset, bytes) of each regular member, in order; folders are left out. Nothing is unpacked.

    Raises:
        InputError: no tar archive, a packed one, a truncated one or one without end mark, a damaged header, sizes
            beyond the file; members that are links, devices or sparse; paths that are absolute, have ``..`` or NUL in
            them or are not UTF-8.
    """
    handle = file.fileno()
    total, at, following = os.fstat(handle).st_size, 0, _Next()
    while True:
        header = os.pread(handle, BLOCK, at)
        if at == 0:
            _check_first(header, name)
        if len(header) < BLOCK:
            raise InputError(f"{name}: truncated: the archive has no end mark; download or write it again")
        if not header.strip(b"\0"):
            return _check_end(os.pread(handle, _END_BYTES, at), name)
        if not _sums_up(header):
            what = "not a tar archive" if at == 0 else f"damaged: no header at byte {at}"
            raise InputError(f"{name}: {what}; give a WebDataset shard, or download it again")
        kind, start = header[156:157], at + BLOCK
        extends = kind in b"xgLK"
        size = _number(header[124:136], name, at) if extends or following.size is None else following.size
        if start + size > total:
            raise InputError(
                f"{name}: truncated or damaged: the header at byte {at} says {size} bytes, the file has "
                f"{total - start} more; download it again"
            )
        at = start + -(-size // BLOCK) * BLOCK
        if extends:
            _extend(following, kind, size, os.pread(handle, min(size, _MOST_NAME + 1), start), name)
            continue
        path = _path(header, following, name)
        following = _Next()
        if kind in _REFUSED:
            raise InputError(f"{name}: member {path!r} is {_REFUSED[kind]}; write the archive with plain files alone")
        if kind in (b"0", b"\0", b"7") and not path.endswith("/"):
            yield path, start, size
        elif kind not in (b"5", b"0", b"\0"):
            raise InputError(f"{name}: member {path!r} is of an unknown kind ({kind!r}); write plain files alone")


def _check_first(header: bytes, name: str) -> None:
    for magic, kind, tool in _PACKED:
        if header.startswith(magic):
            raise InputError(
                f"{name}: packed by {kind}; a tar archive is read in any order, so unpack it first ({tool} FILE)"
            )
    if len(header) < BLOCK:
        raise InputError(f"{name}: not a tar archive: {len(header)} bytes; give a WebDataset shard")


def _check_end(rest: bytes, name: str) -> None:
    if rest.strip(b"\0"):
        raise InputError(
            f"{name}: more data behind the archive's end mark, as where archives are joined; give them one by one"
        )


def _sums_up(header: bytes) -> bool:
    digits = header[148:156].strip(b"\0 ")
    if not digits.isdigit() or digits.strip(b"01234567"):
        return False
    told, rest = int(digits, 8), header[:148] + b" " * 8 + header[156:]
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65,521: exact for half a block, and fast.
    total = sum((zlib.adler32(half) & 0xFFFF) - 1 for half in (rest[: BLOCK // 2], rest[BLOCK // 2 :]))
    # Old writers summed signed bytes.
    return told == total or told == total - 256 * sum(byte > 127 for byte in rest)


def _number(digits: bytes, name: str, at: int) -> int:
    """A size: octal digits, or big-endian bytes behind a set bit."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b"\0 ")
    if text.strip(b"01234567"):
        raise InputError(f"{name}: damaged: no size in the header at byte {at}; download it again")
    return int(text or b"0", 8)


def _extend(following: _Next, kind: bytes, size: int, data: bytes, name: str) -> None:
    """Notes a long name or pax records for the member that follows."""
    if size > _MOST_NAME:
        raise InputError(f"{name}: a name or extended header of {size} bytes; at most {_MOST_NAME} are read")
    if kind == b"L":
        following.name = data.rstrip(b"\0")
    if kind not in b"xg":
        return
    records = _records(data, name)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise InputError(f"{name}: a member is a sparse file; write the archive with plain files alone")
    if kind == b"g" and not records.keys().isdisjoint((b"path", b"size")):
        raise InputError(f"{name}: a global header that names a member; write the archive again")
    if kind == b"x":
        following.name = records.get(b"path", following.name)
        digits = records.get(b"size", b"")
        if digits and not (digits.isdigit() and len(digits) < 20):
            raise InputError(f"{name}: damaged: an extended header has no size; download it again")
        following.size = int(digits) if digits else following.size


def _records(data: bytes, name: str) -> dict[bytes, bytes]:
    """pax: ``LENGTH KEY=VALUE\\n``, the length being of all of it."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or end <= match.end() or data[end - 1 : end] != b"\n":
            raise InputError(f"{name}: damaged: an extended header that cannot be read; download it again")
        found[match[2]] = data[match.end() : end - 1]
        at = end
    return found


def _path(header: bytes, following: _Next, name: str) -> str:
    """A member's path, checked."""
    raw = following.name
    if raw is None:
        raw = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            raw = header[345:500].split(b"\0", 1)[0] + b"/" + raw
    try:
        path = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name}: member {raw[:80]!r}: its name is not UTF-8; rename it") from None
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    if "\0" in path or path.startswith("/") or ".." in path.split("/"):
        raise InputError(
            f"{name}: member {path[:80]!r} lies outside the archive (an absolute path, .. or NUL); write it again with "
            "relative paths"
        )
    return path
