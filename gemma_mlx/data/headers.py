"""What a file's own marks say and decoders do not tell: what kind of container it is, and whether its end is there."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from gemma_mlx.data.opening import length

_MPEG_4 = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"}
_OPEN_ENDED = 0x7FFF0000
"""A chunk that claims this much or more was written to a pipe: it goes on to the end of the file."""
_OGG_PAGE = 65_307
"""The longest."""


def wants_av(file: BinaryIO) -> bool:
    """Whether the content is of a kind that libsndfile does not read: MPEG-4, Matroska, ADTS, ASF or AMR."""
    head = file.read(12)
    file.seek(0)
    adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    starts = (b"\x1aE\xdf\xa3", b"0&\xb2u", b"#!AMR")
    return head[4:8] in _MPEG_4 or adts or head.startswith(starts)


def missing_end(file: BinaryIO) -> str:
    """What is missing at the end of a RIFF, AIFF or Ogg file, in words; "" if nothing is known to be."""
    head, size = file.read(12), length(file)
    if head[:4] == b"OggS":
        return _missing_page(file, size)
    if head[:4] == b"RIFF" or (head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC")):
        return _missing_samples(file, size, "<" if head[:4] == b"RIFF" else ">")
    return ""


def _missing_samples(file: BinaryIO, size: int, order: str) -> str:
    """Up to 1 % may be missing: some writers do not finish their headers well."""
    at = 12
    for _ in range(1000):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return "its samples are not there"
        name, claimed = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        if name in (b"data", b"SSND"):
            there = size - at - 8
            if claimed < _OPEN_ENDED and there < 0.99 * claimed:
                return f"its header promises {claimed:,} bytes of samples, {max(0, there):,} are there"
            return ""
        at += 8 + claimed + claimed % 2
    return ""


def _missing_page(file: BinaryIO, size: int) -> str:
    """The last page may lack its end; whether pages are missing behind it cannot be known."""
    start = max(0, size - _OGG_PAGE)
    file.seek(start)
    tail = file.read(_OGG_PAGE)
    at = tail.rfind(b"OggS")
    if at < 0:
        return "it ends inside a page"
    segments = tail[at + 26] if len(tail) > at + 26 else 255
    sizes = tail[at + 27 : at + 27 + segments]
    whole = len(sizes) == segments and at + 27 + segments + sum(sizes) <= len(tail)
    return "" if whole else "it ends inside a page"


def counts_its_frames(file: BinaryIO) -> bool:
    """Whether an MP3 file says how many frames it has (a Xing, Info or VBRI mark); otherwise its length is a guess."""
    file.seek(0)
    head = file.read(10)
    tag = 0
    if head[:3] == b"ID3" and len(head) == 10:
        tag = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(tag, io.SEEK_SET)
    first = file.read(2048)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
