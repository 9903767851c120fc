"""Transcripts of clips of any length: cut at silences, transcribed in batches, joined again, with times."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from gemma_mlx import generation
from gemma_mlx.data.blob import Embedded, Medium
from gemma_mlx.data.examples import Prompts
from gemma_mlx.data.media import audio_blocks, audio_samples
from gemma_mlx.data.opening import as_medium, told
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.silence import EDGE_SECONDS, Stretch, stretches
from gemma_mlx.data.turns import Audio, Example, Text, Turn, system_turns
from gemma_mlx.errors import InputError
from gemma_mlx.sampling import Settings
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, SAMPLE_RATE

FORMATS = ("text", "timestamps", "srt", "vtt", "json")
"""What a transcript can be written as; see `Transcript.written`."""
_BATCHES = 4
"""That are cut before they are answered together, longest first."""


class Piece(NamedTuple):
    """What was said in a part of a clip.

    ``start_s`` and ``end_s`` are seconds in the original clip; the silence at the piece's edges counts.
    """

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """A whole clip's.

    Attributes:
        pieces: in order, disjoint; what is between them is silent, and the model did not hear it.
        seconds: of the clip.
        unfinished: the numbers of pieces whose answers were cut at the most tokens.
        prompt_tokens, answer_tokens: of all pieces together.
    """

    pieces: tuple[Piece, ...]
    seconds: float
    unfinished: tuple[int, ...] = ()
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def text(self) -> str:
        """All pieces' texts, a space between them except where a script has none."""
        text = ""
        for piece in filter(None, (" ".join(p.text.split()) for p in self.pieces)):
            text += ("" if not text or (_spaceless(text[-1]) and _spaceless(piece[0])) else " ") + piece
        return text

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The pieces as JSON has them: start, end, text."""
        return [{"start": round(a, 3), "end": round(b, 3), "text": text} for a, b, text in self.pieces]

    @property
    def skipped_seconds(self) -> float:
        """Seconds of silence in no piece."""
        return self.seconds - sum(piece.end_s - piece.start_s for piece in self.pieces)

    def written(self, form: str = "text") -> str:
        """The transcript in one of `FORMATS`.

        - text: as `text`.
        - timestamps: a line a piece, ``[00:00:01.250 --> 00:00:07.800] words``.
        - srt, vtt: subtitles; pieces without words are left out.
        - json: text, seconds, skipped_seconds and the pieces with start, end and text.

        Raises:
            InputError: another format.
        """
        if form not in FORMATS:
            raise InputError(f"format is {form!r}; expected one of {', '.join(FORMATS)}")
        if form == "text":
            return self.text + "\n"
        if form == "json":
            about = {"seconds": round(self.seconds, 3), "skipped_seconds": round(self.skipped_seconds, 3)}
            return json.dumps({"text": self.text, **about, "pieces": self.timed}, ensure_ascii=False, indent=2) + "\n"
        if form == "timestamps":
            return "".join(line(piece) + "\n" for piece in self.pieces)
        spoken = [piece for piece in self.pieces if piece.text.strip()]
        return _srt(spoken) if form == "srt" else _vtt(spoken)


def transcribe(
    model: Any,
    processor: Processor,
    path: str | Medium,
    *,
    prompt: str | None = None,
    language: str | None = None,
    system: str | None = None,
    settings: Settings | None = None,
    batch_size: int = 8,
    piece_seconds: float | None = None,
    edge_seconds: tuple[float, float] = EDGE_SECONDS,
    on_piece: Callable[[Piece], None] | None = None,
) -> Transcript:
    """The transcript of a clip of any length.

    The clip is read once, block by block, and cut into pieces that the model can hear, in pauses where there are any
    (`gemma_mlx.data.silence`). Silence is not transcribed: models make up words for it.

    Args:
        model, processor: of `gemma_mlx.load`; the checkpoint must have an audio tower.
        path: the file, or a blob.
        prompt: what the user says before each piece; default: a request to transcribe.
        language: of the speech ("French"), for the default prompt.
        system: a system turn before it.
        settings: how each piece is answered.
        batch_size: pieces that are answered at a time.
        piece_seconds: the longest piece; default and most: what the model hears (30 s).
        edge_seconds: of silence that stay before the first sound of a piece and behind its last. A model that was tuned
            on clips that were all trimmed alike hears best what is trimmed like them.
        on_piece: called with each piece, in order, as soon as it is known.

    Raises:
        InputError: no audio tower, unreadable audio, `piece_seconds` below 1 or above what the model hears, or
            `edge_seconds` that are not 0 to 1.
    """
    asked = Turn("user", (Text(prompt or Prompts().of_clip(language)), Audio(as_medium(path))))
    example = Example((*system_turns(system), asked), task="transcript")
    return answer_in_pieces(
        model, processor, example, settings=settings, batch_size=batch_size, piece_seconds=piece_seconds,
        edge_seconds=edge_seconds, on_piece=on_piece,
    )  # fmt: skip


def answer_in_pieces(
    model: Any,
    processor: Processor,
    example: Example,
    *,
    settings: Settings | None = None,
    batch_size: int = 8,
    piece_seconds: float | None = None,
    edge_seconds: tuple[float, float] = EDGE_SECONDS,
    on_piece: Callable[[Piece], None] | None = None,
) -> Transcript:
    """The answers to a conversation about one clip, asked about each of its pieces; arguments as `transcribe`.

    Raises:
        InputError: the conversation's media are not one clip; and as `transcribe`.
    """
    clip, *others = example.media() or [None]
    if others or not isinstance(clip, Audio):
        raise InputError(f"{example.where or 'conversation'}: one clip alone is cut into pieces; leave other media out")
    settings, most = settings or Settings(), _most_samples(processor, piece_seconds)
    counted = _Counted(audio_blocks(clip.path, example.where))
    found: list[Piece] = []
    unfinished: list[int] = []
    tokens = np.zeros(2, int)
    cut = stretches(counted, most, edge_seconds)
    while group := list(islice(cut, _BATCHES * batch_size)):
        ready = dict(generation.answers(model, processor, [_about(s, example) for s in group], settings, batch_size))
        for i, stretch in enumerate(group):
            answer = ready[i]
            tokens += answer.prompt_tokens, len(answer.ids)
            unfinished += [len(found)] if answer.finish == "length" else []
            found.append(Piece(stretch.start / SAMPLE_RATE, stretch.end / SAMPLE_RATE, answer.text.strip()))
            if on_piece is not None:
                on_piece(found[-1])
    return Transcript(tuple(found), counted.samples / SAMPLE_RATE, tuple(unfinished), *tokens.tolist())


def is_too_long(processor: Processor, example: Example) -> bool:
    """Whether an example's media are one clip that is longer than the model hears.

    Raises:
        InputError: the clip cannot be read.
    """
    clip, *others = example.media() or [None]
    audio = processor.spec.audio
    if others or not isinstance(clip, Audio) or audio is None or audio.max_samples is None:
        return False
    return audio_samples(clip.path, example.where, "truncate", audio.max_samples + SAMPLE_RATE) > audio.max_samples


def _most_samples(processor: Processor, piece_seconds: float | None) -> int:
    """Samples of the longest piece."""
    if processor.spec.audio is None:
        raise InputError(
            f"{processor.folder}: this checkpoint has no audio tower (audio_config in config.json); use another one"
        )
    limit = processor.spec.audio.max_samples or MAX_AUDIO_SAMPLES
    if piece_seconds is None:
        return limit
    if not 1 <= piece_seconds <= limit / SAMPLE_RATE:
        raise InputError(f"piece_seconds is {piece_seconds:g}; expected 1 to {limit / SAMPLE_RATE:g}")
    return round(piece_seconds * SAMPLE_RATE)


class _Counted:
    """Blocks, and how many samples they had."""

    def __init__(self, blocks: Iterator[np.ndarray]):
        self.blocks, self.samples = blocks, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.blocks:
            self.samples += len(block)
            yield block


def _about(stretch: Stretch, example: Example) -> Example:
    """The same conversation about a stretch of its clip."""
    where = f"{told(example.media()[0].path, example.where)} at {stamp(stretch.start / SAMPLE_RATE)}"
    clip = Audio(Embedded(where, _wav(stretch.samples), ".wav"))
    turns = (
        replace(turn, parts=tuple(clip if isinstance(part, Audio) else part for part in turn.parts))
        for turn in example.turns
    )
    return replace(example, turns=tuple(turns), where=where)


def _wav(samples: np.ndarray) -> bytes:
    """A WAV file of 16 kHz float32 samples, which reading gives back bit by bit."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def stamp(seconds: float, mark: str = ".") -> str:
    """3723.5 -> "01:02:03.500"."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"


def line(piece: Piece) -> str:
    """``[00:00:01.250 --> 00:00:07.800] words``"""
    return f"[{stamp(piece.start_s)} --> {stamp(piece.end_s)}] {' '.join(piece.text.split())}".rstrip()


def _srt(pieces: list[Piece]) -> str:
    return "\n".join(
        f"{i}\n{stamp(a, ',')} --> {stamp(b, ',')}\n{' '.join(text.split())}\n"
        for i, (a, b, text) in enumerate(pieces, 1)
    )


def _vtt(pieces: list[Piece]) -> str:
    marks = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = (f"\n{stamp(a)} --> {stamp(b)}\n{' '.join(text.split()).translate(marks)}\n" for a, b, text in pieces)
    return "WEBVTT\n" + "".join(cues)


def _spaceless(character: str) -> bool:
    """Whether a character is of a script that has no spaces between words: Chinese, Japanese, Thai and the like."""
    name = unicodedata.name(character, "")
    wide = unicodedata.east_asian_width(character) in "WF" and not name.startswith("HANGUL")
    return wide or name.startswith(("THAI", "LAO", "KHMER", "MYANMAR"))
