"""Example -> token ids and labels, through the checkpoint's own chat template.

What carries loss: what a model turn says, through ``<turn|>`` inclusive, or through the token that stands there where
the turn ends in a call for a tool (Gemma 4: ``<|tool_response>``). The line break after it does not, nor do prompts,
media, tools' results and padding. A model turn counts only if what stands before it is what generation would be given
there (the template's generation prompt): templates whose generation prompt goes beyond the header written into history
(the empty thought of the larger Gemma 4 models) get loss on the last turn alone, behind the generation prompt. Nor does
an earlier turn count whose thought the template leaves out of history. Everywhere else the ids are those of
transformers' ``Gemma4Processor`` for the whole conversation, final line break included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.features import Patches
from gemma_mlx.data.tokenizer import Tokenizer
from gemma_mlx.data.turns import Audio, Example, Image, Text, Turn, Video
from gemma_mlx.data.video import spell_frames
from gemma_mlx.errors import InputError

DEFAULT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content | trim -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<|' + part.type + '|>' if part.type in ('image', 'video', 'audio') else part.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""
"""Gemma 4's conversation format, for checkpoints that come without a template (the base models)."""

TRAIN_ON = ("all", "last")
"""Which model turns of a conversation carry loss: all, or the one that the conversation ends with."""
TOOL_TOKENS = (
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|channel>", "<channel|>"),
)
"""What a tool's schema, arguments, results and the thoughts beside them may not hold: it would end them."""
TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
"""Values of ``mm_token_type_ids``."""
_STAND_IN = "\ue000the answer\ue001"


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as the model reads it, before batching.

    Attributes:
        input_ids: int32 [T], media slots expanded.
        labels: int32 [T], not shifted; `IGNORE_INDEX` where there is no loss.
        token_types: int32 [T]; 1 on image slots, 2 on video slots, 3 on audio slots, else 0.
        images: patches of each picture in reading order.
        clips: float32 [frames, bins] of each clip in reading order.
        where: "train.csv:8", for messages.
        row_id: the row's name in reports.
        videos: patches of each frame of each video in reading order.
        frames_per_token: of clips.
        segment_ids: int32 [T] of a row of several samples (see `gemma_mlx.data.packing`): 1 along the first, 2 along
            the second, …
    """

    input_ids: np.ndarray
    labels: np.ndarray
    token_types: np.ndarray
    images: tuple[Patches, ...] = ()
    clips: tuple[np.ndarray, ...] = ()
    where: str = ""
    row_id: str = ""
    videos: tuple[tuple[Patches, ...], ...] = ()
    frames_per_token: int = 4
    segment_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays."""
        pictures = (*self.images, *(frame for video in self.videos for frame in video))
        return 3 * self.input_ids.nbytes + sum(p.nbytes for p in pictures) + sum(c.nbytes for c in self.clips)

    @property
    def label_count(self) -> int:
        """Positions whose next token counts in the loss."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


class ChatTemplate:
    """A Jinja chat template in a sandbox, with the names that transformers gives to templates."""

    def __init__(self, source: str, special_tokens: dict[str, str]):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._error = jinja2.TemplateError
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = self._raise
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateError as e:
            raise InputError(f"chat template: not valid Jinja ({e}); use the checkpoint's own file") from None
        self._special_tokens = special_tokens

    def _raise(self, message: str) -> None:
        raise self._error(message)

    def render(
        self,
        messages: list[dict[str, Any]],
        where: str,
        add_generation_prompt: bool = False,
        tools: list[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, with one placeholder for each medium.

        Args:
            messages: ``{"role", "content", …}``.
            where: "train.csv:8", for messages.
            add_generation_prompt: whether what the model is given before it answers stands at the end.
            tools: JSON schemas of what the model may call.

        Raises:
            InputError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (self._error, TypeError, KeyError, AttributeError, ValueError, RecursionError) as e:
            raise InputError(f"{where}: the chat template refuses this conversation ({e}); change the row") from None


def _generation_tag() -> type:
    """The ``{% generation %}`` block that some templates put around answers: rendered as if it were not there."""
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a chat template takes them: plain text as a string, anything else as a list of parts."""
    messages = []
    for turn in turns:
        role = "assistant" if turn.role == "model" else turn.role
        content: str | list[dict[str, str]] = ""
        if len(turn.parts) == 1 and isinstance(turn.parts[0], Text):
            content = turn.parts[0].text
        elif turn.parts:
            content = [_part(part) for part in turn.parts]
        messages.append({"role": role, "content": content, **turn.extra})
    return messages


