"""One row, checked without a model: mapped, its media decoded, measured and hashed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_mlx.data.blob import Medium, described
from gemma_mlx.data.examples import Audio, Example, Image, Text, Video
from gemma_mlx.data.media import audio_samples, image_dimensions, load_audio, load_image
from gemma_mlx.data.opening import opened
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.video import load_frames, video_info
from gemma_mlx.errors import InputError, SourceError
from gemma_mlx.preparing.convert import Placer, digest
from gemma_mlx.preparing.rows import Rows, Source
from gemma_mlx.preparing.split import group_key
from gemma_mlx.scoring import basic
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, SAMPLE_RATE

LEAST_TEXT = 20
"""Characters below which equal texts say nothing: "yes", "seven"."""
_WHERE = re.compile(r"(.+?:\d+): ")


@dataclass(slots=True)
class Seen:
    """One medium of a row: `size` is (height, width), `rate` the file's own."""

    kind: str
    content: bytes = b""
    seconds: float = 0.0
    rate: int = 0
    size: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Checked:
    """What a row turned out to be.

    Attributes:
        reason: what is wrong with it; "" for a good row.
        kind: "audio", "image+audio", "text", ...: the media it has.
        keys: 64-bit hashes, 0 for none: "id", "row" (all text and media), "text" (what may leak), "group".
        columns: those that the row has.
    """

    where: str
    row_id: str = ""
    reason: str = ""
    kind: str = ""
    language: str = ""
    media: list[Seen] = field(default_factory=list)
    tokens: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    columns: tuple[str, ...] = ()


class Checker:
    """Checks rows by number; may be called from several threads.

    Args:
        rows: where they come from.
        tokens: (example, media) -> its length in tokens.
        long_audio: "error" or "truncate", for clips over 30 s.
        headers_only: decode nothing, and take media of the same name for the same.
        split_by: column whose rows stay together; None for rows with the same media, or the same text.
        placer: where media are put as they are read; None to leave them.
    """

    def __init__(
        self,
        rows: Rows,
        tokens: Callable[[Example, list[Seen]], int],
        *,
        long_audio: str = "error",
        headers_only: bool = False,
        split_by: str | None = None,
        placer: Placer | None = None,
    ):
        self.rows, self.tokens, self.split_by = rows, tokens, split_by
        self.long_audio, self.headers_only = long_audio, headers_only
        self.placer, self.converts = placer, placer is not None and placer.convert

    def __call__(self, index: int) -> Checked:
        """Check one row; only a failing source is an error.

        Raises:
            SourceError: the table cannot be read.
        """
        found = Checked(where=f"{self.rows.name}: row {index + 1}")
        placer = self.placer
        try:
            source, place = self.rows.find(index)
            row = source.row(place)
            found.where, found.columns = row.where, tuple(row.values)
            found.row_id, found.language = source.text(row, "id"), source.text(row, "language")
            example = source.example(row)
            found.kind = "+".join(sorted({_kind(part) for part in example.media()})) or "text"
            media = self._media(source, row, example)
            decoded = [self._look(kind, medium, found) for kind, medium in media]
            found.tokens = self.tokens(example, found.media)
            found.keys = self._keys(row.values, example, found)
            if placer is not None:
                for (kind, medium), seen, values in zip(media, found.media, decoded, strict=True):
                    if placer.takes(medium):
                        placer.place(medium, kind, seen.content, values)
        except SourceError:
            raise
        except InputError as e:
            found.reason = str(e)
            if told := _WHERE.match(found.reason) if found.where.endswith(f": row {index + 1}") else None:
                found.where = told[1]
            found.reason = found.reason.removeprefix(f"{found.where}: ")
        return found

    def _media(self, source: Source, row: Row, example: Example) -> list[tuple[str, Medium]]:
        """(kind, medium) in the order in which their digests are kept: of cells, where these are to be rewritten."""
        media = [(_kind(part), part.path) for part in example.media()]
        if self.placer is None:
            return media
        found = [(kind, medium) for _, kind, medium in source.media(row)]
        if len(found) != len(media):
            raise InputError(f"{row.where}: media in cells that cannot be rewritten; leave --write out")
        return found

    def _look(self, kind: str, medium: Medium, found: Checked) -> np.ndarray | None:
        """Measure a medium; what it decodes to, where that is an array."""
        seen, where = Seen(kind), found.where
        found.media.append(seen)
        name = described(medium).encode()
        seen.content = (
            hashlib.blake2b(name, digest_size=16).digest() if self.headers_only else digest(medium, where, kind)
        )
        return {"audio": self._clip, "image": self._picture, "video": self._film}[kind](medium, where, seen)

    def _clip(self, medium: Medium, where: str, seen: Seen) -> np.ndarray | None:
        seen.seconds, seen.rate = audio_header(medium, where)
        if self.headers_only:
            count = audio_samples(medium, where, self.long_audio)
            seen.seconds = seen.seconds or count / SAMPLE_RATE
            return None
        # A file that is converted keeps its end, whatever training takes of it.
        whole = self.long_audio == "truncate" and self.converts
        limit = None if whole else MAX_AUDIO_SAMPLES
        wave = load_audio(medium, where, "error" if whole else self.long_audio, limit)
        cut = self.long_audio == "truncate" and not whole
        seen.seconds = max(seen.seconds if cut else 0.0, len(wave) / SAMPLE_RATE)
        return wave

    def _picture(self, medium: Medium, where: str, seen: Seen) -> np.ndarray | None:
        if self.headers_only:
            seen.size = image_dimensions(medium, where)
            return None
        pixels = load_image(medium, where)
        seen.size = pixels.shape[:2]
        return pixels

    def _film(self, medium: Medium, where: str, seen: Seen) -> None:
        info = video_info(medium, where)
        seen.seconds, seen.size = info.frames / info.fps, info.size
        if not self.headers_only:
            load_frames(medium, where)

    def _keys(self, values: dict[str, Any], example: Example, found: Checked) -> dict[str, int]:
        everything = basic(" ".join(p.text for turn in example.turns for p in turn.parts if isinstance(p, Text)))
        content = sorted(seen.content for seen in found.media)
        # Beside media the question is often the same for all rows; the answer is what a row has to itself.
        told = basic(example.reference) if found.media else everything
        group = str(values.get(self.split_by) or "").strip() if self.split_by else ""
        first = content[0] if content else everything
        return {
            "id": group_key(found.row_id) if found.row_id else 0,
            "row": group_key(everything.encode() + b"\0" + b"".join(content)),
            "text": group_key(told) if len(told) >= LEAST_TEXT else 0,
            "group": group_key(f"group {group}" if group else first),
        }


def audio_header(medium: Medium, where: str) -> tuple[float, int]:
    """(seconds, sample rate) as a clip's header says; zeros where it does not, and for what no one can read."""
    import soundfile

    try:
        with opened(medium, where, "empty audio") as file:
            info = soundfile.info(file)
        return (info.frames / info.samplerate if 0 < info.frames < 1 << 40 else 0.0), info.samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError):
        return _av_header(medium, where)


def _av_header(medium: Medium, where: str) -> tuple[float, int]:
    from gemma_mlx.data.containers import container

    try:
        with opened(medium, where, "empty audio") as file, container(file, medium, where, "audio") as found:
            stream = found.streams.audio[0]
            ticks = stream.duration
            return (float(ticks * stream.time_base) if ticks else 0.0), int(stream.rate or 0)
    except SourceError:
        raise
    except (ImportError, InputError, IndexError):  # decoding says what is wrong
        return 0.0, 0


def _kind(part: Image | Video | Audio) -> str:
    return type(part).__name__.lower()
