"""Messages -> turns: conversations as chat templates, OpenAI's API and ShareGPT write them.

A message is ``{"role", "content"}`` (or ``{"from", "value"}``). Its content is text or a list of typed parts::

    {"type": "text", "text": "What is this?"}
    {"type": "image", "image": "a.png"}        also "path", "url", "bytes", "base64", "image_url": {"url": …}
    {"type": "audio", "audio": "a.wav"}        also "input_audio": {"data": base64, "format": "wav"}
    {"type": "video", "video": "a.mp4"}

- A part without a reference takes the next medium of its kind from the row's own columns. So does ``<image>``,
  ``<audio>`` or ``<video>`` inside a content that is text alone, where the row has media of that kind. Where nothing in
  the messages stands for a medium, the row's media belong to the first user message: pictures, videos, text, clips.
- ``tool_calls``, ``reasoning`` and the like go to the chat template as they are; arguments in JSON text become objects.
- ``"weight": 0`` on an assistant message keeps it out of the loss.
- null is as good as absent, since tables give every object of a column the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.places import Folders, shown
from gemma_mlx.data.turns import Audio, Image, Part, Text, Turn, Video
from gemma_mlx.data.values import KEYS, check_depth, filled, kind_of, medium_of, objects_of, parsed
from gemma_mlx.errors import InputError

MAX_MESSAGES = 500
"""Messages of a conversation: the template is rendered anew for each model turn, so time grows with the square."""
ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "model", "model": "model", "gpt": "model", "tool": "tool"},
}
KINDS: dict[str, type[Image] | type[Video] | type[Audio]] = {"image": Image, "video": Video, "audio": Audio}


def spellings(kind: str) -> tuple[str, ...]:
    """Types of a part of this kind, and the keys of such a part that its medium may stand in."""
    return kind, f"{kind}_url", f"input_{kind}"


MEDIA_TYPES = {spelling: kind for kind in KINDS for spelling in spellings(kind)}
_TYPES = {"text": "text", "input_text": "text", "output_text": "text"} | MEDIA_TYPES
_REASONING = ("reasoning", "reasoning_content", "thinking")
"""Templates differ in the name that they read, so a thought is handed on under all of them."""
_TAG = re.compile(r"<(image|video|audio)>")


@dataclass(frozen=True)
class _Place:
    """Where a medium of the row's own columns goes."""

    kind: str


@dataclass
class _Read:
    """A message that has been read, before the row's media have been put into their places."""

    role: str
    parts: list[Part | _Place]
    extra: dict[str, Any]
    learned: bool
    told: str

    @property
    def silent(self) -> bool:
        return not any(part.text.strip() if isinstance(part, Text) else True for part in self.parts)


@dataclass
class MessageReader:
    """Turns the messages of one row into turns.

    Args:
        folders: where media are.
        where: ``train.jsonl:8``, put before messages.
        media: kind ("image", "video", "audio") -> the media of the row's own columns, in order.
    """

    folders: Folders
    where: str
    media: Mapping[str, Sequence[Medium]] = field(default_factory=dict)

    def turns(self, messages: Sequence[Mapping[str, Any]], unlearned: int = 0) -> tuple[Turn, ...]:
        """The turns; the model turns among the first `unlearned` messages carry no loss.

        Raises:
            InputError: naming the row and the message: an unknown role, content of the wrong type, nothing said, roles
                in an order that is none, media that are not there, or not as many as places for them.
        """
        if not messages:
            raise InputError(f"{self.where}: no messages; write at least a question and its answer")
        if len(messages) > MAX_MESSAGES:
            raise InputError(f"{self.where}: {len(messages)} messages; at most {MAX_MESSAGES} are read: split the row")
        read = [self._message(message, i, i > unlearned) for i, message in enumerate(messages, 1)]
        read = [message for message in read if message.role != "system" or not message.silent]
        if not read:
            raise InputError(f"{self.where}: no messages but an empty system message; write a question and its answer")
        _check_order(read)
        self._place_media(read)
        return tuple(Turn(m.role, tuple(m.parts), m.extra, m.learned) for m in read)

    def _message(self, given: Mapping[str, Any], i: int, learned: bool) -> _Read:
        message = {key: value for key, value in given.items() if value is not None}
        name = message.get("role", message.get("from"))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            found = shown(name) if isinstance(name, str) else kind_of(name)
            raise InputError(
                f"{self.where}: message {i}: expected a role of {', '.join(ROLES)}; found {found}; correct the role"
            )
        told = f"message {i} ({name})"
        parts = self._parts(message.get("content", message.get("value")), told)
        read = _Read(role, parts, _extra(message, role, f"{self.where}: {told}"), True, f"{self.where}: {told}")
        if read.silent and role in ("user", "model") and "tool_calls" not in read.extra:
            raise InputError(f"{read.told}: empty text: it says nothing; fill it or remove the row")
        if role == "model":
            read.learned = learned and _weight(message, read.told)
            if not all(isinstance(part, Text) for part in parts):
                raise InputError(f"{read.told} holds media, but models answer in text; move them to a user's message")
        return read

    def _parts(self, content: Any, told: str) -> list[Part | _Place]:
        if content is None:
            return []
        if isinstance(content, str):
            return self._tagged(content)
        if not isinstance(content, (list, tuple)):
            raise InputError(f"{self.where}: {told}: content is {kind_of(content)}; expected text or a list of parts")
        return [self._part(part, f"{told} part {j}") for j, part in enumerate(content, 1)]

    def _tagged(self, text: str) -> list[Part | _Place]:
        """Text alone, or text around the tags that stand for the row's media."""
        parts: list[Part | _Place] = []
        done = 0
        for tag in _TAG.finditer(text):
            if self.media.get(tag[1]):
                parts += [Text(text[done : tag.start()]), _Place(tag[1])]
                done = tag.end()
        parts.append(Text(text[done:]))
        return [part for part in parts if not isinstance(part, Text) or part.text.strip() or len(parts) == 1]

    def _part(self, given: Any, told: str) -> Part | _Place:
        if not isinstance(given, Mapping):
            raise InputError(f"{self.where}: {told} is {kind_of(given)}; expected an object with a type")
        part = {key: value for key, value in given.items() if value is not None}
        kind = _TYPES.get(part["type"]) if isinstance(part.get("type"), str) else None
        if kind is None:
            found = shown(str(part.get("type", "none")))
            raise InputError(f"{self.where}: {told}: expected the type text, image, audio or video; found {found}")
        if kind == "text":
            if not isinstance(text := part.get("text"), str):
                raise InputError(f"{self.where}: {told}: text is {kind_of(text)}; expected text")
            return Text(text)
        named = [key for key in spellings(kind) if filled(part.get(key))]
        plain = {key: part[key] for key in KEYS if filled(part.get(key))}
        if len(named) + bool(plain) > 1:
            keys = ", ".join((*named, *plain))
            raise InputError(f"{self.where}: {told} names its {kind} twice ({keys}); leave one")
        if not named and not plain:
            return _Place(kind)
        value = part[named[0]] if named else {**plain, "format": part.get("format")}
        return KINDS[kind](medium_of(value, self.folders, f"{told} {kind}", self.where))

    def _place_media(self, read: Sequence[_Read]) -> None:
        """Puts the row's media into their places; where there is none, into the first user message."""
        user = next((message for message in read if message.role == "user"), None)
        if user is not None and all(isinstance(part, Text) for message in read for part in message.parts):
            pictures, films, clips = ([_Place(kind)] * len(self.media.get(kind, ())) for kind in KINDS)
            user.parts[:] = [*pictures, *films, *user.parts, *clips]
        for kind, make in KINDS.items():
            given = self.media.get(kind, ())
            wanted = sum(part == _Place(kind) for message in read for part in message.parts)
            if wanted != len(given):
                raise InputError(
                    f"{self.where}: the messages have {wanted} place{'s' * (wanted != 1)} for the row's {kind} column, "
                    f"which holds {len(given)}; give as many as there are places"
                )
            rest: Iterator[Medium] = iter(given)
            for message in read:
                message.parts[:] = [make(next(rest)) if part == _Place(kind) else part for part in message.parts]


