"""What is evaluated: examples with a reference, and what is known of each beside it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import Example
from gemma_mlx.data.media import audio_samples
from gemma_mlx.data.rows import Rows
from gemma_mlx.data.turns import Audio
from gemma_mlx.errors import InputError
from gemma_mlx.spec import SAMPLE_RATE

KNOWN = ("language", "source", "duration", "media", "reference_length", "task")
"""What rows can be grouped by beside their columns."""


@dataclass(frozen=True)
class Known:
    """What is known of a row beside its conversation.

    Attributes:
        language: the cell ``language``, as written, or the one given for rows without; "" where there is none.
        source: the cell ``source``, else the table's name without its folders.
        cells: other columns that were asked for.
    """

    language: str = ""
    source: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rated:
    """Rows to evaluate: examples, and what is known of each."""

    examples: list[Example]
    known: list[Known]

    def __len__(self) -> int:
        return len(self.examples)


def read_rows(
    data: str | Path | Sequence[Example],
    reading: Mapping[str, Any],
    by: Mapping[str, str],
    limit: int | None = None,
    texts: bool = False,
    language: str = "",
) -> Rated:
    """Rows of a file or examples.

    Args:
        data: see `gemma_mlx.evaluation.evaluate`.
        reading: options of `Rows`.
        by: what they shall be told apart by, of `KNOWN` or columns of the data; each with the flag that asks for it.
        limit: only the first so many.
        texts: whether rows of mere text are let in.
        language: of rows that name none.

    Raises:
        InputError: bad rows, rows without a reference, or no such column.
    """
    if not isinstance(data, str | Path):
        examples = list(data)[:limit]
        _check_columns(by, [])
        known = [Known(language)] * len(examples)
    else:
        rows = Rows(data, **reading)
        examples = read_examples(rows)[:limit]
        cells = [rows.cells(i) for i in range(len(examples))]
        _check_columns(by, list(dict.fromkeys(name for _, row in cells for name in row)))
        known = [_known(table, row, by, language) for table, row in cells]
    if not examples:
        raise InputError("no rows to evaluate")
    for example in examples:
        if example.completion and not texts:
            raise InputError(
                f"{example.where}: nothing but text, so no answer to score; add a prompt or media, or measure its "
                "perplexity with --likelihood"
            )
        if not example.completion and not example.reference.strip():
            raise InputError(f"{example.where}: no reference to compare an answer with; give it one")
    return Rated(examples, known)


def _check_columns(asked: Mapping[str, str], there: Sequence[str]) -> None:
    """Refuse columns that do not exist."""
    for name, flag in asked.items():
        if name not in KNOWN and name not in there:
            choices = [*KNOWN, *(c for c in there if c not in KNOWN)]
            close = difflib.get_close_matches(name, choices, 3, 0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(choices)}"
            raise InputError(f"{flag} {name}: no such column; {hint}")


def _known(table: str, row: Mapping[str, Any], by: Collection[str], language: str) -> Known:
    def text(name: str) -> str:
        return "" if row.get(name) is None else str(row[name]).strip()

    own = {name: text(name) for name in by if name not in KNOWN}
    return Known(text("language") or language, text("source") or Path(table).name, own)


def seconds_of(example: Example, processor: Any) -> float | None:
    """Seconds that the row's clips last together, as far as the model hears them; None without a clip."""
    clips = [part for part in example.media() if isinstance(part, Audio)]
    if not clips:
        return None
    limits = processor.long_audio, processor.spec.audio.max_samples
    return sum(audio_samples(clip.path, example.where, *limits) for clip in clips) / SAMPLE_RATE
