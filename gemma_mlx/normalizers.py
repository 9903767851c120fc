"""What is done to reference and prediction before they are compared: spelling that is no error is made equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from gemma_mlx.errors import InputError
from gemma_mlx.languages import language_code

NAMES = ("whisper", "basic", "none", "squad")
Normalizer = Callable[[str], str]

SPACELESS = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my"})
"""Codes of languages that are written without spaces between words."""
# ISO 639 code -> the class of `whisper_normalizer.indic` for its script's spellings
_INDIC = {
    **dict.fromkeys(("hi", "mr", "ne", "sa", "kok", "mai", "bh"), "DevanagariNormalizer"),
    **{"pa": "PunjabiNormalizer", "gu": "GujaratiNormalizer", "or": "OdiaNormalizer", "bn": "BengaliNormalizer"},
    **{"as": "BengaliNormalizer", "ta": "TamilNormalizer", "te": "TeluguNormalizer", "kn": "KannadaNormalizer"},
    "ml": "MalayalamNormalizer",
}
# Vowel points, Koran signs and the lengthening stroke: the same word is written with or without them.
_POINTS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    "\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]"
)
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]"


def normalizer(name: str, language: str | None = None) -> Normalizer:
    """The function that prepares a text; both sides of a comparison pass it.

    - ``whisper``: English as OpenAI's Whisper is scored (numbers as digits, contractions written out, British spelling
      as American, fillers dropped); other languages in its basic form (lower case, no punctuation, nothing in
      brackets), but with combining marks kept, digits of all scripts as 0-9, one spelling for each Indic letter,
      optional Arabic and Hebrew vowel points dropped, and no spaces in languages that do not write them.
    - ``basic``: `basic`. ``none``: `whitespace`. ``squad``: `squad`. These do not ask for the language.

    Args:
        language: code or English name, as in a row's ``language`` cell; unknown ones get the basic form.

    Raises:
        InputError: another name.
    """
    if name not in NAMES:
        raise InputError(f"normalize: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {name!r}")
    return _whisper(language_code(language)) if name == "whisper" else _PLAIN[name]


def spaceless(language: str | None) -> bool:
    """Whether the language is written without spaces between words, so that its words cannot be counted."""
    return language_code(language) in SPACELESS


def tokens(text: str, language: str | None = None) -> list[str]:
    """What an error rate counts as words: the words, and in a language without spaces each letter of its script.

    A letter is a grapheme cluster, so a Thai consonant and its vowel sign are one. Words of other scripts inside
    such a text stay words.
    """
    return _letters(text) if spaceless(language) else text.split()


def basic(text: str) -> str:
    """Lower case, punctuation and symbols to spaces, apostrophes inside words dropped, single spaces (NFKC)."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text).split())


def whitespace(text: str) -> str:
    """Single spaces, nothing else changed."""
    return " ".join(text.split())


def squad(text: str) -> str:
    """As SQuAD is scored: lower case, ASCII punctuation and the articles a, an, the dropped, single spaces."""
    text = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_PLAIN: dict[str, Normalizer] = {"basic": basic, "none": whitespace, "squad": squad}


@cache
def _whisper(code: str | None) -> Normalizer:
    if code == "en":
        from whisper_normalizer.english import EnglishTextNormalizer

        english = EnglishTextNormalizer()
        return lambda text: whitespace(english(text))
    from whisper_normalizer.basic import BasicTextNormalizer

    plain, spelled = BasicTextNormalizer(preserve_marks=True), _indic(code)
    shape = _unspaced if code in SPACELESS else whitespace
    lower = str.maketrans(
        {"İ": "i", "I": "ı"} if code in ("tr", "az") else {"İ": "i"}
    )  # else "i" and a dot that is a mark

    def clean(text: str) -> str:
        text = text.translate(lower)
        text = _POINTS.sub("", _digits(plain(text)))
        text = plain(_visible(spelled(text)))  # again, since a letter's other spelling may have been punctuation
        return unicodedata.normalize("NFKC", shape(text))

    return clean


def _indic(code: str | None) -> Normalizer:
    """One spelling for letters that Unicode can write in several ways.

    The package's classes also write numbers as words, one number inside another ("112" by way of "12"), and refuse
    decimals and digits of other scripts: digits are kept from them.
    """
    if code not in _INDIC:
        return str
    from whisper_normalizer import indic

    spell = getattr(indic, _INDIC[code])()
    return lambda text: "".join(part if part.isdigit() else spell(part) for part in re.split(r"(\d+)", text))


def _digits(text: str) -> str:
    """Decimal digits of every script as 0-9."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _visible(text: str) -> str:
    """Without characters that are not seen (joiners, direction marks); the zero-width space is a space."""
    text = text.replace("\u200b", " ")
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _letters(text: str) -> list[str]:
    import regex  # knows scripts and grapheme clusters

    found = []
    for word in text.split():
        found += regex.findall(rf"(?={_UNSPACED})\X|(?:(?!{_UNSPACED})\X)+", word)
    return found


def _unspaced(text: str) -> str:
    """Spaces only between words of scripts that use them."""
    import regex

    return regex.sub(rf"(?<={_UNSPACED}\p{{M}}*) | (?={_UNSPACED})", "", whitespace(text))
