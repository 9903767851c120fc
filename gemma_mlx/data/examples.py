"""Row -> Example: which cell is the prompt, which the answer, and where the media are.

====================================  ===================================================================
columns with something in them        the example
====================================  ===================================================================
``audio_path, text``                  user: transcription prompt, audio · model: text
``image_path, caption``               user: image, caption prompt · model: caption
``image_path, question, answer``      user: image, question · model: answer
``video_path, caption``               user: video, caption prompt · model: caption; or with a question, as pictures
``prompt, response``                  user: prompt · model: response
``image_path, audio_path, …``         user: image, prompt, audio · model: answer, response, caption or text
``audio_path, answer``                user: audio (the question is spoken) · model: answer
``text``                              completion: ``<bos>`` text ``<eos>``, with a loss on every token
====================================  ===================================================================

- An empty cell means that this row has no such thing, so one file may mix row types.
- The answer is the first of ``answer``, ``response``, ``caption``, ``text`` that is not empty.
- The prompt is the first of ``question``, ``prompt`` that is not empty; else, where the answer comes from ``text`` or
  ``caption`` and there is a medium, a default prompt: to transcribe if there is audio, to describe if there is only an
  image or a video. ``language`` ("French") goes into the transcription prompt.
- Images and videos stand before the text and audio after it, as Google recommends.
- ``system`` is a system turn; ``id`` names the row in reports (otherwise file:line does).
- Other columns are ignored. A column mapping ``{"text": "sentence"}`` reads ``text`` from the file's column
  ``sentence``; ``{"text": ""}`` leaves a column of the file unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError

ANSWERS = ("answer", "response", "caption", "text")
PROMPTS = ("question", "prompt")
MEDIA = ("image_path", "video_path", "audio_path")
STANDARD = (*MEDIA, *PROMPTS, *ANSWERS, "system", "language", "id")
# A medium's column under another name would otherwise be ignored, and the model trained on text alone.
_MISNAMED = {
    **dict.fromkeys(("audio", "audio_file", "audio_filename", "audiopath", "wav", "wav_path"), "audio_path"),
    **dict.fromkeys(("image", "image_file", "image_filename", "imagepath", "img", "img_path"), "image_path"),
    **dict.fromkeys(("video", "video_file", "video_filename", "videopath", "mp4", "mp4_path"), "video_path"),
}


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text in a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a turn, by its file."""

    path: Medium


@dataclass(frozen=True, slots=True)
class Video:
    """A video in a turn, by its file; its sound is not heard."""

    path: Medium


@dataclass(frozen=True, slots=True)
class Audio:
    """A clip in a turn, by its file."""

    path: Medium


