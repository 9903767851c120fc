"""Video files -> sampled frames with their times, by PyAV (the extra ``media``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.media import MAX_PIXELS
from gemma_mlx.errors import InputError

DEFAULT_FPS = 24.0
"""Assumed where a file does not tell its frame rate (transformers' ``Gemma4Processor``)."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without keeping its frames; `size` is (height, width) in pixels."""

    frames: int
    fps: float
    size: tuple[int, int]


def sampled(total: int, count: int) -> list[int]:
    """Which of `total` frames are read: `count` evenly spaced ones from the first on, or all where there are fewer.

    Frame i is floor(i · total / count), as in transformers' ``default_sample_indices_fn`` (which refuses short videos).
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]


def timestamps(info: VideoInfo, count: int) -> list[str]:
    """The times of the sampled frames as "mm:ss", rounded down."""
    seconds = [int(i / info.fps) for i in sampled(info.frames, count)]
    return [f"{s // 60:02d}:{s % 60:02d}" for s in seconds]


def spell_frames(text: str, placeholder: str, films: Sequence[Sequence[str]]) -> str:
    """A rendered conversation with each video's placeholder written as its frames: time, space, one placeholder.

    Frames are joined by spaces. `films` holds the times of each video in reading order; a text that is only the
    beginning of the conversation has fewer placeholders, and any that are too many stay as they are.
    """
    first, *rest = text.split(placeholder)
    out = [first]
    for i, part in enumerate(rest):
        out += [" ".join(f"{time} {placeholder}" for time in films[i]) if i < len(films) else placeholder, part]
    return "".join(out)


@contextmanager
def _opened(path: Path, told: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream); what goes wrong inside is one line."""
    if not path.is_file():
        raise InputError(f"{told}: no such file; correct the path")
    try:
        import av
    except ImportError:
        raise InputError(f"{told}: videos need PyAV: pip install 'gemma-mlx[media]'") from None
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise InputError(f"{told}: the file has no video track; give one that has")
            stream = file.streams.video[0]
            if stream.height * stream.width > MAX_PIXELS:
                raise InputError(f"{told}: video too large: {stream.width}x{stream.height} pixels; scale it down")
            yield file, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as e:
        raise InputError(f"{told}: unreadable video ({e}); expected a whole video file") from None


def video_info(path: str | Path, where: str = "") -> VideoInfo:
    """Frames, rate and size, from the header; frames are counted by decoding where it does not tell.

    Raises:
        InputError: missing, unreadable or empty, or without a picture track.
    """
    told = f"{where}: {path}" if where else str(path)
    with _opened(Path(path), told) as (file, stream):
        frames = stream.frames or sum(1 for _ in file.decode(video=0))
        if not frames or not stream.height or not stream.width:
            raise InputError(f"{told}: empty video: no frame could be decoded; remove the row")
        rate = float(stream.average_rate) if stream.average_rate else DEFAULT_FPS
        return VideoInfo(frames, rate, (stream.height, stream.width))


def load_frames(path: str | Path, where: str = "", count: int = 32) -> list[np.ndarray]:
    """The sampled frames as RGB uint8 [height, width, 3], those of `sampled` for the file's `video_info`.

    Raises:
        InputError: as `video_info`, or fewer frames than the header promises.
    """
    told = f"{where}: {path}" if where else str(path)
    wanted = sampled(video_info(path, where).frames, count)
    chosen, found = set(wanted), []
    with _opened(Path(path), told) as (file, _):
        for i, frame in enumerate(file.decode(video=0)):
            if i in chosen:
                found.append(frame.to_ndarray(format="rgb24"))
            if i >= wanted[-1]:
                break
    if len(found) != len(wanted):
        missing = wanted[len(found)]
        raise InputError(f"{told}: unreadable video: frame {missing} is missing; download or export it again")
    return found
