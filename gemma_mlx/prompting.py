"""Prompts -> conversations -> answers: one question with its media, and JSONL files of prompts.

A line of a file is what `gemma_mlx.data.examples` reads as a row: ``{"prompt": …}``, ``{"messages": […]}``, or columns
like ``image_path, question``. Its answer comes out as a line with all that was in it and ``answer``, ``finish``,
``prompt_tokens`` and ``answer_tokens``, in the same order. Fields of the row that have one of these names come back
with ``input_`` before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from gemma_mlx import generation
from gemma_mlx.data.examples import MEDIA, Prompts, RowReader
from gemma_mlx.data.places import Folders
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.sources.jsonl import JsonlTable
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.turns import Audio, Example, Image, Text, Turn, Video
from gemma_mlx.data.values import filled
from gemma_mlx.errors import InputError
from gemma_mlx.files import flush, write_whole
from gemma_mlx.long_audio import Transcript, answer_in_pieces, is_too_long
from gemma_mlx.sampling import Settings

OURS = ("answer", "finish", "prompt_tokens", "answer_tokens", "pieces", "error")
"""Fields of an output line that are ours."""
BATCHES = 4
"""That are answered together, longest prompts first, before their lines are written; a kill loses no more."""


def user_turn(
    text: str | None,
    images: Iterable[Path] = (),
    videos: Iterable[Path] = (),
    clips: Iterable[Path] = (),
    prompts: Prompts | None = None,
    language: str | None = None,
) -> Turn:
    """What a user says: pictures and videos, the text, clips; as in rows of the same columns.

    Args:
        text: None for the default: to transcribe beside a clip, to describe beside a picture or a video.
        images, videos, clips: files, in order.
        prompts: other defaults.
        language: of the clips, for the default prompt.

    Raises:
        InputError: nothing is said, or the default prompt has ``{language}`` and none is given.
    """
    images, videos, clips, prompts = tuple(images), tuple(videos), tuple(clips), prompts or Prompts()
    if text is None and clips:
        text = prompts.of_clip(language)
        if text is None:
            raise InputError("the audio prompt has {language}, but none is given; name it with --language")
    elif text is None and (images or videos):
        text = prompts.of_picture(bool(images))
    if not (text or "").strip():
        raise InputError("nothing to answer: give a prompt, or a picture, a video or a clip without one")
    return Turn("user", (*map(Image, images), *map(Video, videos), Text(text), *map(Audio, clips)))


class PromptFile:
    """A JSONL file of prompts.

    Args:
        path: the file.
        name: what messages call it.
        base: the folder that media paths start from; default: the file's own.
        media_roots, columns, prompts, fetcher: as in `gemma_mlx.data.rows.Rows`.

    Raises:
        InputError: it is missing or empty, or an option does not fit it; from a row, naming file:line.
    """

    def __init__(
        self,
        path: str | Path,
        media_roots: Iterable[str | Path] = (),
        columns: Mapping[str, str] | None = None,
        *,
        prompts: Prompts | None = None,
        fetcher: Any = None,
        name: str | None = None,
        base: str | None = None,
    ):
        self.table = JsonlTable(path, name, base)
        folders = Folders(self.table.base, media_roots, fetcher)
        self._reader = RowReader(
            self.table.columns, folders, self.table.name, dict(columns or {}), prompts or Prompts(), need_answer=False
        )

    def __len__(self) -> int:
        return len(self.table)

    def written(self, index: int) -> dict[str, Any]:
        """What the line says, as it says it; {} where it is no object."""
        try:
            found = self.table.written(index)
        except InputError:
            return {}
        return found if isinstance(found, dict) else {}

    def example(self, index: int) -> Example:
        """The conversation of a line; a last turn of the model's is what it would be compared with, and left out."""
        example = self._reader.example(_named(self.table[index]))
        if example.completion:
            raise InputError(f"{example.where}: nothing to answer: a text alone; write it as a prompt")
        if all(turn.role in ("system", "model") for turn in example.turns):
            raise InputError(f"{example.where}: nothing to answer: the user says nothing; add a user message")
        return example


