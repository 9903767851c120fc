"""Files through PyAV (the extra ``media``): m4a, mp4, mkv and whatever else FFmpeg reads, hostile ones included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.opening import Watched, length
from gemma_mlx.errors import InputError

MAX_PIXELS = 89_478_485
"""Of a picture or a frame: Pillow's own limit against decompression bombs (a quarter of a gigabyte of RGB)."""

# No playlists: what they name would be opened, on this machine or elsewhere.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,rm,"
    "aac,ac3,eac3,mp3,flac,ogg,wav,w64,aiff,caf,au,amr,amrnb,amrwb,wv,ape,tta,tak,dsf,gif"
)
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}


@contextmanager
def container(file: BinaryIO, medium: Medium, told: str, kind: str) -> Iterator[Any]:
    """An open PyAV container of the medium; what goes wrong inside is one line.

    Args:
        file: the medium's bytes.
        medium: read by its path where it has one, which spares calls back into Python.
        told: what messages start with.
        kind: "audio" or "video", for messages.

    Raises:
        InputError: not such a file, or broken.
        SourceError: the blob's source failed.
    """
    import av

    size = length(file)
    watched = None if isinstance(medium, Path) else Watched(file)
    try:
        with av.open(watched or os.path.abspath(medium), options=_OPTIONS) as opened:
            for stream in opened.streams:
                if stream.frames > size:  # a frame takes at least a byte
                    raise InputError(
                        f"{told}: unreadable {kind}: its header promises {stream.frames:,} frames in {size:,} bytes; "
                        "download or export it again"
                    )
            for stream in opened.streams.video:
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield opened
    except Exception as e:
        if watched is not None and watched.error is not None:
            raise watched.error from None
        if isinstance(e, InputError) or not isinstance(e, (av.FFmpegError, OSError, ValueError, EOFError, MemoryError)):
            raise
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise InputError(f"{told}: unreadable {kind} ({reason}); expected a whole {kind} file") from None
    if watched is not None and watched.error is not None:
        raise watched.error