def _weight(message: Mapping[str, Any], told: str) -> bool:
    weight = message.get("weight", 1)
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise InputError(f"{told}: the weight is {shown(str(weight))}; expected 0 or 1")
    return weight == 1


def _check_order(read: Sequence[_Read]) -> None:
    """Refuses system messages after the first and tools that nobody called; gives results their tools' names."""
    calls: list[Mapping[str, Any]] = []
    results = 0
    for n, message in enumerate(read):
        if message.role == "system" and n:
            raise InputError(f"{message.told}: only the first message may be a system message; join them")
        if message.role != "tool":
            calls, results = list(message.extra.get("tool_calls", ())), 0
            continue
        if not calls:
            raise InputError(
                f"{message.told}: no call before it; give the calls as tool_calls of the assistant's message"
            )
        by_id = [call for call in calls if call.get("id", "") == message.extra.get("tool_call_id")]
        in_order = calls[results : results + 1] if "tool_call_id" not in message.extra else []
        results += 1
        for call in (by_id or in_order)[:1]:
            message.extra.setdefault("name", call["function"]["name"])


def _extra(message: Mapping[str, Any], role: str, told: str) -> dict[str, Any]:
    """What the chat template is given beside the content."""
    for key, instead in (("function_call", "tool_calls"), ("tool_responses", "messages of the role tool")):
        if filled(message.get(key)):
            raise InputError(f"{told}: {key} is not read; write {instead}")
    extra = {key: message[key] for key in ("name", "tool_call_id") if filled(message.get(key))}
    extra |= {key: message[key] for key in _REASONING if filled(message.get(key))}
    for key, value in extra.items():
        if not isinstance(value, str):
            raise InputError(f"{told}: {key} is {kind_of(value)}; expected text")
    thought = next((extra[key] for key in _REASONING if key in extra), None)
    extra = dict.fromkeys(_REASONING, thought) | extra if thought is not None else extra
    if filled(calls := message.get("tool_calls")):
        if role != "model":
            raise InputError(f"{told}: only an assistant's message may have tool_calls; move them")
        listed = objects_of(calls, f"{told}: tool_calls")
        extra["tool_calls"] = [_call(call, f"{told}: tool call {j}") for j, call in enumerate(listed, 1)]
    return extra


def _call(given: Mapping[str, Any], told: str) -> dict[str, Any]:
    function = _function(given, told)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{told}: arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InputError(f"{told}: the arguments are {kind_of(arguments)}; expected an object")
    check_depth(arguments, f"{told}: arguments")
    named = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return named | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list of JSON schemas, or its JSON text; the bare function as well as
    ``{"type": "function", "function": …}`` around it.

    Raises:
        InputError: naming the row and the tool.
    """
    found = []
    for j, tool in enumerate(objects_of(value, f"{where}: tools"), 1):
        told = f"{where}: tool {j}"
        function = _function(tool, told)
        check_depth(function, told)
        found.append({"type": "function", "function": dict(function)})
    return tuple(found)


def _function(given: Mapping[str, Any], told: str) -> Mapping[str, Any]:
    function = given.get("function") if filled(given.get("function")) else given
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise InputError(f'{told} has no name; expected {{"type": "function", "function": {{"name": …}}}}')
    return function
