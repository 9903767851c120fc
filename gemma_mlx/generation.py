"""Answers from a model, batched or as a stream: greedy or sampled, to text, pictures, films and sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.batch import Batch
from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn, Video
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import TEXT, Sample
from gemma_mlx.decoding import Row, Running, Stateless, decode, left_padded, read
from gemma_mlx.errors import InputError
from gemma_mlx.models.cache import Cache
from gemma_mlx.models.media import reads_padding
from gemma_mlx.prompt_cache import PromptCache, beginning_of, rest_of
from gemma_mlx.sampling import Chooser, Sampler, Settings, greedy, suppressing
from gemma_mlx.text_pieces import TextPieces

__all__ = [
    "Answer",
    "answer_ids",
    "answers",
    "as_example",
    "generate",
    "greedy",
    "left_padded",
    "stream",
    "suppressing",
]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without the end token, and without a stop text and what follows it.
        ids: the tokens, without the end token; those of a stop text among them.
        finish: "stop" at an end token or a stop text, "length" where `max_tokens` were there before.
        prompt_tokens: of the prompt, slots of media among them.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int


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
    repetition_penalty: float = 1.0,
    repetition_context: int = 20,
    stop: Sequence[str] = (),
) -> list[str]:
    """The model's answer to each conversation, in their order.

    ``conversations``: questions as plain strings, lists of ``{"role", "content"}`` messages whose content may hold
    ``{"type": "image", "image": path}``, ``"video"`` and ``"audio"`` parts, or ``Example`` objects (their
    last model turn, if any, is left out). The other arguments are those of ``Settings`` and of ``answers``.

    Raises:
        InputError: a conversation that cannot be read, or a setting outside its range.
    """
    settings = Settings(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, tuple(stop), seed
    )
    found = answers(model, processor, [as_example(c) for c in conversations], settings, batch_size)
    return [answer.text for _, answer in sorted(found, key=lambda pair: pair[0])]


def answers(
    model: Any, processor: Processor, examples: Sequence[Example], settings: Settings | None = None,
    batch_size: int = 8, *, lengths: Sequence[int] | None = None, alter: Callable[[Batch], Batch] | None = None,
) -> Iterator[tuple[int, Answer]]:  # fmt: skip
    """(index, answer) of every example, each as soon as it is there.

    ``batch_size`` of them are under way at a time, longest prompts first; where some have ended, the next take their
    places. That changes nothing in an answer but the last bits of rounding. Media are decoded when their turn comes.
    ``lengths``: tokens of the prompts, where they are known. ``alter`` changes each batch of prompts before it is read,
    its media say; their number and sizes must stay.

    Raises:
        InputError: a bad example, when its turn comes; a batch size below 1.
    """
    settings = settings or Settings()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    if lengths is None:
        lengths = [len(processor.prompt(e, with_features=False)) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    seed = _fresh_seed()

    def batch_of(samples: list[Sample]) -> Batch:
        batch = collate(samples, pad_id=processor.pad_id)
        return batch if alter is None else alter(batch)

    def start(prompts: list[tuple[int, Sample]]) -> Running:
        indices, samples = [i for i, _ in prompts], [sample for _, sample in prompts]
        choose = Chooser(settings, [s.input_ids for s in samples], indices, processor.suppressed_ids, seed)
        rows = [_row(processor, settings, i, len(sample)) for i, sample in prompts]
        batch = batch_of(samples)
        alone = len(samples) > 1 and any(s.clips for s in samples) and reads_padding(model.spec, "audio")
        media = [batch_of([s]) for s in samples] if alone else [batch]
        cache = model.make_cache()
        return Running(model, rows, cache, choose, read(model, batch, cache, media))

    with _ahead(processor, examples, order, batch_size) as waiting:
        for row in decode(start, waiting, batch_size):
            yield row.index, _answer(processor, settings, row)


def stream(
    model: Any, processor: Processor, conversation: Any, settings: Settings | None = None,
    cache: PromptCache | None = None,
) -> Iterator[str]:  # fmt: skip
    """The answer's text in pieces, each as soon as it is certain; together they are the text that ``generate`` gives.

    Args:
        conversation: as one of ``generate``'s.
        cache: what was kept of the conversation so far; keeps this prompt and its answer, also where the caller stops
            early.
    """
    settings = settings or Settings()
    sample = processor.prompt(as_example(conversation))
    pieces = TextPieces(processor, settings.stop)
    row = _row(processor, settings, 0, len(sample))
    told: list[str] = []

    def watch(token: int) -> bool:
        told.append(pieces.push(token))
        return pieces.stopped

    row.watch = watch
    if cache is None:
        reads = _reading(model, processor, model.make_cache(), sample)
    else:
        reads = _going_on(model, processor, cache, sample)
    choose = Chooser(settings, [sample.input_ids], [0], processor.suppressed_ids, _fresh_seed())
    running = Running(model, [row], reads[0], choose, reads[1])
    whole = True
    try:
        while not row.finish:
            whole = False
            running.step()
            whole = True
            yield from filter(None, told)
            told.clear()
    finally:
        if cache is not None and whole:
            cache.give(running.cache, sample, [tokens[0] for tokens in running.fed])
    if last := pieces.end():
        yield last


def _going_on(model: Any, processor: Processor, kept: PromptCache, sample: Sample) -> tuple[Cache, mx.array]:
    """As `_reading`, what is kept excepted. Before its last token a prompt becomes a place to come back to, so that it
    can be asked again."""
    held = kept.take(model, sample)
    rest = held.rest
    if len(rest) > 1 and rest.token_types[-1] == TEXT:
        _reading(model, processor, held.cache, beginning_of(rest, len(rest) - 1))
        rest = rest_of(rest, len(rest) - 1)
    kept.remember(held.cache)
    return _reading(model, processor, held.cache, rest)


def _reading(model: Any, processor: Processor, cache: Cache, sample: Sample) -> tuple[Cache, mx.array]:
    """The cache, and the logits behind the prompt."""
    return cache, read(model, collate([sample], pad_id=processor.pad_id), cache)


def _row(processor: Processor, settings: Settings, index: int, prompt_tokens: int) -> Row:
    row = Row(index, prompt_tokens, settings.max_tokens, frozenset(processor.eos_ids))
    if settings.stop:
        pieces = TextPieces(processor, settings.stop)
        row.watch = lambda token: (pieces.push(token), pieces.stopped)[1]
    return row


def _answer(processor: Processor, settings: Settings, row: Row) -> Answer:
    if not settings.stop:
        return Answer(processor.decode(row.ids), tuple(row.ids), row.finish, row.prompt_tokens)
    pieces = TextPieces(processor, settings.stop)
    text = "".join(map(pieces.push, row.ids)) + pieces.end()
    return Answer(text, tuple(row.ids), "stop" if pieces.stopped else row.finish, row.prompt_tokens)


def _fresh_seed() -> int:
    """From MLX's own state, so that seeding that makes unseeded sampling repeatable too."""
    return int(mx.random.randint(0, 2**31 - 1).item())


