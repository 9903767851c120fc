"""Clips and pictures as a browser plays and shows them: small, and inside the page as long as there is room."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gemma_mlx.data.blob import described
from gemma_mlx.data.examples import Example
from gemma_mlx.data.media import load_audio, load_image
from gemma_mlx.data.turns import Audio, Image, Part
from gemma_mlx.data.video import load_frames
from gemma_mlx.errors import InputError
from gemma_mlx.files import write_whole
from gemma_mlx.spec import SAMPLE_RATE

EMBEDDED = 24 << 20
"""Bytes of media inside a page; what comes after lies in files beside it."""
FOLDER = "report_media"
SIDE = 512
"""Pixels of a picture's longer side, at most."""
VIDEO_FRAMES = 4


class Shelf:
    """Where the media of a page lie; those of an earlier page in this folder go.

    Args:
        folder: the page's.
        processor: knows what of a clip the model hears.
        room: bytes that may lie inside the page.
    """

    def __init__(self, folder: Path, processor: Any, room: int = EMBEDDED):
        self.folder, self.processor, self.room = folder, processor, room
        self.files = 0
        for old in (folder / FOLDER).glob("[0-9][0-9][0-9][0-9][0-9].*"):
            old.unlink()

    def of_row(self, example: Example) -> list[tuple[str, str, str]]:
        """(tag "audio", "img" or "none", address, what it is in words) of each medium of a row; "none" where it cannot
        be read any more, with the reason in place of the words."""
        found = []
        for part in example.media():
            try:
                for tag, kind, suffix, data in _encoded(part, example.where, self.processor):
                    found.append((tag, self._put(kind, suffix, data), PurePath(described(part.path)).name))
            except (InputError, OSError) as error:
                found.append(("none", "", str(error)))
        return found

    def _put(self, kind: str, suffix: str, data: bytes) -> str:
        if len(data) <= self.room:
            self.room -= len(data)
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
        self.files += 1
        name = f"{FOLDER}/{self.files:05}{suffix}"
        (self.folder / FOLDER).mkdir(exist_ok=True)
        write_whole(self.folder / name, data)
        return name


def _encoded(part: Part, where: str, processor: Any) -> list[tuple[str, str, str, bytes]]:
    """(tag, MIME type, suffix, bytes): a clip as FLAC, 16 kHz mono 16 bits; a picture, or some of a video, as JPEG."""
    if isinstance(part, Audio):
        wave = load_audio(part.path, where, processor.long_audio, processor.spec.audio.max_samples)
        return [("audio", "audio/flac", ".flac", flac(wave))]
    pictures = [load_image(part.path, where)] if isinstance(part, Image) else _frames(part, where)
    return [("img", "image/jpeg", ".jpg", jpeg(picture)) for picture in pictures]


def _frames(part: Part, where: str) -> Sequence[np.ndarray]:
    return load_frames(part.path, where, VIDEO_FRAMES)


def flac(samples: np.ndarray) -> bytes:
    """float32 [n] at 16 kHz as a FLAC file."""
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    """uint8 [height, width, 3] as a JPEG file of at most `SIDE` pixels a side."""
    from PIL import Image as Pillow

    image = Pillow.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
