"""Video files and blobs -> sampled frames with their times, by PyAV (the extra ``media``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.containers import MAX_PIXELS, container
from gemma_mlx.data.opening import as_medium, opened, told
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
def _opened(source: str | Medium, where: str) -> Iterator[tuple[Any, Any, str]]:
    """(container, its first video stream, what messages start with); what goes wrong inside is one line."""
    name = told(source, where)
    with opened(source, where, "unreadable video") as file:
        if importlib.util.find_spec("av") is None:
            raise InputError(f"{name}: videos need PyAV: pip install 'gemma-mlx[media]'")
        with container(file, as_medium(source), name, "video") as found:
            if not found.streams.video:
                raise InputError(f"{name}: the file has no video track; give one that has")
            stream = found.streams.video[0]
            _check_size(stream, name)
            yield found, stream, name


def _check_size(picture: Any, told: str) -> None:
    if picture.height * picture.width > MAX_PIXELS:
        raise InputError(f"{told}: video too large: {picture.width}x{picture.height} pixels; scale it down")


def video_info(medium: str | Medium, where: str = "") -> VideoInfo:
    """Frames, rate and size, from the header; frames are counted by decoding where it does not tell.

    Raises:
        InputError: missing, unreadable or empty, too large, or without a picture track.
        SourceError: the blob's source failed.
    """
    with _opened(medium, where) as (file, stream, name):
        frames = stream.frames or sum(1 for _ in file.decode(video=0))
        if not frames or not stream.height or not stream.width:
            raise InputError(f"{name}: empty video: no frame could be decoded; remove the row")
        rate = float(stream.average_rate) if stream.average_rate else DEFAULT_FPS
        return VideoInfo(frames, rate, (stream.height, stream.width))


def load_frames(medium: str | Medium, where: str = "", count: int = 32) -> list[np.ndarray]:
    """The sampled frames as RGB uint8 [height, width, 3], those of `sampled` for the file's `video_info`.

    Raises:
        InputError: as `video_info`, or fewer frames than the header promises.
        SourceError: the blob's source failed.
    """
    wanted = sampled(video_info(medium, where).frames, count)
    chosen, found = set(wanted), []
    with _opened(medium, where) as (file, _, name):
        for i, frame in enumerate(file.decode(video=0)):
            if i in chosen:
                _check_size(frame, name)
                found.append(frame.to_ndarray(format="rgb24"))
            if i >= wanted[-1]:
                break
    if len(found) != len(wanted):
        missing = wanted[len(found)]
        raise InputError(f"{name}: unreadable video: frame {missing} is missing; download or export it again")
    return found