Part = Text | Image | Video | Audio


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role ("system", "user" or "model") says: parts in reading order."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to learn from, or, where `completion` is true, one text to go on with.

    Attributes:
        turns: in order; a completion has one "model" turn with one `Text`.
        where: "train.csv:8", for messages.
        row_id: the row's name in reports.
        completion: the text stands alone, outside any chat template.
        task: "transcript" where the model is to write down what a clip says, else "answer": how it is scored.
    """

    turns: tuple[Turn, ...]
    where: str = ""
    row_id: str = ""
    completion: bool = False
    task: str = "answer"

    def media(self) -> list[Image | Video | Audio]:
        """Pictures, videos and clips in reading order."""
        return [part for turn in self.turns for part in turn.parts if not isinstance(part, Text)]

    @property
    def reference(self) -> str:
        """The text of the last model turn: what a prediction is compared with ("" if there is none)."""
        turn = self.turns[-1] if self.turns and self.turns[-1].role == "model" else None
        return "".join(part.text for part in turn.parts if isinstance(part, Text)) if turn else ""


_ONLY = " Write only the transcription, without line breaks."
TRANSCRIBE = "Transcribe the following speech segment in its original language." + _ONLY
TRANSCRIBE_IN = "Transcribe the following speech segment in {language} into {language} text." + _ONLY
DESCRIBE = "Describe this image."
DESCRIBE_VIDEO = "Describe this video."


@dataclass(frozen=True)
class Prompts:
    """What is said in rows that do not say it themselves; None for the defaults.

    Attributes:
        audio: beside a clip; ``{language}`` stands for the row's language. Default: `TRANSCRIBE`, or `TRANSCRIBE_IN` if
            the row names a language.
        image: beside a picture or video that comes without a clip. Default: `DESCRIBE` or `DESCRIBE_VIDEO`.
        system: a system turn before every conversation. Default: none.
    """

    audio: str | None = None
    image: str | None = None
    system: str | None = None


@dataclass
class RowReader:
    """Turns rows of one table into examples by the rules at the top of this file.

    Args:
        columns: the table's columns.
        folders: where media are.
        table: the file's name, for messages.
        mapping: standard name -> column of the file.
        prompts: default prompts.
        need_answer: false to accept rows without an answer (for prediction).

    Raises:
        InputError: the mapping names unknown columns, or no column can give an answer.
    """

    columns: tuple[str, ...]
    folders: Folders
    table: str
    mapping: Mapping[str, str] = field(default_factory=dict)
    prompts: Prompts = field(default_factory=Prompts)
    need_answer: bool = True

    def __post_init__(self) -> None:
        found = f"found {', '.join(self.columns)}"
        for name, column in self.mapping.items():
            if name not in STANDARD:
                raise InputError(f"--columns {name}={column}: unknown name {name!r}; known: {', '.join(STANDARD)}")
            if column and column not in self.columns:
                raise InputError(f"{self.table}:1: missing column {column!r} (mapped to {name!r}); {found}")
        self._source = {name: self.mapping.get(name, name) for name in STANDARD}
        self._source = {name: column for name, column in self._source.items() if column in self.columns}
        for column in self.columns:
            name = _MISNAMED.get(column.lower(), "")
            if name and name not in self._source and name not in self.mapping and column not in self._source.values():
                raise InputError(
                    f"{self.table}:1: missing column {name!r}; {found}: rename {column!r}, or map it with --columns "
                    f"{name}={column} (--columns {name}= leaves it unread)"
                )
        if self.need_answer and not any(name in self._source for name in ANSWERS):
            raise InputError(
                f"{self.table}:1: missing column: none of {', '.join(ANSWERS)}; {found}. Name the column that the "
                f"model is to learn, or map it: --columns text={self.columns[-1]}"
            )

    def example(self, row: Row) -> Example:
        """The example of one row.

        Raises:
            InputError: naming file:line; no text to learn, no prompt where one is needed, or media not found.
        """
        cell = {name: row.values[column] for name, column in self._source.items()}
        given = {name: value for name, value in cell.items() if value.strip()}
        row_id = given.get("id", row.where).strip()
        target = next((name for name in ANSWERS if name in given), None)
        if target is None and self.need_answer:
            names = [self._source[name] for name in ANSWERS if name in self._source]
            raise InputError(
                f"{row.where}: empty text: nothing in {' or '.join(map(repr, names))} for the model to learn; "
                "fill the cell or remove the row"
            )
        prompt = next((given[name] for name in PROMPTS if name in given), None)
        media = [name for name in MEDIA if name in given]
        if not media and prompt is None and target == "text":
            return Example((Turn("model", (Text(given["text"]),)),), row.where, row_id, completion=True)
        if prompt is None:
            prompt = self._default_prompt(target, media, given, row)
        parts: list[Part] = []
        if "image_path" in media:
            parts.append(Image(self._find("image_path", given, row)))
        if "video_path" in media:
            parts.append(Video(self._find("video_path", given, row)))
        if prompt:
            parts.append(Text(prompt))
        if "audio_path" in media:
            parts.append(Audio(self._find("audio_path", given, row)))
        turns = [Turn("user", tuple(parts))]
        if system := given.get("system", self.prompts.system):
            turns.insert(0, Turn("system", (Text(system),)))
        if target is not None:
            turns.append(Turn("model", (Text(given[target]),)))
        task = "transcript" if target == "text" and "audio_path" in media else "answer"
        return Example(tuple(turns), row.where, row_id, task=task)

    def _find(self, name: str, given: dict[str, str], row: Row) -> Medium:
        return self.folders.find(given[name].strip(), self._source[name], row.where)

    def _default_prompt(self, target: str | None, media: list[str], given: dict[str, str], row: Row) -> str:
        """What the user says where neither `question` nor `prompt` does; "" where the clip is the question."""
        if "audio_path" in media and target in ("answer", "response"):
            return ""
        if not media or target in ("answer", "response"):
            columns = " or ".join(map(repr, PROMPTS))
            what = f"{self._source[target]!r} is an answer to nothing" if target else "nothing to answer"
            raise InputError(
                f"{row.where}: empty text: {what}; fill a column {columns}, or give a file in a media column"
            )
        if "audio_path" not in media:
            return self.prompts.image or (DESCRIBE if "image_path" in media else DESCRIBE_VIDEO)
        language = given.get("language", "").strip()
        prompt = self.prompts.audio or (TRANSCRIBE_IN if language else TRANSCRIBE)
        if "{language}" in prompt and not language:
            raise InputError(f"{row.where}: the audio prompt has {{language}}, but the row names none; fill 'language'")
        return prompt.replace("{language}", language)
