"""Answers from a model: greedy or sampled decoding with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx import machine
from gemma_mlx.batch import Batch
from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn, Video
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.lanes import edges, in_pieces, shared
from gemma_mlx.models.media import MEDIA
from gemma_mlx.prompt_cache import PromptCache
from gemma_mlx.sampling import Settings

Sampler = Callable[[mx.array], mx.array]
"""float32 logits [B, V] -> token ids [B]."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without the end token, or what begins with a stop text.
        ids: the tokens, without the end token.
        finish: "stop" at an end token or a stop text, "length" where `max_tokens` were there before.
        prompt_tokens: of the prompt, slots of media among them.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int


def answers(
    model: Any, processor: Processor, examples: Sequence[Example], settings: Settings | None = None, batch_size: int = 8
) -> Iterator[tuple[int, Answer]]:
    """(index, answer) of every example, each as soon as it is there; longest prompts first."""
    s = settings or Settings()
    if s.seed is not None:
        mx.random.seed(s.seed)
    sampler = suppressing(make_sampler(s.temperature, s.top_p, s.top_k, s.min_p), processor.suppressed_ids)
    lengths = [len(processor.prompt(e, with_features=False)) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([processor.prompt(examples[i]) for i in chosen], pad_id=processor.pad_id)
        for i, ids in zip(chosen, answer_ids(model, batch, processor.eos_ids, s.max_tokens, sampler), strict=True):
            finish = "length" if len(ids) == s.max_tokens else "stop"
            yield i, Answer(processor.decode(ids), tuple(ids), finish, lengths[i])


def stream(
    model: Any, processor: Processor, conversation: Any, settings: Settings | None = None,
    cache: PromptCache | None = None,
) -> Iterator[str]:  # fmt: skip
    """The answer's text in pieces, each as soon as it is certain."""
    for _, answer in answers(model, processor, [as_example(conversation)], settings):
        yield answer.text


def generate(
    model: Any,
    processor: Processor,
    conversations: Sequence[Any],
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """The model's answer to each conversation, in their order.

    ``conversations``: questions as plain strings, lists of ``{"role", "content"}`` messages whose content may hold
    ``{"type": "image", "image": path}``, ``"video"`` and ``"audio"`` parts, or ``Example`` objects (their
    last model turn, if any, is left out). Temperature 0 takes the likeliest token. At most ``max_tokens`` tokens each,
    ending earlier at one of the checkpoint's end tokens. Prompts are answered in batches of ``batch_size``, longest
    first; that changes nothing in the answers but the last bits of rounding.
    """
    if seed is not None:
        mx.random.seed(seed)
    prompts = [processor.prompt(as_example(c)) for c in conversations]
    sampler = suppressing(make_sampler(temperature, top_p, top_k, min_p), processor.suppressed_ids)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([prompts[i] for i in chosen], pad_id=processor.pad_id)
        for i, ids in zip(chosen, answer_ids(model, batch, processor.eos_ids, max_tokens, sampler), strict=True):
            answers[i] = processor.decode(ids)
    return answers


def as_example(conversation: Any) -> Example:
    """A question, a list of messages, or an Example -> an Example."""
    if isinstance(conversation, Example):
        return conversation
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    try:
        turns = tuple(_turn(message["role"], message["content"]) for message in conversation)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"conversation: expected text or a list of {{'role', 'content'}} messages, got {conversation!r:.80}"
        ) from error
    return Example(turns, where="conversation")


def _turn(role: str, content: Any) -> Turn:
    role = {"assistant": "model"}.get(role, role)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    media = {"image": Image, "video": Video, "audio": Audio}
    kinds = {"text": Text, **{name: lambda path, make=make: make(Path(path)) for name, make in media.items()}}
    if role not in ("system", "user", "model") or any(part["type"] not in kinds for part in parts):
        known = ", ".join(kinds)
        raise InputError(f"conversation: expected parts {known} of system, user or model, got {role!r}")
    return Turn(role, tuple(kinds[part["type"]](part[part["type"]]) for part in parts))


def answer_ids(
    model: Any, batch: Batch, eos_ids: Sequence[int], max_tokens: int, sampler: Sampler | None = None
) -> list[list[int]]:
    """Token ids that follow each row of a batch of prompts, without the end token."""
    ends = set(eos_ids)
    answers: list[list[int]] = [[] for _ in batch.input_ids]
    running = np.ones(len(answers), bool)
    for step in steps(model, batch, sampler or greedy):
        for row, token in enumerate(step.tolist()):
            running[row] &= token not in ends
            if running[row]:
                answers[row].append(token)
        if not running.any() or max(map(len, answers)) >= max_tokens:
            return answers
    return answers


def steps(model: Any, batch: Batch, sampler: Sampler) -> Iterator[np.ndarray]:
    """The next token of every row, int [B], without end: the caller stops. Prompts are left-padded here."""
    inputs = left_padded(batch).inputs()
    cache = model.make_cache()
    mask = inputs["attention_mask"]
    hidden = model.hidden(**_encoded(model, inputs), cache=cache)
    while True:
        tokens = sampler(model.logits(hidden[:, -1]).astype(mx.float32))
        mx.eval(tokens)
        yield np.array(tokens)
        mask = np.concatenate([mask, np.ones((len(mask), 1), mask.dtype)], axis=1)
        hidden = model.hidden(input_ids=tokens[:, None], attention_mask=mask, cache=cache)


def _encoded(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The inputs with soft tokens in place of media, which are shared out to the threads that the machine can use."""
    media = {name for names in MEDIA.values() for name in names}
    text = {name: value for name, value in inputs.items() if name not in media}
    soft: dict[str, list[mx.array]] = {}
    for names in ([n for n in pair if n in inputs] for pair in MEDIA.values()):
        if not names:
            continue
        count = len(inputs[names[0]])
        lanes = machine.lanes(count)
        parts = [{n: inputs[n][a:b] for n in names} for a, b in pairwise(edges(count, lanes))]
        for part in _side_by_side(model, parts) if lanes > 1 else [model.encode(**parts[0])]:
            for name, tokens in part.items():
                soft.setdefault(name, []).append(tokens)
    return {**text, **{name: mx.concatenate(parts) for name, parts in soft.items()}}


def _side_by_side(model: Any, parts: list[dict[str, np.ndarray]]) -> list[dict[str, mx.array]]:
    def encode(part: dict[str, np.ndarray]) -> dict[str, mx.array]:
        with in_pieces():
            tokens = model.encode(**part)
        mx.eval(tokens)
        return tokens

    mx.eval(model.parameters())
    return shared(len(parts)).map(encode, parts)


def left_padded(batch: Batch) -> Batch:
    """The same rows with their padding in front, so that every row's last position is its newest token."""
    width = batch.input_ids.shape[1]
    shifts = width - batch.attention_mask.sum(axis=1)

    def rolled(rows: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)])

    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
    return replace(batch, **{name: rolled(getattr(batch, name)) for name in names})


def suppressing(sampler: Sampler, ids: Sequence[int]) -> Sampler:
    """The sampler, never giving any of these tokens: slots of media that are not there, say."""
    if not ids:
        return sampler

    def sample(logits: mx.array) -> mx.array:
        barred = mx.broadcast_to(mx.array(list(ids)), (len(logits), len(ids)))
        return sampler(mx.put_along_axis(logits, barred, mx.array(-1e9, logits.dtype), axis=-1))

    return sample


def greedy(logits: mx.array) -> mx.array:
    """The likeliest token of each row."""
    return mx.argmax(logits, axis=-1)


def make_sampler(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Sampler:
    """mlx-lm's sampling chain over log-probabilities; greedy at temperature 0."""
    if temperature == 0:
        return greedy
    from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

    sample = mlx_lm_sampler(temp=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    return lambda logits: sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
