"""Rows that a model reads quite otherwise than they are written: candidates for deletion."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from gemma_mlx.errors import InputError
from gemma_mlx.files import write_whole
from gemma_mlx.normalizers import normalizer
from gemma_mlx.scoring import metric

FLAGGED = "delete.csv"
"""Named as the folder that it may go into: ``data_patches/<source>/delete/``."""


class Scored(Protocol):
    """What a prediction must tell, as `gemma_mlx.evaluation.Prediction` does; without an id, `row_id` is `where`."""

    row_id: str
    where: str
    task: str
    reference: str
    prediction: str


def check_limit(limit: float) -> None:
    """Refuse what is no word error rate."""
    if not 0.0 <= limit < float("inf"):
        raise InputError(f"--flag-bad-rows {limit:g}: expected a word error rate of 0 or more, such as 0.5")


def flagged(predictions: Iterable[Scored], limit: float, normalize: str = "basic") -> list[tuple[Scored, float]]:
    """Transcripts whose word error rate exceeds `limit`, worst first, each with its rate.

    Args:
        predictions: rows of all tasks; those that are no transcripts are passed over.
        limit: 0.5 flags rows of which more than half the words differ.
        normalize: as for `gemma_mlx.evaluation.evaluate`.
    """
    found = []
    for p in predictions:
        if p.task == "transcript":
            language = getattr(p, "language", "") or None
            clean = normalizer(normalize, language)
            rate = metric("wer", language).score([clean(p.reference)], [clean(p.prediction)])
            if rate > limit:
                found.append((p, rate))
    return sorted(found, key=lambda pair: -pair[1])


def flag_rows(predictions: Sequence[Scored], limit: float, out: Path, normalize: str = "basic") -> str:
    """Write ``delete.csv`` into `out`, and say in a line what is in it.

    Its columns are ``id, wer, reference, prediction, where``. Rows without an id are listed with an empty one: a patch
    cannot name them.

    Raises:
        InputError: as `check_limit`.
    """
    check_limit(limit)
    found = flagged(predictions, limit, normalize)
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["id", "wer", "reference", "prediction", "where"])
    nameless = 0
    for p, rate in found:
        named = p.row_id != p.where
        nameless += not named
        lines.writerow([p.row_id if named else "", f"{rate:.4g}", p.reference, p.prediction, p.where])
    write_whole(out / FLAGGED, text.getvalue().encode())
    transcripts = sum(p.task == "transcript" for p in predictions)
    told = f"{len(found)} of {transcripts} transcripts have a WER above {limit:.0%}: {out / FLAGGED}"
    return f"{told} ({nameless} of them have no id, so a patch cannot delete them)" if nameless else told
