"""Media -> files of a prepared folder: clips as 16 kHz mono FLAC, HEIC as PNG, the rest byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.opening import opened
from gemma_mlx.spec import SAMPLE_RATE

MEDIA = "media"
"""The folder of media inside a prepared one."""
_PICTURES = {".heic", ".heif", ".avif"}
_CHUNK = 1 << 20


def digest(medium: Medium, where: str, kind: str) -> bytes:
    """16 bytes of blake2b over a medium's bytes.

    Raises:
        InputError: there is no such file, or it is empty.
    """
    found = hashlib.blake2b(digest_size=16)
    with opened(medium, where, f"empty {kind}") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.digest()


def flac(path: Path, wave: np.ndarray) -> None:
    """Write float32 samples, mono at 16 kHz, as 16-bit FLAC; beyond ±1 they are clipped.

    A value is k / 32768 as in the file that it was read from, so 16-bit samples come back unchanged.
    """
    import soundfile

    samples = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    soundfile.write(path, samples, SAMPLE_RATE, "PCM_16", format="FLAC")


def png(path: Path, pixels: np.ndarray) -> None:
    """Write RGB uint8 [height, width, 3]."""
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")


def url_of(medium: Medium) -> str:
    """Where a medium lies if it is far away; "" if it is at hand."""
    return str(getattr(medium, "url", ""))


class Placer:
    """Puts media into a prepared folder, each content once under a name that tells where it came from.

    Args:
        folder: the prepared folder.
        convert: clips to FLAC, HEIC to PNG; else they are the same bytes.
        fetch: media that are given as URLs too, which are else left where they are.
    """

    def __init__(self, folder: Path, convert: bool = False, fetch: bool = False):
        self.folder, self.convert, self.fetch = folder, convert, fetch

    def takes(self, medium: Medium) -> bool:
        """Whether a medium goes into the folder."""
        return self.fetch or not url_of(medium)

    def name(self, medium: Medium, kind: str, content: bytes) -> str:
        """Where a medium of this content goes, relative to the folder: ``media/3f/talk7-3f….flac``."""
        stem, suffix = _stem(medium)
        if self.convert and kind == "audio":
            suffix = ".flac"
        elif self.convert and kind == "image" and suffix in _PICTURES:
            suffix = ".png"
        return f"{MEDIA}/{content.hex()[:2]}/{stem}-{content.hex()[:16]}{suffix}"

    def place(self, medium: Medium, kind: str, content: bytes, decoded: np.ndarray | None) -> None:
        """Write the file, unless it is there.

        Args:
            medium: what to write.
            kind: "audio", "image" or "video".
            content: its `digest`.
            decoded: mono samples of a clip, pixels of a picture: what is written where it is converted.
        """
        target = self.folder / self.name(medium, kind, content)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.convert and kind == "audio":
            _into(target, lambda path: flac(path, decoded))
        elif self.convert and kind == "image" and _stem(medium)[1] in _PICTURES:
            _into(target, lambda path: png(path, decoded))
        else:
            _take(medium, target)


def _take(medium: Medium, target: Path) -> None:
    """A file of this machine becomes a second name of the same bytes where its disk allows; anything else is copied."""
    if isinstance(medium, Path):
        try:
            return os.link(os.path.realpath(medium), target)
        except FileExistsError:  # another thread was first
            return None
        except OSError:
            pass
    return _into(target, lambda path: _copy(medium, path))


def _copy(medium: Medium, path: Path) -> None:
    with opened(medium, "", "empty file") as source, path.open("wb") as out:
        shutil.copyfileobj(source, out, _CHUNK)


def _into(target: Path, write: Callable[[Path], Any]) -> None:
    """Through a file beside it, since two threads may meet the same content."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _stem(medium: Medium) -> tuple[str, str]:
    """(a file name's letters, suffix) of a medium."""
    if isinstance(medium, Path):
        stem, suffix = medium.stem, medium.suffix.lower()
    else:
        suffix = medium.suffix
        stem = medium.name.rsplit("/", 1)[-1]
        stem = stem[: -len(suffix)] if suffix and stem.lower().endswith(suffix) else stem
    stem = re.sub(r"-[0-9a-f]{16}$", "", stem)  # what was prepared before
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:60] or "medium", re.sub(r"[^.a-z0-9]", "", suffix)