def _named(row: Row) -> Row:
    """The row with files in ``image``, ``audio`` and the like as in ``image_path``: in a prompt they are meant."""
    values = dict(row.values)
    for path, *names in MEDIA.values():
        given = [name for name in names if filled(values.get(name))]
        if len(given) == 1 and not filled(values.get(path)):
            values[path] = values.pop(given[0])
    return replace(row, values=values)


@dataclass(frozen=True)
class Answering:
    """How lines are answered.

    Attributes:
        settings: of every answer; a ``seed`` gives each group of lines its own, so that going on changes nothing.
        batch_size: lines answered at a time.
        pieces: options of `gemma_mlx.long_audio.answer_in_pieces` for rows whose clip is too long for the model; None
            where such rows are bad, or cut by the processor.
        skip_bad: write bad rows with an ``error`` instead of stopping before anything is answered.
    """

    settings: Settings = field(default_factory=Settings)
    batch_size: int = 8
    pieces: Mapping[str, Any] | None = None
    skip_bad: bool = False

    @property
    def group(self) -> int:
        """Lines that are written together."""
        return BATCHES * self.batch_size


@dataclass
class Told:
    """What became of a file's lines.

    Attributes:
        answered, bad: lines, those of an earlier call among them.
        cut: lines of this call whose answers ended at the most tokens.
        before: lines that an earlier call had answered.
    """

    answered: int = 0
    bad: int = 0
    cut: int = 0
    before: int = 0


