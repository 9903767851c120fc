"""What `doctor --parity` shows to both implementations: a long text, a picture, a spoken clip."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE, Audio, Example, Image, Text, Turn
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import TEXT
from gemma_mlx.errors import InputError

DATA = Path(__file__).parent / "demo" / "data"
BEYOND = 32
"""Tokens by which the text is longer than the window of the sliding layers, at least."""
MOST_LOGITS = 128
"""Positions whose logits are compared: those that predict an answer, and the last of the others."""
_WINDS = ("the north", "the west", "the south-west", "nowhere at all", "the east")
_MEALS = ("beans", "rice and fish", "bread with the last of the cheese")


@dataclass(frozen=True)
class Sample:
    """One thing that is compared.

    Attributes:
        kind: "text", "image" or "audio".
        example: as conversation; what was said may be missing from its end.
        batch: the example as one row.
        positions: int [n], where logits are compared: of text, never of a picture's or clip's slots.
        source: what it is, for the report.
    """

    kind: str
    example: Example
    batch: Batch
    positions: np.ndarray
    source: str


def _built_in(name: str) -> tuple[Any, ...]:
    """The first row of one of the demo's files: the path of its medium, and what its other columns say."""
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        _, (path, *texts), *_ = csv.reader(file)
    return DATA / path, *texts


def make_samples(
    processor: Processor, audio: Path | None = None, transcript: str | None = None, image: Path | None = None
) -> list[Sample]:
    """The samples that a checkpoint can read.

    Args:
        audio: a clip, in place of the built-in one.
        transcript: what it says.
        image: a picture, in place of the built-in one.

    Raises:
        InputError: a clip without its transcript or the other way round; media that cannot be read, or for which the
            checkpoint has no tower; a checkpoint without a tokenizer.
    """
    if (audio is None) != (transcript is None):
        raise InputError("--audio and --text belong together: give the clip and what is said in it")
    for flag, given, part in (("--audio", audio, "audio"), ("--image", image, "vision")):
        if given is not None and getattr(processor.spec, part) is None:
            raise InputError(f"{flag} {given}: this checkpoint has no {part} tower (no {part}_config in config.json)")
    samples = [_text_sample(processor)]
    if processor.spec.vision is not None:
        path, question, answer = _built_in("test_digits.csv") if image is None else (image, DESCRIBE, None)
        parts = (Image(path), Text(question))
        samples.append(_sample("image", processor, parts, answer, "built-in" if image is None else image.name))
    if processor.spec.audio is not None:
        path, said = _built_in("test_nato.csv") if audio is None else (audio, transcript)
        parts = (Text(TRANSCRIBE), Audio(path))
        samples.append(_sample("audio", processor, parts, said, "built-in" if audio is None else audio.name))
    return samples


def _sample(kind: str, processor: Processor, parts: tuple[Any, ...], answer: str | None, source: str) -> Sample:
    turns = [Turn("user", parts)] + ([] if answer is None else [Turn("model", (Text(answer),))])
    example = Example(tuple(turns), where=f"{source} {kind}")
    row = processor.prompt(example) if answer is None else processor.sample(example)
    batch = collate([row], processor.pad_id)
    return Sample(kind, example, batch, _positions(batch), source)


def _positions(batch: Batch) -> np.ndarray:
    """Sorted int [n]: positions before labels, and the last others that are text."""
    predicting = np.flatnonzero(batch.labels[0, 1:] != IGNORE_INDEX)
    others = np.setdiff1d(np.flatnonzero(batch.mm_token_type_ids[0] == TEXT), predicting)
    room = max(0, MOST_LOGITS - len(predicting))
    return np.sort(np.concatenate([predicting, others[len(others) - min(room, len(others)) :]])).astype(np.int32)


def _text_sample(processor: Processor) -> Sample:
    """A ship's log, of as many days as reach beyond the window."""
    window, days = processor.spec.text.sliding_window, 2
    while True:
        log, answer = _log(days)
        sample = _sample("text", processor, (Text(log),), answer, "built-in")
        if sample.batch.input_ids.shape[1] > window + BEYOND:
            return sample
        days += max(1, days // 2)


def _log(days: int) -> tuple[str, str]:
    """(a log of so many days with a question, the answer)."""
    miles = [37 * day % 89 + 11 for day in range(1, days + 1)]
    lines = [
        f"Day {day}: wind from {_WINDS[day % len(_WINDS)]}, {made} miles, {_MEALS[day % len(_MEALS)]} for supper."
        for day, made in enumerate(miles, 1)
    ]
    question = "On which day did the ship make the most miles?"
    return "\n".join([*lines, question]), f"On day {miles.index(max(miles)) + 1}."
