"""Row -> Example: which cell is the prompt, which the answer, and where the media are.

====================================  ===================================================================
columns with something in them        the example
====================================  ===================================================================
``audio_path, text``                  user: transcription prompt, audio · model: text
``image_path, caption``               user: image, caption prompt · model: caption
``image_path, question, answer``      user: image, question · model: answer
``video_path, caption``               user: video, caption prompt · model: caption; or with a question, as pictures
``prompt, response``                  user: prompt · model: response (or ``completion``)
``image_path, audio_path, …``         user: image, prompt, audio · model: answer, response, caption or text
``audio_path, answer``                user: audio (the question is spoken) · model: answer
``text``                              completion: ``<bos>`` text ``<eos>``, with a loss on every token
``messages`` or ``conversations``     the conversation, as `gemma_mlx.data.messages` reads it; with ``tools``
====================================  ===================================================================

- An empty cell means that this row has no such thing, so one file may mix row types.
- A conversation comes before everything else in its row but ``system``, ``id`` and the media.
- The answer is the first of ``answer``, ``response``, ``completion``, ``caption``, ``text`` that is not empty.
- The prompt is the first of ``question``, ``prompt`` that is not empty; else, where the answer comes from ``text`` or
  ``caption`` and there is a medium, a default prompt: to transcribe if there is audio, to describe if there is only an
  image or a video. ``language`` ("French") goes into the transcription prompt.
- Prompt and answer may also be lists of messages; model turns of the prompt carry no loss.
- Images and videos stand before the text and audio after it, as Google recommends.
- A media cell may hold a list (in CSV its JSON text), and a `Blob` or bytes where the table has them. Such cells are
  also read from the columns ``image``, ``images``, ``video``, ``videos``, ``audio`` and ``audios``.
- ``system`` is a system turn; ``id`` names the row in reports (otherwise file:line does).
- Other columns are ignored. A column mapping ``{"text": "sentence"}`` reads ``text`` from the file's column
  ``sentence``; ``{"text": ""}`` leaves a column of the file unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.messages import MessageReader, tools_of
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.turns import Audio, Example, Image, Part, Text, Turn, Video, system_turns
from gemma_mlx.data.values import filled, first_medium, is_path, media_of, objects_of, text_of
from gemma_mlx.errors import InputError

__all__ = ["Audio", "Example", "Image", "Part", "Prompts", "RowReader", "Text", "Turn", "Video"]

ANSWERS = ("answer", "response", "completion", "caption", "text")
PROMPTS = ("question", "prompt")
MEDIA = {kind: (f"{kind}_path", kind, f"{kind}s") for kind in ("image", "video", "audio")}
"""Kind -> the columns that it may stand in; without a mapping, text is read from the first alone."""
_REPLIES = ("answer", "response", "completion")
"""Answers to something that the user said."""
CONVERSATIONS = ("messages", "conversations")
_MEDIA_NAMES = tuple(name for names in zip(*MEDIA.values(), strict=True) for name in names)
STANDARD = (*_MEDIA_NAMES, *PROMPTS, *ANSWERS, *CONVERSATIONS, "tools", "system", "language", "id")
# A medium's column under another name would otherwise be ignored, and the model trained on text alone.
_MISNAMED = {
    **dict.fromkeys(("audio", "audios", "audio_file", "audio_filename", "audiopath", "wav", "wav_path"), "audio_path"),
    **dict.fromkeys(("image", "images", "image_file", "image_filename", "imagepath", "img", "img_path"), "image_path"),
    **dict.fromkeys(("video", "videos", "video_file", "video_filename", "videopath", "mp4", "mp4_path"), "video_path"),
}


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

    def of_clip(self, language: str | None) -> str | None:
        """What is said beside a clip in this language; None where that needs a language and none is known."""
        prompt = self.audio or (TRANSCRIBE_IN if language else TRANSCRIBE)
        return None if "{language}" in prompt and not language else prompt.replace("{language}", language or "")

    def of_picture(self, still: bool) -> str:
        """What is said beside a picture, or a video."""
        return self.image or (DESCRIBE if still else DESCRIBE_VIDEO)


@dataclass
class RowReader:
    """Turns rows of one table into examples by the rules at the top of this file.

    Args:
        columns: the table's columns; where rows differ, rows may have others.
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
        mapped = set(self.mapping.values())
        aliases = {name for name in _MEDIA_NAMES if not name.endswith("_path")}
        self._source = {name: self.mapping.get(name, name) for name in STANDARD}
        self._source = {
            name: column
            for name, column in self._source.items()
            if column and not (name in aliases and name not in self.mapping and column in mapped)
        }
        for column in self.columns:
            if column not in aliases:
                self._check_name(column)
        answers = [name for name in (*ANSWERS, *CONVERSATIONS) if self._source.get(name) in self.columns]
        if self.need_answer and not answers:
            raise InputError(
                f"{self.table}:1: missing column: none of {', '.join((*ANSWERS, *CONVERSATIONS))}; {found}. Name the "
                f"column that the model is to learn, or map it: --columns text={self.columns[-1]}"
            )
        self._checked = {*self.columns, *aliases}

    def _check_name(self, column: str) -> None:
        """Refuses a media column under a name that is not read, where nothing else gives such a medium."""
        name = _MISNAMED.get(column.lower(), "")
        read = {source for source in self._source.values() if source in self.columns} - {column}
        if name and name not in self.mapping and self._source[name] not in read and column not in self.mapping.values():
            raise InputError(
                f"{self.table}:1: missing column {name!r}; found {', '.join(self.columns)}: rename {column!r}, or map "
                f"it with --columns {name}={column} (--columns {name}= leaves it unread)"
            )

    def example(self, row: Row) -> Example:
        """The example of one row.

        Raises:
            InputError: naming file:line; no text to learn, no prompt where one is needed, or media not found.
        """
        for column in row.values.keys() - self._checked:
            self._check_name(column)
            self._checked.add(column)
        given = {name: value for name, column in self._source.items() if filled(value := row.values.get(column))}
        row_id = self._text("id", given, row).strip() or row.where
        if (found := self._messages(given, row)) is not None:
            return self._conversation(*found, given, row, row_id)
        target = next((name for name in ANSWERS if name in given), None)
        if target is None and self.need_answer:
            known = [self._source[name] for name in (*ANSWERS, *CONVERSATIONS) if name in self._source]
            columns = [column for column in known if column in row.values or column in self.columns]
            raise InputError(
                f"{row.where}: empty text: nothing in {' or '.join(map(repr, columns))} for the model to learn; "
                "fill the cell or remove the row"
            )
        asked = next((name for name in PROMPTS if name in given), None)
        media = self._media(given, row)
        answer = self._text(target, given, row)
        if not media and asked is None and target == "text":
            return Example((Turn("model", (Text(answer),)),), row.where, row_id, completion=True)
        prompt = self._text(asked, given, row) if asked else self._default_prompt(target, media, given, row)
        parts: list[Part] = [Image(medium) for medium in media.get("image", ())]
        parts += [Video(medium) for medium in media.get("video", ())]
        parts += [Text(prompt)] if prompt else []
        parts += [Audio(medium) for medium in media.get("audio", ())]
        turns = [*self._system(given, row), Turn("user", tuple(parts))]
        if target is not None:
            turns.append(Turn("model", (Text(answer),)))
        task = "transcript" if target == "text" and "audio" in media else "answer"
        return Example(tuple(turns), row.where, row_id, task=task, tools=self._tools(given, row))

    def cells(self, row: Row) -> dict[str, Any]:
        """Column -> cell of one row, under the table's names and, where those are mapped, the standard ones too."""
        mapped = {name: row.values[column] for name, column in self.mapping.items() if column in row.values}
        return {**row.values, **mapped}

    def _text(self, name: str | None, given: Mapping[str, Any], row: Row) -> str:
        """A cell's text; "" where it is empty."""
        return text_of(given[name], f"{row.where}: {self._source[name]}") if name in given else ""

    def _system(self, given: Mapping[str, Any], row: Row) -> tuple[Turn, ...]:
        return system_turns(self._text("system", given, row) or self.prompts.system)

    def _tools(self, given: Mapping[str, Any], row: Row) -> tuple[dict[str, Any], ...]:
        return tools_of(given["tools"], row.where) if "tools" in given else ()

    def _messages(self, given: Mapping[str, Any], row: Row) -> tuple[list[Mapping[str, Any]], int] | None:
        """(the row's messages, how many of them are a prompt); None where the row is no conversation."""
        if (name := next((name for name in CONVERSATIONS if name in given), None)) is not None:
            return objects_of(given[name], f"{row.where}: {self._source[name]}"), 0
        asked, target = (next((n for n in names if n in given), None) for names in (PROMPTS, ANSWERS))
        if not any(isinstance(given.get(name), (list, tuple)) for name in (asked, target)):
            return None
        before, after = (self._said(n, role, given, row) for n, role in ((asked, "user"), (target, "assistant")))
        return [*before, *after], len(before)

    def _said(self, name: str | None, role: str, given: Mapping[str, Any], row: Row) -> list[Mapping[str, Any]]:
        if isinstance(given.get(name), (list, tuple)):
            return objects_of(given[name], f"{row.where}: {self._source[name]}")
        return [{"role": role, "content": self._text(name, given, row)}] if name else []

    def _conversation(
        self, messages: Sequence[Mapping[str, Any]], prompts: int, given: Mapping[str, Any], row: Row, row_id: str
    ) -> Example:
        media = self._media(given, row, in_places=True)
        turns = MessageReader(self.folders, row.where, media).turns(messages, prompts)
        if turns[0].role != "system":
            turns = (*self._system(given, row), *turns)
        elif "system" in given:
            raise InputError(f"{row.where}: a system message and something in {self._source['system']!r}; leave one")
        if self.need_answer and turns[-1].role != "model":
            raise InputError(
                f"{row.where}: message {len(messages)} ({turns[-1].role}): the conversation does not end with a model "
                "turn; give it an answer to learn"
            )
        return Example(turns, row.where, row_id, tools=self._tools(given, row))

    def _media(self, given: Mapping[str, Any], row: Row, in_places: bool = False) -> dict[str, list[Medium]]:
        """Kind -> the media of the row's columns, for kinds that there are; `in_places` reads any column's text."""
        found = {}
        for kind, names in MEDIA.items():
            cells = {name: given[name] for name in names if name in given}
            paths = {str(cell).strip() for cell in cells.values() if is_path(cell)}
            if len(paths) > 1 and not in_places:
                columns = " and ".join(repr(self._source[name]) for name in cells)
                raise InputError(f"{row.where}: {columns} name different files; leave one, or a list in one of them")
            if (name := first_medium(cells)) is None:
                continue
            if name != names[0] and name not in self.mapping and is_path(cells[name]) and not in_places:
                self._check_name(self._source[name])
            elif media := media_of(cells[name], self.folders, self._source[name], row.where):
                found[kind] = media
        return found

    def _default_prompt(self, target: str | None, media: Mapping[str, Any], given: Mapping[str, Any], row: Row) -> str:
        """What the user says where neither `question` nor `prompt` does; "" where the clip is the question."""
        if "audio" in media and target in _REPLIES:
            return ""
        if not media or target in _REPLIES:
            columns = " or ".join(map(repr, PROMPTS))
            what = f"{self._source[target]!r} is an answer to nothing" if target else "nothing to answer"
            raise InputError(
                f"{row.where}: empty text: {what}; fill a column {columns}, or give a file in a media column"
            )
        if "audio" not in media:
            return self.prompts.of_picture("image" in media)
        prompt = self.prompts.of_clip(self._text("language", given, row).strip())
        if prompt is None:
            raise InputError(f"{row.where}: the audio prompt has {{language}}, but the row names none; fill 'language'")
        return prompt
