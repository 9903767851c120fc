"""What a row's ``language`` means under the existing tuner's ``language_mode``.

==================  ======================================================================================
``language_mode``   the language that the model is told
==================  ======================================================================================
``strict``          the row's own cell; none where it is empty or ``??`` (unknown)
``mixed``           none, whatever the cell says (``auto`` is the same)
``override:XX``     XX for every row, whatever the cell says; none for ``override:??``
==================  ======================================================================================

No mode leaves a row out. (There the modes act in evaluation alone, its training names no language at all; here they
decide what the transcription prompt says, in training too.) Codes are told by name: ``fr``, ``FR`` and ``fr-CA`` are
"French". What is no known code is told as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_mlx import languages
from gemma_mlx.errors import InputError

UNKNOWN = "??"
STRICT, MIXED, OVERRIDE = "strict", "mixed", "override:"

_LONGER = ("ceb", "fil", "haw", "yue")
NAMES: dict[str, str] = {
    code: name for code, name in languages.names().items() if len(code) == 2 or code in _LONGER
} | {"iw": "Hebrew", "jw": "Javanese"}  # their codes before
"""Code (ISO 639-1, and a few longer ones) -> English name."""


def language_name(code: str) -> str:
    """``French`` of ``fr``, ``FR`` or ``fr-CA``; text that is no known code as it is."""
    code = code.strip()
    return NAMES.get(code.replace("_", "-").split("-")[0].lower(), code)


@dataclass(frozen=True)
class LanguageMode:
    """How a row's language is read; see the top of this file.

    Attributes:
        strict: the row's own cell counts.
        forced: the language of every row; "" for none.
    """

    strict: bool
    forced: str = ""

    @classmethod
    def parse(cls, mode: str) -> LanguageMode:
        """Raises InputError for a mode that there is not."""
        mode = mode.strip()
        if mode == STRICT:
            return cls(True)
        if mode in (MIXED, "auto"):
            return cls(False)
        forced = mode.removeprefix(OVERRIDE).strip()
        if mode.startswith(OVERRIDE) and forced:
            return cls(False, "" if forced == UNKNOWN else language_name(forced))
        raise InputError(f"language_mode: expected {STRICT}, {MIXED} or {OVERRIDE}XX (a language code), got {mode!r}")

    def language(self, cell: Any) -> str:
        """The language that the model is told for a row with this cell; "" for none."""
        text = "" if cell is None else str(cell).strip()
        return self.forced if not self.strict else "" if text == UNKNOWN else language_name(text)
