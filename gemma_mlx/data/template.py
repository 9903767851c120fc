"""Example -> token ids and labels, through the checkpoint's own chat template.

What carries loss: what a model turn says, through ``<turn|>`` inclusive. The line break after it does not, nor do
prompts, media and padding. A model turn counts only if what stands before it is what generation would be given there
(the template's generation prompt): templates whose generation prompt goes beyond the header written into history (the
empty thought of the larger Gemma 4 models) get loss on the last turn alone, behind the generation prompt. Everywhere
else the ids are those of transformers' ``Gemma4Processor`` for the whole conversation, final line break included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn, Video
from gemma_mlx.data.features import Patches
from gemma_mlx.data.tokenizer import Tokenizer
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
"""Which model turns of a conversation carry loss."""
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

    def render(self, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool = False) -> str:
        """The conversation as text, with one placeholder for each medium.

        Raises:
            InputError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (self._error, TypeError, KeyError) as e:
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
        content: str | list[dict[str, str]]
        if len(turn.parts) == 1 and isinstance(turn.parts[0], Text):
            content = turn.parts[0].text
        else:
            content = [_part(part) for part in turn.parts]
        messages.append({"role": role, "content": content})
    return messages


def _part(part: Text | Image | Video | Audio) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": type(part).__name__.lower()}


def check_texts(example: Example, tokenizer: Tokenizer) -> None:
    """Refuses control tokens inside what somebody says: they would end turns or stand for media that are not there.

    A completion may hold turns written out, but no media.
    """
    refused = tokenizer.media_tokens if example.completion else tokenizer.control_tokens
    for turn in example.turns:
        for part in turn.parts:
            for token in refused if isinstance(part, Text) else ():
                if token in part.text:
                    raise InputError(f"{example.where}: the text contains the control token {token}; remove it")


class WithFrames:
    """A chat template whose placeholders of videos come out as their frames.

    Args:
        template: the template.
        placeholder: what it writes for a video.
        films: the times of each video's frames, in reading order.
    """

    def __init__(self, template: ChatTemplate, placeholder: str, films: Sequence[Sequence[str]]):
        self._template, self._placeholder, self._films = template, placeholder, films

    def render(self, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool = False) -> str:
        """As `ChatTemplate.render`."""
        text = self._template.render(messages, where, add_generation_prompt)
        return spell_frames(text, self._placeholder, self._films)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans [start, end) of characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render_prompt(example: Example, template: ChatTemplate | WithFrames) -> Rendered:
    """Everything up to where the last model turn begins to speak."""
    turns = example.turns[:-1] if example.turns and example.turns[-1].role == "model" else example.turns
    return Rendered(template.render(messages_of(turns), example.where, add_generation_prompt=True), ())


def render_conversation(example: Example, template: ChatTemplate | WithFrames, train_on: str = "all") -> Rendered:
    """The whole conversation, with the spans of the model turns that are trained on.

    Each turn's surroundings are found by rendering a stand-in for its answer, so that any template will do.

    Raises:
        InputError: no model turn at the end, an empty one, or a template that rewrites answers or history.
    """
    where, turns = example.where, example.turns
    if not turns or turns[-1].role != "model":
        raise InputError(f"{where}: the conversation does not end with a model turn; give it an answer to learn")
    messages = messages_of(turns)
    text, spans = template.render(messages, where), []
    last = len(turns) - 1
    for k in range(len(turns)):
        if turns[k].role != "model" or (train_on == "last" and k != last):
            continue
        answer = "".join(part.text.strip() for part in turns[k].parts if isinstance(part, Text))
        if not answer:
            raise InputError(f"{where}: empty text: a model turn says nothing; fill it or remove the row")
        stand_in = [*messages[:k], {"role": "assistant", "content": _STAND_IN}]
        before, _, after = template.render(stand_in, where).partition(_STAND_IN)
        if not text.startswith(before + answer + after):
            raise InputError(
                f"{where}: the chat template alters the answer (it may strip thoughts, <|channel>…<channel|>), "
                "or what was said before; remove that part of the text"
            )
        prompt = template.render(messages[:k], where, add_generation_prompt=True)
        if prompt == before or k == last:
            if k == last:
                text = prompt + text[len(before) :]
            spans.append((len(prompt), len(prompt) + len(answer + after.rstrip())))
    return Rendered(text, tuple(spans))


def encode(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, labels) of a rendered conversation, with one placeholder id for each medium.

    A span carries loss if it starts behind exactly the ids that its prompt has when it stands alone. Where a token of
    the whole text would reach over the last span's borders, prompt and answer are encoded one by one instead.
    """
    text = rendered.text
    ids = tokenizer.encode(text)
    within = {span: _token_span(span, text, ids, tokenizer) for span in rendered.spans}
    if rendered.spans and within[rendered.spans[-1]] is None:
        start, end = rendered.spans[-1]
        head, answer, tail = (tokenizer.encode(part) for part in (text[:start], text[start:end], text[end:]))
        ids = head + answer + tail
        within = {span: _token_span(span, text, ids, tokenizer) for span in rendered.spans[:-1]}
        within[start, end] = len(head), len(head) + len(answer)
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in filter(None, within.values()):
        labels[start:end] = ids[start:end]
    return ids, labels


def _token_span(span: tuple[int, int], text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens of a span of characters; None where a token reaches over one of its borders."""
    before, through = (tokenizer.encode(text[:cut]) for cut in span)
    fits = ids[: len(before)] == before and ids[: len(through)] == through
    return (len(before), len(through)) if fits else None


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