def _part(part: Text | Image | Video | Audio) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": type(part).__name__.lower()}


def check_texts(example: Example, tokenizer: Tokenizer) -> None:
    """Refuses control tokens inside what somebody says: they would end turns or stand for media that are not there.

    A completion may hold turns written out, but no media. What tools are told and give back may hold no tokens that
    delimit it either.
    """
    refused = tokenizer.media_tokens if example.completion else tokenizer.control_tokens
    delimiters: tuple[str, ...] = ()
    if example.tools or any(turn.extra or turn.role == "tool" for turn in example.turns):
        delimiters = tuple(token for token in TOOL_TOKENS if tokenizer.id_of(token) is not None)
    for turn in example.turns:
        known = (*refused, *delimiters) if turn.role == "tool" else refused
        for part in turn.parts:
            if isinstance(part, Text):
                _check_text(part.text, known, f"{example.where}: the text")
        for key, value in turn.extra.items():
            for text in _texts_in(value):
                _check_text(text, (*refused, *delimiters), f"{example.where}: {key}")
    for text in _texts_in(example.tools):
        _check_text(text, (*refused, *delimiters), f"{example.where}: the tools' description")


def _check_text(text: str, refused: Sequence[str], told: str) -> None:
    for token in refused:
        if token in text:
            raise InputError(f"{told} contains the control token {token}; remove it")


