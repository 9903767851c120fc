"""NeMo and Granary manifests: JSON lines with ``audio_filepath``, ``text``, ``offset``, ``duration`` and languages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from gemma_mlx.data.blob import Medium, described
from gemma_mlx.data.examples import TRANSCRIBE, TRANSCRIBE_IN
from gemma_mlx.data.opening import opened
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.table import Row, Table
from gemma_mlx.errors import InputError

KEY = "audio_filepath"
SLACK = 0.1
"""Seconds by which a stretch may end after its clip does: manifests round."""
LANGUAGES = {
    "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "et": "Estonian", "fi": "Finnish", "fr": "French", "hr": "Croatian", "hu": "Hungarian", "it": "Italian",
    "lt": "Lithuanian", "lv": "Latvian", "mt": "Maltese", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sv": "Swedish", "uk": "Ukrainian",
    "ar": "Arabic", "hi": "Hindi", "ja": "Japanese", "ko": "Korean", "tr": "Turkish", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip
"""Granary's languages and some more; any other code is used as it stands."""
TRANSLATE = "Translate the following speech segment from {source} into {target}. "
TRANSLATE_ONLY = "Write only the translation, without line breaks."
PLAIN = " Use neither punctuation nor capital letters."
_OWN = {KEY, "text", "answer", "offset", "duration", "lang", "source_lang", "target_lang", "taskname", "pnc"}


@dataclass(frozen=True, slots=True)
class Cut:
    """A stretch of a clip as a WAV file of its own: same rate and channels, 16 bits as 16 bits, all else as float32.

    `start` and `seconds` as in the manifest; the stretch begins at sample round(start · rate).
    """

    medium: Medium
    start: float
    seconds: float
    where: str

    @property
    def name(self) -> str:
        return f"{described(self.medium)}[{self.start:g}s+{self.seconds:g}s]"

    @property
    def suffix(self) -> str:
        return ".wav"

    def size(self) -> int:
        with self.open() as file:
            return file.seek(0, io.SEEK_END)

    def open(self) -> BinaryIO:
        import soundfile

        told = f"{self.where}: {self.name}"
        try:
            with opened(self.medium, self.where, "empty audio") as source, soundfile.SoundFile(source) as clip:
                rate, exact = clip.samplerate, clip.subtype == "PCM_16"
                first = round(self.start * rate)
                count = round((self.start + self.seconds) * rate) - first
                if first + count > clip.frames + SLACK * rate:
                    raise InputError(
                        f"{told}: the stretch ends at {self.start + self.seconds:g} s, the clip at "
                        f"{clip.frames / rate:g} s; correct offset and duration"
                    )
                clip.seek(min(first, clip.frames))
                samples = clip.read(count, dtype="int16" if exact else "float32", always_2d=True)
            out = io.BytesIO()
            soundfile.write(out, samples, rate, "PCM_16" if exact else "FLOAT", format="WAV")
        except (soundfile.LibsndfileError, OSError) as e:
            raise InputError(
                f"{told}: unreadable audio ({str(e).splitlines()[0]}); stretches are cut from wav, flac, ogg and mp3"
            ) from None
        out.seek(0)
        return out

    def __str__(self) -> str:
        return self.name


class Manifest:
    """A table of our columns over a manifest's; see `Table`.

    ==========================================  ================================================================
    manifest                                    row
    ==========================================  ================================================================
    ``audio_filepath``                          ``audio_path``: the file, or its stretch where there is ``offset``
    ``text``, else ``answer``                   ``text``; ``answer`` where it is a translation
    ``lang``, ``source_lang``                   ``language`` ("de" -> "German")
    ``target_lang`` other than ``source_lang``  ``question``: the prompt to translate
    ``pnc: no``                                 ``question``: the transcription prompt, without punctuation
    anything else                               itself
    ==========================================  ================================================================

    Args:
        inner: the manifest as a table.
        folders: where media are.

    Raises:
        InputError: the manifest is of tar shards, or has no ``audio_filepath``.
    """

    def __init__(self, inner: Table, folders: Folders):
        if "shard_id" in inner.columns:
            raise InputError(
                f"{inner.name}: a manifest of tar shards (shard_id); unpack the shards and use the manifest with "
                "paths of files"
            )
        if KEY not in inner.columns:
            raise InputError(f"{inner.name}: not a NeMo manifest: no {KEY!r}; found {', '.join(inner.columns)}")
        self.inner, self.folders = inner, folders
        self.name, self.base = inner.name, inner.base
        self.units: Sequence[int] | None = inner.units
        self.columns = ("audio_path", "text", "answer", "question", "language", *_others(inner.columns))

    def __len__(self) -> int:
        return len(self.inner)

    def fingerprint(self) -> str:
        return f"nemo:{self.inner.fingerprint()}"

    def __getitem__(self, index: int) -> Row:
        row = self.inner[index]
        text = str(row.values.get("text") or row.values.get("answer") or "")
        source, target = self._languages(row.values)
        translated = bool(target and source and target != source)
        values: dict[str, Any] = {
            "audio_path": self._clip(row),
            "text": "" if translated else text,
            "answer": text if translated else "",
            "question": self._question(row.values, source, target),
            "language": source,
        }
        return Row(values | {name: row.values[name] for name in _others(row.values)}, row.where)

    def _languages(self, values: dict[str, Any]) -> tuple[str, str]:
        source = str(values.get("source_lang") or values.get("lang") or "")
        target = str(values.get("target_lang") or "")
        return tuple(LANGUAGES.get(code.lower(), code) for code in (source, target))

    def _question(self, values: dict[str, Any], source: str, target: str) -> str:
        plain = str(values.get("pnc", "yes")).lower() in ("no", "nopnc", "false")
        if target and source and target != source:
            return TRANSLATE.format(source=source, target=target) + TRANSLATE_ONLY + (PLAIN if plain else "")
        if not plain:
            return ""  # the default prompt, which the user may have set
        return (TRANSCRIBE_IN.format(language=source) if source else TRANSCRIBE) + PLAIN

    def _clip(self, row: Row) -> Any:
        cell, offset, seconds = (row.values.get(name) for name in (KEY, "offset", "duration"))
        if offset in (None, "") or not isinstance(cell, str) or not cell.strip():
            return cell or ""
        medium = self.folders.find(cell.strip(), KEY, row.where)
        try:
            start, length = float(offset), float(seconds)
        except (TypeError, ValueError):
            start = length = -1.0
        if not (0.0 <= start < 1e7 and 0.0 < length < 1e7):
            raise InputError(
                f"{row.where}: offset {offset!r} and duration {seconds!r}: expected seconds, duration above 0"
            )
        return Cut(medium, start, length, row.where)


def _others(names: Any) -> list[str]:
    taken = _OWN | {"audio_path", "question", "language"}
    return [name for name in names if name not in taken]
