"""Predictions against references: word and character error rates, exact match."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import jiwer


def basic(text: str) -> str:
    """Lower case, punctuation and symbols to spaces, apostrophes inside words dropped, single spaces (NFKC)."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text).split())


def whitespace(text: str) -> str:
    """Single spaces, nothing else changed."""
    return " ".join(text.split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"basic": basic, "none": whitespace}
"""What is done to reference and prediction before they are compared."""


def word_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Word errors over reference words of the whole corpus; may exceed 1. Empty references count insertions only."""
    return _corpus_rate(jiwer.process_words, references, predictions)


def character_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Character errors over reference characters of the whole corpus; may exceed 1."""
    return _corpus_rate(jiwer.process_characters, references, predictions)


def _corpus_rate(process: Callable, references: Sequence[str], predictions: Sequence[str]) -> float:
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
    pairs = list(zip(references, predictions, strict=True))
    spoken = [(r, p) for r, p in pairs if r]  # jiwer refuses empty references
    inserted = sum(len(p.split()) if process is jiwer.process_words else len(p) for r, p in pairs if not r)
    if not spoken:
        return float(bool(inserted))
    measured = process([r for r, _ in spoken], [p for _, p in spoken])
    errors = measured.substitutions + measured.deletions + measured.insertions + inserted
    return errors / (measured.hits + measured.substitutions + measured.deletions)


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that equal their reference."""
    return sum(r == p for r, p in zip(references, predictions, strict=True)) / max(len(references), 1)