def _texts_in(value: Any) -> Iterator[str]:
    """Every text inside lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)


class WithFrames:
    """A chat template whose placeholders of videos come out as their frames.

    Args:
        template: the template.
        placeholder: what it writes for a video.
        films: the times of each video's frames, in reading order.
    """

    def __init__(self, template: ChatTemplate, placeholder: str, films: Sequence[Sequence[str]]):
        self._template, self._placeholder, self._films = template, placeholder, films

    def render(self, *arguments: Any, **options: Any) -> str:
        """As `ChatTemplate.render`."""
        text = self._template.render(*arguments, **options)
        return spell_frames(text, self._placeholder, self._films)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans [start, end) of characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Script:
    """A conversation's beginnings as the template writes them.

    Attributes:
        text: the whole conversation.
    """

    def __init__(self, example: Example, template: ChatTemplate | WithFrames):
        self.turns, self.where = example.turns, example.where
        self._template, self._messages = template, messages_of(example.turns)
        self._tools = list(example.tools) or None
        self.text = self._render(self._messages)
        calls = (call for turn in example.turns for call in turn.extra.get("tool_calls", ()))
        for tool in (*example.tools, *calls):
            if (name := tool["function"]["name"]) not in self.text:
                raise InputError(
                    f"{self.where}: the chat template does not write the tool {name!r}; use a checkpoint whose "
                    "template knows tools, or remove them from the row"
                )

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._template.render(messages, self.where, prompt, self._tools)

    def prompt(self, k: int) -> str:
        """What generation would be given in the place of turn k."""
        return self._render(self._messages[:k], prompt=True)

    def header(self, k: int) -> str:
        """What stands before the answer of a model turn in the place of turn k."""
        stand_in = [*self._messages[:k], {"role": "assistant", "content": _STAND_IN}]
        return self._render(stand_in).partition(_STAND_IN)[0]

    def through(self, k: int) -> str:
        """The conversation that ends with turn k."""
        return self.text if k == len(self.turns) - 1 else self._render(self._messages[: k + 1])

    def through_calls(self, k: int) -> str:
        """The conversation that ends with the calls of turn k, which says nothing besides."""
        return self._render([*self._messages[:k], {**self._messages[k], "content": ""}])

    def answers(self) -> list[tuple[int, int]]:
        """(first, last) turn of each answer: several where the template writes model turns in a row as one."""
        found: list[tuple[int, int]] = []
        for k, turn in enumerate(self.turns):
            if turn.role != "model":
                continue
            if found and found[-1][1] == k - 1 and not self.text.startswith(self.through(k - 1).rstrip()):
                found[-1] = found[-1][0], k
            else:
                found.append((k, k))
        return found


def render_prompt(example: Example, template: ChatTemplate | WithFrames) -> Rendered:
    """Everything up to where the last model turn begins to speak."""
    script = _Script(example, template)
    end = len(example.turns)
    if example.turns and example.turns[-1].role == "model":
        end = script.answers()[-1][0]
    return Rendered(script.prompt(end), ())


def render_conversation(example: Example, template: ChatTemplate | WithFrames, train_on: str = "all") -> Rendered:
    """The whole conversation, with the spans of the model turns that are trained on.

    Each turn's surroundings are found by rendering the conversation's beginnings, so that any template will do.

    Raises:
        InputError: no model turn at the end, an empty one, none that is learned, or a template that rewrites answers
            or history, or knows no tools.
    """
    where, turns = example.where, example.turns
    if not turns or turns[-1].role != "model":
        raise InputError(f"{where}: the conversation does not end with a model turn; give it an answer to learn")
    script = _Script(example, template)
    text, spans, last = script.text, [], len(turns) - 1
    for first, end in script.answers():
        if not all(turn.learned for turn in turns[first : end + 1]) or (train_on == "last" and end != last):
            continue
        if not any(turn.text or turn.extra.get("tool_calls") for turn in turns[first : end + 1]):
            raise InputError(f"{where}: empty text: a model turn says nothing; fill it or remove the row")
        prompt = header = script.prompt(first)
        if not text.startswith(prompt):
            if end != last:
                continue
            header = script.header(first)
        if said := _said(script, first, end, header):
            if end == last:
                text = prompt + text[len(header) :]
            spans.append((len(prompt), len(prompt) + said - len(header)))
    if not spans:
        raise InputError(f"{where}: no model turn carries loss; give the last one a weight, or remove the row")
    return Rendered(text, tuple(spans))


def _said(script: _Script, first: int, end: int, header: str) -> int:
    """Where an answer ends in the text, behind the token that ends it.

    Args:
        script: the conversation.
        first: the answer's first turn.
        end: its last.
        header: all that stands before it.

    Returns:
        0 where later turns make the template write it otherwise, and it may: it takes thoughts out of history.

    Raises:
        InputError: the template alters what the answer says, or what was said before.
    """
    turns, whole = script.turns[first : end + 1], script.through(end)
    special = len(turns) > 1 or bool(turns[0].extra)
    answer, text = whole[len(header) :], turns[0].text
    if not whole.startswith(header):
        raise _altered(script.where)
    # A text may itself begin with what the generation prompt ends with.
    if not special and not answer.startswith(text) and not whole[len(script.header(first)) :].startswith(text):
        raise _altered(script.where)
    if special and any(turn.text not in answer for turn in turns):
        raise _altered(script.where)
    if any(turn.extra["reasoning"].strip() not in answer for turn in turns if "reasoning" in turn.extra):
        raise InputError(
            f"{script.where}: the chat template does not write the thought of a model turn (reasoning); remove it"
        )
    if script.text.startswith(whole.rstrip()):
        return len(whole.rstrip())
    if not special:
        raise _altered(script.where)
    # Gemma 4 writes what a turn says beside its calls behind their results.
    calls = script.through_calls(end).rstrip() if turns[-1].extra.get("tool_calls") else ""
    return len(calls) if calls and script.text.startswith(calls) else 0


def _altered(where: str) -> InputError:
    return InputError(
        f"{where}: the chat template alters the answer (it may strip thoughts, <|channel>…<channel|>), "
        "or what was said before; remove that part of the text"
    )


def encode(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, labels) of a rendered conversation, with one placeholder id for each medium.

    A span carries loss if it starts behind exactly the ids that its prompt has when it stands alone. Where a token of
    the whole text would reach over the last span's borders, prompt and answer are encoded one by one instead.
    """
    text, spans = rendered.text, rendered.spans
    ids = tokenizer.encode(text)
    within = token_spans(spans, text, ids, tokenizer)
    if spans and within[-1] is None:
        start, end = spans[-1]
        head, answer, tail = (tokenizer.encode(part) for part in (text[:start], text[start:end], text[end:]))
        ids = head + answer + tail
        within = [*token_spans(spans[:-1], text, ids, tokenizer), (len(head), len(head) + len(answer))]
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in filter(None, within):
        labels[start:end] = ids[start:end]
    return ids, labels