def answer_file(
    model: Any,
    processor: Processor,
    prompts: PromptFile,
    out: Path | TextIO,
    how: Answering | None = None,
    made_with: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Told:
    """Answers every line of a file.

    The output is written group by group. Beside a file `out` lies, until it is finished, ``out.unfinished``, by which
    a later call with the same input goes on behind the last whole group.

    Args:
        model, processor: of `gemma_mlx.load`.
        prompts: the lines.
        out: the file to write, or an open one.
        how: how they are answered.
        made_with: whatever else decides the answers (model, adapter); going on with another is refused.
        progress: called with (lines done, lines).

    Raises:
        InputError: a bad row, before anything is written, unless they are skipped; `out` is there and finished, or
            was begun with another input or other options.
    """
    how = how or Answering()
    begun = None if not isinstance(out, Path) else _Begun(out, prompts, how, made_with or {})
    told = Told(before=begun.lines() if begun else 0)
    bad = _checked(processor, prompts, how)
    if bad and not how.skip_bad:
        raise InputError(_refusal(bad, len(prompts)))
    told.answered = told.before
    for start in range(told.before, len(prompts), how.group):
        numbers = range(start, min(start + how.group, len(prompts)))
        found = _answered(model, processor, prompts, numbers, how, bad)
        told.cut += sum(line.get("finish") == "length" for line in found)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        if begun:
            begun.append(text)
        else:
            out.write(text)
            out.flush()
        told.answered += len(found)
        if progress is not None:
            progress(told.answered, len(prompts))
    if begun:
        begun.finish()
    told.bad = len(bad)
    return told


def _checked(processor: Processor, prompts: PromptFile, how: Answering) -> dict[int, str]:
    """Number -> what is wrong, of rows that cannot be answered, as far as headers of media tell."""
    bad = {}
    for i in range(len(prompts)):
        try:
            example = prompts.example(i)
            processor.check(example)
            if how.pieces is None or not is_too_long(processor, example):
                processor.prompt(example, with_features=False)
        except InputError as error:
            bad[i] = str(error)
    return bad


def _refusal(bad: Mapping[int, str], rows: int) -> str:
    first = next(iter(bad.values()))
    more = f" ({len(bad)} of {rows} rows are bad; --on-bad-row skip answers the others)" if len(bad) > 1 else ""
    return first + more


def _answered(
    model: Any, processor: Processor, prompts: PromptFile, numbers: range, how: Answering, bad: dict[int, str]
) -> list[dict[str, Any]]:
    """The output lines of some rows; those that turn out to be bad are added to `bad`."""
    seed = how.settings.seed
    settings = how.settings if seed is None else replace(how.settings, seed=seed + numbers.start)
    rows = {i: prompts.example(i) for i in numbers if i not in bad}
    long = [i for i in rows if how.pieces is not None and is_too_long(processor, rows[i])]
    ready: dict[int, dict[str, Any]] = {}
    for i in long:
        with _sorted_out(i, how, bad):
            transcript = answer_in_pieces(
                model, processor, rows[i], settings=settings, batch_size=how.batch_size, **how.pieces
            )
            ready[i] = _in_pieces(transcript)
    short = [i for i in rows if i not in long]
    try:
        ready |= _together(model, processor, {i: rows[i] for i in short}, settings, how)
    except InputError:
        if not how.skip_bad:
            raise
        for i in short:  # which of them it is, decoding tells
            with _sorted_out(i, how, bad):
                processor.prompt(rows[i])
        ready |= _together(model, processor, {i: rows[i] for i in short if i not in bad}, settings, how)
    return [_line(prompts.written(i), ready.get(i) or {"error": bad[i]}) for i in numbers]


@contextmanager
def _sorted_out(row: int, how: Answering, bad: dict[int, str]) -> Iterator[None]:
    """Where bad rows are skipped, an error inside makes the row one of them."""
    try:
        yield
    except InputError as error:
        if not how.skip_bad:
            raise
        bad[row] = str(error)


def _together(
    model: Any, processor: Processor, rows: Mapping[int, Example], settings: Settings, how: Answering
) -> dict[int, dict[str, Any]]:
    numbers = list(rows)
    found = generation.answers(model, processor, [rows[i] for i in numbers], settings, how.batch_size)
    return {
        numbers[j]: {
            "answer": answer.text, "finish": answer.finish, "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": len(answer.ids),
        }
        for j, answer in found
    }  # fmt: skip


def _in_pieces(found: Transcript) -> dict[str, Any]:
    return {
        "answer": found.text, "finish": "length" if found.unfinished else "stop", "prompt_tokens": found.prompt_tokens,
        "answer_tokens": found.answer_tokens, "pieces": found.timed,
    }  # fmt: skip


def _line(written: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    return {(f"input_{key}" if key in OURS else key): value for key, value in written.items()} | dict(ours)


@dataclass
class _Begun:
    """An output file, and what it was begun with."""

    out: Path
    prompts: PromptFile
    how: Answering
    made_with: Mapping[str, Any]
    _state: Path = field(init=False)

    def __post_init__(self) -> None:
        self._state = self.out.with_name(f"{self.out.name}.unfinished")

    def lines(self) -> int:
        """Lines that are there, in whole groups; what is behind them is taken away.

        Raises:
            InputError: it is finished, or was begun otherwise.
        """
        state = self._told()
        if not self.out.exists():
            return 0
        if not self._state.exists():
            raise InputError(f"{self.out}: there is a file of this name; give another --out, or remove it")
        try:
            before = json.loads(self._state.read_text())
        except (OSError, ValueError) as e:
            raise InputError(f"{self._state}: cannot be read ({e}); remove it and {self.out.name}") from None
        if before != state:
            other = [key for key in {**state, **before} if state.get(key) != before.get(key)]
            raise InputError(
                f"{self.out}: begun with another {', '.join(other)}; give another --out, or remove it and "
                f"{self._state.name}"
            )
        return self._whole_groups()

    def _told(self) -> dict[str, Any]:
        """What decides the output, as JSON gives it back."""
        told = {"input": self.prompts.table.fingerprint(), **self.made_with, **asdict(self.how.settings)}
        told |= {"batch_size": self.how.batch_size, "pieces": self.how.pieces}
        return json.loads(json.dumps(told, default=str))

    def _whole_groups(self) -> int:
        ends = list(_line_ends(self.out))
        rows = len(self.prompts)
        if len(ends) > rows:
            raise InputError(f"{self.out}: {len(ends)} lines for {rows} prompts; remove it, or give another --out")
        kept = len(ends) if len(ends) == rows else len(ends) // self.how.group * self.how.group
        os.truncate(self.out, ends[kept - 1] if kept else 0)
        return kept

    def append(self, text: str) -> None:
        if not self.out.exists():
            write_whole(self._state, (json.dumps(self._told(), indent=2) + "\n").encode())
        with self.out.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        flush(self.out)
        self._state.unlink(missing_ok=True)


def _line_ends(path: Path) -> Iterator[int]:
    """The offset behind each whole line."""
    at = 0
    with path.open("rb") as file:
        for line in file:
            at += len(line)
            if line.endswith(b"\n"):
                yield at
