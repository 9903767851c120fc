"""Answers to all rows, chunk by chunk, each chunk finished in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from gemma_mlx.batch import Batch, unit_range
from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import Example
from gemma_mlx.data.features import MEL_BINS, SILENCE
from gemma_mlx.data.processor import Processor
from gemma_mlx.evaluating.ledger import Record
from gemma_mlx.evaluating.likelihood import row_likelihoods, samples_of
from gemma_mlx.evaluating.rows import seconds_of
from gemma_mlx.generation import answers
from gemma_mlx.models.media import MEDIA
from gemma_mlx.sampling import Settings

GREY = 0.5
CHUNK = 4
"""Batches that are finished together: the next rows can take the place of short answers within them."""


@dataclass(frozen=True)
class Asking:
    """How rows are answered.

    Attributes:
        max_tokens: the most tokens of an answer.
        batch_size: rows answered at a time.
        without_media: silence for every clip, grey for every picture.
        likelihood: whether the references' likelihoods are measured too.
    """

    max_tokens: int = 128
    batch_size: int = 8
    without_media: bool = False
    likelihood: bool = False

    def told(self) -> dict[str, str]:
        """In words, by name."""
        return {name: str(value) for name, value in asdict(self).items()}


def batches_of(lengths: list[int], size: int) -> list[list[int]]:
    """Row numbers of each chunk: rows of similar length together, the longest first. Depends on nothing else."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def answer_all(
    model: Any, processor: Processor, examples: list[Example], lengths: list[int], asking: Asking, ledger: Any,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:  # fmt: skip
    """A record of every row, in order: ``i``, ``text``, ``finish`` ("stop" or "length"), ``seconds`` (of its clips),
    and with likelihoods ``nll``, ``labels``, ``correct``. Chunks that the ledger holds are not answered again.

    Args:
        lengths: tokens of each row's prompt.
        ledger: has ``finished`` and ``add``, as `gemma_mlx.evaluating.ledger.Ledger`.
        progress: called with (done, all) after each chunk.
    """
    for chosen in batches_of(lengths, CHUNK * asking.batch_size):
        if not all(i in ledger.finished for i in chosen):
            rows, sizes = ([of[i] for i in chosen] for of in (examples, lengths))
            found = _answered(model, processor, rows, sizes, asking)
            ledger.add([{"i": i, **record} for i, record in zip(chosen, found, strict=True)])
        if progress:
            progress(len(ledger.finished), len(examples))
    return [ledger.finished[i] for i in range(len(examples))]


def _answered(
    model: Any, processor: Processor, examples: list[Example], lengths: list[int], asking: Asking
) -> Iterator[Record]:
    """What is found of each row of a chunk."""
    records: list[Record] = [{} for _ in examples]
    asked = [i for i, example in enumerate(examples) if not example.completion]
    said = _said(model, processor, [examples[i] for i in asked], [lengths[i] for i in asked], asking)
    for i, (text, finish) in zip(asked, said, strict=True):
        records[i] |= {"text": text, "finish": finish}
    if asking.likelihood:
        sums = np.concatenate([
            row_likelihoods(model, _batch(processor, samples_of(processor, part), asking))
            for part in _parts(examples, asking.batch_size)
        ])  # fmt: skip
        for record, (nll, labels, correct) in zip(records, sums.tolist(), strict=True):
            record |= {"nll": nll, "labels": int(labels), "correct": int(correct)}
    for record, example in zip(records, examples, strict=True):
        yield {**record, "seconds": seconds_of(example, processor)}


def _said(
    model: Any, processor: Processor, examples: list[Example], lengths: list[int], asking: Asking
) -> list[tuple[str, str]]:
    """(answer, how it finished) of each row."""
    found = dict(answers(
        model, processor, examples, Settings(asking.max_tokens), asking.batch_size, lengths=lengths,
        alter=muted if asking.without_media else None,
    ))  # fmt: skip
    return [(found[i].text, found[i].finish) for i in range(len(examples))]


def _parts(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _batch(processor: Processor, samples: list[Any], asking: Asking) -> Batch:
    batch = collate(samples, pad_id=processor.pad_id)
    return muted(batch) if asking.without_media else batch


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