def token_spans(
    spans: Sequence[tuple[int, int]], text: str, ids: list[int], tokenizer: Tokenizer
) -> list[tuple[int, int] | None]:
    """The tokens of each span of characters; None where a token reaches over one of its borders."""
    ends = {tokenizer.id_of(token) for token in (*tokenizer.control_tokens, *TOOL_TOKENS)} - {None}
    found: list[tuple[int, int] | None] = []
    known = (0, 0)  # characters, tokens: control tokens split the text, so that what follows one stands alone
    for span in spans:
        edges = []
        for cut in span:
            count = _tokens_before(cut, known, text, ids, tokenizer)
            edges.append(count)
            if count and ids[count - 1] in ends:
                known = cut, count
        found.append(None if None in edges else (edges[0], edges[1]))
    return found


def _tokens_before(cut: int, known: tuple[int, int], text: str, ids: list[int], tokenizer: Tokenizer) -> int | None:
    """How many ids stand before a cut; None where one reaches over it, or they are others when they stand alone."""
    for at, done in (known, (0, 0)):
        piece = tokenizer.encode(text[at:cut])
        if ids[done : done + len(piece)] == piece:
            return done + len(piece)
    return None


def _counts(kinds: list[int]) -> str:
    return f"{kinds.count(IMAGE)} images, {kinds.count(VIDEO)} frames and {kinds.count(AUDIO)} clips"


def expand(
    ids: list[int], labels: list[int], media: Sequence[tuple[int, int]], tokenizer: Tokenizer, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives every placeholder its opening marker, its slots and its closing marker.

    Args:
        ids: with one placeholder for each medium.
        labels: of the same length.
        media: (token type, slots) of each picture, frame and clip in reading order.
        tokenizer: knows the ids.
        where: for messages.

    Returns:
        input_ids, labels, token types: int32 [T] each.

    Raises:
        InputError: the placeholders are not those of the media.
    """
    s = tokenizer.spec
    marks = {
        s.image_token_id: (IMAGE, s.boi_token_id, s.eoi_token_id),
        s.video_token_id: (VIDEO, s.boi_token_id, s.eoi_token_id),
        s.audio_token_id: (AUDIO, s.boa_token_id, s.eoa_token_id),
    }
    places = [i for i, token in enumerate(ids) if token in marks]
    found, wanted = [marks[ids[i]][0] for i in places], [kind for kind, _ in media]
    if found != wanted:
        raise InputError(
            f"{where}: {_counts(wanted)}, but the rendered conversation has placeholders for {_counts(found)} "
            f"(in this order: {found}, expected {wanted}); the chat template or the tokenizer does not fit this "
            "checkpoint"
        )
    out_ids: list[int] = []
    out_labels: list[int] = []
    types: list[int] = []
    done = 0
    for place, (kind, slots) in zip(places, media, strict=True):
        _, opening, closing = marks[ids[place]]
        out_ids += [*ids[done:place], opening, *[ids[place]] * slots, closing]
        out_labels += [*labels[done:place], *[IGNORE_INDEX] * (slots + 2)]
        types += [*[TEXT] * (place - done + 1), *[kind] * slots, TEXT]
        done = place + 1
    out_ids += ids[done:]
    out_labels += labels[done:]
    types += [TEXT] * (len(ids) - done)
    return np.array(out_ids, np.int32), np.array(out_labels, np.int32), np.array(types, np.int32)
