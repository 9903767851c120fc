"""A score for a model on a file of rows: answers, compared with what the rows say."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx import scoring
from gemma_mlx.batch import Batch, unit_range
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import Example
from gemma_mlx.data.features import MEL_BINS, SILENCE
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.errors import InputError
from gemma_mlx.files import write_whole
from gemma_mlx.generation import answer_ids, greedy, suppressing
from gemma_mlx.models.media import MEDIA

PREDICTIONS = "predictions.csv"
REPORT = "report.json"
GREY = 0.5


@dataclass(frozen=True)
class Prediction:
    """One row's answer beside its reference."""

    row_id: str
    where: str
    task: str
    """"transcript" or "answer": which score it enters."""
    reference: str
    prediction: str


@dataclass(frozen=True)
class Report:
    """All predictions of one evaluation, in the order of the file, and their scores."""

    predictions: tuple[Prediction, ...]
    normalize: str = "basic"

    @cached_property
    def scores(self) -> dict[str, float | int]:
        """``transcripts`` with ``wer`` and ``cer``, ``answers`` with ``exact_match``: those of which there are any."""
        found: dict[str, float | int] = {}
        references, predictions = self._texts("transcript")
        if references:
            found["transcripts"] = len(references)
            found["wer"] = scoring.word_error_rate(references, predictions)
            found["cer"] = scoring.character_error_rate(references, predictions)
        references, predictions = self._texts("answer")
        if references:
            found["answers"] = len(references)
            found["exact_match"] = scoring.exact_match(references, predictions)
        return found

    def _texts(self, task: str) -> tuple[list[str], list[str]]:
        clean = scoring.NORMALIZERS[self.normalize]
        chosen = [p for p in self.predictions if p.task == task]
        return [clean(p.reference) for p in chosen], [clean(p.prediction) for p in chosen]

    def table(self) -> str:
        """The scores as lines of text."""
        s, lines = self.scores, []
        if "wer" in s:
            lines.append(f"{s['transcripts']} transcripts   WER {s['wer']:.2%}   CER {s['cer']:.2%}")
        if "exact_match" in s:
            lines.append(f"{s['answers']} answers   exact match {s['exact_match']:.2%}")
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """Write ``predictions.csv`` (one line a row) and ``report.json`` (the scores) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{PREDICTIONS}").open("w", newline="", encoding="utf-8") as f:
            out = csv.writer(f)
            out.writerow(["row_id", "where", "task", "reference", "prediction", "errors"])
            for p in self.predictions:
                out.writerow([p.row_id, p.where, p.task, p.reference, p.prediction, f"{self._error(p):.4g}"])
        (folder / f".{PREDICTIONS}").replace(folder / PREDICTIONS)
        report = {**self.scores, "normalize": self.normalize}
        write_whole(folder / REPORT, (json.dumps(report, indent=2) + "\n").encode())

    def _error(self, p: Prediction) -> float:
        """Word error rate of a transcript; 0 or 1 for an answer."""
        clean = scoring.NORMALIZERS[self.normalize]
        reference, prediction = clean(p.reference), clean(p.prediction)
        if p.task == "transcript":
            return scoring.word_error_rate([reference], [prediction])
        return float(reference != prediction)


def evaluate(
    model: Any,
    processor: Processor,
    data: str | Path | Sequence[Example],
    out: str | Path | None = None,
    *,
    max_tokens: int = 128,
    batch_size: int = 8,
    limit: int | None = None,
    normalize: str = "basic",
    without_media: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> Report:
    """Answer every row greedily and compare with its reference.

    ``data``: what `gemma_mlx.data.rows.Rows` reads (``reading``: its options, such as ``media_roots`` and ``columns``)
    or examples.
    Rows with a clip whose reference is its ``text`` are transcripts and get word and character error rates; all others
    are answers and count as right when equal after ``normalize`` ("basic": case, punctuation and spacing do not count;
    "none": only spacing). ``without_media`` gives silence for every clip and grey for every picture: what the model
    then says is guessed. ``progress(done, all)`` is called after each batch. With ``out`` the report is written there.

    Raises InputError for bad rows, naming file and line, before the first answer.
    """
    if normalize not in scoring.NORMALIZERS:
        raise InputError(f"normalize: expected {' or '.join(scoring.NORMALIZERS)}, got {normalize!r}")
    if isinstance(data, str | Path):
        options = {"max_tokens": max_tokens, "batch_size": batch_size, "limit": limit, "normalize": normalize}
        options |= {"without_media": without_media, "progress": progress}
        named = [str(data), *map(str, reading.get("media_roots", ()))]
        with reading.pop("fetcher", None) or LazyFetcher(named) as fetcher:
            return evaluate(model, processor, read_examples(data, fetcher=fetcher, **reading), out, **options)
    examples = _with_references(list(data)[:limit])
    answers: dict[int, str] = {}
    sampler = suppressing(greedy, processor.suppressed_ids)
    for chosen, batch in _batches(processor, examples, batch_size):
        batch = muted(batch) if without_media else batch
        found = answer_ids(model, batch, processor.eos_ids, max_tokens, sampler)
        for i, ids in zip(chosen, found, strict=True):
            answers[i] = processor.decode(ids)
        if progress:
            progress(len(answers), len(examples))
    report = Report(tuple(_prediction(e, answers[i]) for i, e in enumerate(examples)), normalize)
    if out is not None:
        report.write(out)
    return report


def _prediction(example: Example, answer: str) -> Prediction:
    return Prediction(example.row_id, example.where, example.task, example.reference, answer)


def _with_references(examples: list[Example]) -> list[Example]:
    """The examples themselves; raises InputError where one has nothing to be compared with."""
    for example in examples:
        if example.completion:
            raise InputError(f"{example.where}: nothing but text, so no answer to score; add a prompt or media")
    return examples


def _batches(processor: Processor, examples: list[Example], size: int):
    """(indices, prompts as a batch), rows of similar length together: by media size first, prompts decoded lazily."""
    lengths = [len(processor.prompt(e, with_features=False).input_ids) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([processor.prompt(examples[i]) for i in chosen], pad_id=processor.pad_id)


def muted(batch: Batch) -> Batch:
    """The batch with silence in place of sound and mid-grey in place of pictures, of the same sizes."""
    changes = {}
    if batch.input_features is not None:
        silence = SILENCE if batch.input_features.shape[-1] == MEL_BINS else 0.0  # else raw samples
        changes["input_features"] = _filled(batch.input_features, batch.input_features_mask, silence)
    for pixels, positions in MEDIA.values():
        if pixels != "input_features" and (given := getattr(batch, pixels)) is not None:
            changes[pixels] = _filled(unit_range(given), (getattr(batch, positions) >= 0).all(-1), GREY)
    return replace(batch, **changes, digests={})


def _filled(like: np.ndarray, valid: np.ndarray, value: float) -> np.ndarray:
    """``value`` where ``valid`` and zero elsewhere, in the shape and type of ``like``."""
    out = np.zeros_like(like)
    out[valid] = value
    return out