@contextmanager
def _ahead(
    processor: Processor, examples: Sequence[Example], order: list[int], count: int
) -> Iterator[Iterator[tuple[int, Sample]]]:
    """(index, prompt) of each example in order, of which a thread makes the next `count` while others are answered."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")
    waiting, later = deque[tuple[int, Future[Sample]]](), iter(order)

    def prompts() -> Iterator[tuple[int, Sample]]:
        while True:
            for i in islice(later, count + 1 - len(waiting)):
                waiting.append((i, pool.submit(processor.prompt, examples[i])))
            if not waiting:
                return
            i, prompt = waiting.popleft()
            yield i, prompt.result()

    try:
        yield prompts()
    finally:
        pool.shutdown(cancel_futures=True)


def answer_ids(
    model: Any, batch: Batch, eos_ids: Sequence[int], max_tokens: int, sampler: Sampler | None = None
) -> list[list[int]]:
    """Token ids that follow each row of a batch of prompts, without the end token."""
    ends, lengths = frozenset(eos_ids), batch.attention_mask.sum(axis=1)
    rows = [Row(i, int(length), max_tokens, ends) for i, length in enumerate(lengths)]
    cache = model.make_cache()
    running = Running(model, list(rows), cache, Stateless(sampler or greedy), read(model, batch, cache))
    while running.rows:
        running.step()
    return [row.ids for row in rows]


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
