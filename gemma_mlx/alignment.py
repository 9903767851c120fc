"""Which words of a prediction answer to which of its reference, for colouring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gemma_mlx.normalizers import tokens

KINDS = {"equal": "equal", "replace": "substitute", "delete": "delete", "insert": "insert"}


class Piece(NamedTuple):
    """A run of words of one kind: "equal", "substitute" (as many on both sides), "delete" or "insert"."""

    kind: str
    reference: tuple[str, ...]
    prediction: tuple[str, ...]


class Word(NamedTuple):
    """A stretch of a text as it was written, and the kind of its words; "ignored" where the normaliser left nothing."""

    text: str
    kind: str


def opcodes(reference: Sequence[str], prediction: Sequence[str]) -> Iterable[tuple[str, int, int, int, int]]:
    """(kind, start and end in the reference, start and end in the prediction) of the runs of the shortest way; among
    several ways jiwer's. Kinds are the keys of `KINDS`."""
    from rapidfuzz.distance import Levenshtein

    numbers: dict[str, int] = {}
    before, after = ([numbers.setdefault(word, len(numbers)) for word in side] for side in (reference, prediction))
    return Levenshtein.opcodes(before, after)


def align(reference: Sequence[str], prediction: Sequence[str]) -> list[Piece]:
    """The shortest way from reference to prediction, in runs; its counts of each kind are jiwer's."""
    return [
        Piece(KINDS[tag], tuple(reference[i:j]), tuple(prediction[k:m]))
        for tag, i, j, k, m in opcodes(reference, prediction)
    ]


def coloured(
    reference: str, prediction: str, clean: Callable[[str], str], language: str | None = None
) -> tuple[list[Word], list[Word]]:
    """(words of the reference, words of the prediction) as written, each with what the alignment says of it.

    The alignment is that of `clean`ed texts, in letters where the language has no spaces, so its counts are those of
    the word error rate. A written word that became several gets the kind of the first that is not equal.
    """
    sides = [tokens(clean(text), language) for text in (reference, prediction)]
    kinds: tuple[list[str], list[str]] = ([], [])
    for piece in align(*sides):
        kinds[0].extend([piece.kind] * len(piece.reference))
        kinds[1].extend([piece.kind] * len(piece.prediction))
    before = _as_written(reference, sides[0], kinds[0], clean, language)
    return before, _as_written(prediction, sides[1], kinds[1], clean, language)


def _as_written(
    text: str, found: list[str], kinds: list[str], clean: Callable[[str], str], language: str | None
) -> list[Word]:
    words = []
    for stretch, start, end in spans(text, found, clean, language):
        here = kinds[start:end]
        words.append(Word(stretch, next((k for k in here if k != "equal"), "equal") if here else "ignored"))
    return words


def spans(
    text: str, found: Sequence[str], clean: Callable[[str], str], language: str | None = None
) -> list[tuple[str, int, int]]:
    """(stretch of the text, start, end): which of the tokens `found` in the cleaned text each stretch became.

    Stretches are written words with the space after them, in a language without spaces letters; words that are only
    cleaned together ("twenty one" to "21") are one stretch. Joined they give the text, and every token has its stretch
    unless the text has no words.
    """
    written = tokens(text, language)
    starts, end = [0], 0
    for word in written:
        end = text.index(word, end) + len(word)
        starts.append(end + len(text[end:]) - len(text[end:].lstrip()))
    alone = [tokens(clean(word), language) for word in written]
    stretches, word, token = [], 0, 0
    for next_word, next_token in _cuts(alone, found):
        stretches.append((text[starts[word] : starts[next_word]], token, next_token))
        word, token = next_word, next_token
    return stretches


def _cuts(alone: list[list[str]], found: Sequence[str]) -> list[tuple[int, int]]:
    """(words, tokens) before each place where a stretch ends.

    That is after a word next to tokens that are the same whether words are cleaned one by one (`alone`) or together
    (`found`), and after the last.
    """
    where: dict[int, int] = {}  # tokens of words cleaned alone -> tokens found before the same place
    i = k = 0
    for piece in align([token for parts in alone for token in parts], found):
        j, m = i + len(piece.reference), k + len(piece.prediction)
        if piece.kind == "equal":
            where |= {i + n: k + n for n in range(j - i + 1) if n or i not in where}
        elif not piece.reference and i in where:
            where[i] = m  # what was added belongs to the word before
        i, k = j, m
    ends = [sum(map(len, alone[: n + 1])) for n in range(len(alone))]
    cuts = [(n + 1, where[end]) for n, end in enumerate(ends) if end in where]
    last = [(len(alone), len(found))] if alone else []
    return [cut for cut in cuts if cut[0] < len(alone)] + last
