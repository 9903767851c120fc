"""What is kept of a conversation between its turns, so that a next prompt is read from where it departs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from gemma_mlx.adapters.attach import Attached, attached
from gemma_mlx.data.batches import clip_tokens
from gemma_mlx.data.features_gemma3n import Clip
from gemma_mlx.data.template import AUDIO, IMAGE, VIDEO, Sample
from gemma_mlx.models.cache import Cache, Snapshot

SNAPSHOTS = 4
"""Places in a conversation that one can come back to where a sliding layer has gone on by more than it holds."""


@dataclass(frozen=True)
class Held:
    """What a prompt goes on from.

    Attributes:
        cache: keys and values of its first tokens.
        rest: the prompt without these tokens and their media.
        reused: how many they are.
    """

    cache: Cache
    rest: Sample
    reused: int


class PromptCache:
    """One conversation's keys and values, reused where the next prompt begins as the last one did.

    Tokens are compared by their ids, media by their contents. A prompt that departs from what is held is read from
    there, or from an earlier place that can be come back to: the end of one of the last `SNAPSHOTS` prompts, or the
    beginning. Of another model, or after an adapter was put on or taken off, nothing is reused. After training steps
    `clear` it.

    Attributes:
        reused: tokens of the last prompt that were not read again.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.reused = 0
        self._cache: Cache | None = None
        self._marks = np.zeros((0, 2), np.uint64)
        self._snapshots: list[Snapshot] = []
        self._of: tuple[Attached, int] | None = None

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._marks)

    def take(self, model: Any, sample: Sample) -> Held:
        """The longest beginning of the prompt that is held, at least one token less than all of it. What is held
        leaves this object until `give`."""
        state = attached(model)
        if self._of is None or self._of[0] is not state or self._of[1] != state.changes:
            self.clear()
        marks = marks_of(sample)
        length = _common(self._marks, marks)
        cache, snapshots = self._cache, [s for s in self._snapshots if s.offset <= length]
        if cache is None or not length:
            return self._taken(model, model.make_cache(), [], sample)
        if not cache.trim(length):
            if not snapshots:
                return self._taken(model, model.make_cache(), [], sample)
            cache.restore(snapshots[-1])
        return self._taken(model, cache, snapshots, sample)

    def _taken(self, model: Any, cache: Cache, snapshots: list[Snapshot], sample: Sample) -> Held:
        self.clear()
        state = attached(model)
        self._of = (state, state.changes)
        self._snapshots, self.reused = snapshots, cache.offset
        return Held(cache, rest_of(sample, cache.offset), cache.offset)

    def remember(self, cache: Cache) -> None:
        """Make the cache's present end a place that one can come back to."""
        self._snapshots = [*self._snapshots[1 - SNAPSHOTS :], cache.snapshot()]

    def give(self, cache: Cache, sample: Sample, ids: list[int]) -> None:
        """Hold the cache, which has seen this prompt and these tokens behind it, or the first of them."""
        self._cache = cache
        self._marks = np.concatenate([marks_of(sample), _texts(np.array(ids, np.int64))])[: cache.offset]


def _texts(ids: np.ndarray) -> np.ndarray:
    """Marks of ids that are no slots."""
    return np.stack([ids, np.zeros_like(ids)], axis=1).astype(np.uint64)


def marks_of(sample: Sample) -> np.ndarray:
    """uint64 [T, 2]: what stands at each position: its id, and in slots of media a hash of the medium's contents."""
    marks = _texts(sample.input_ids.astype(np.int64))
    for kind, media in _media(sample).items():
        hashes = np.array([digest for digest, _ in media], np.uint64)
        marks[sample.token_types == kind, 1] = np.repeat(hashes, [tokens for _, tokens in media])
    return marks


def _media(sample: Sample) -> dict[int, list[tuple[int, int]]]:
    """Token type -> (hash, slots) of each medium, in order."""
    frames = [frame for video in sample.videos for frame in video]
    per = sample.frames_per_token
    return {
        IMAGE: [(_number(image.digest()), image.soft_tokens) for image in sample.images],
        VIDEO: [(_number(frame.digest()), frame.soft_tokens) for frame in frames],
        AUDIO: [(_number(_clip_digest(clip)), clip_tokens(clip, per)) for clip in sample.clips],
    }


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little") | 1


def _clip_digest(clip: np.ndarray | Clip) -> bytes:
    features = clip.features if isinstance(clip, Clip) else clip
    return blake2b(np.ascontiguousarray(features), digest_size=16).digest()


def _common(held: np.ndarray, new: np.ndarray) -> int:
    """Positions at the beginning that are the same, so that a cut behind them parts no medium and leaves something."""
    most = min(len(held), len(new) - 1)
    differs = np.flatnonzero((held[:most] != new[:most]).any(axis=1))
    length = int(differs[0]) if differs.size else most
    while length and any(_within(marks, length) for marks in (held, new)):
        length -= 1
    return length


def _within(marks: np.ndarray, at: int) -> bool:
    """Whether a run of slots goes on over a position."""
    return at < len(marks) and bool(marks[at, 1] and marks[at - 1, 1])


def rest_of(sample: Sample, start: int) -> Sample:
    """The sample from a position on, which lies in no medium."""
    return _cut(sample, slice(start, None), _media_before(sample, start))


def beginning_of(sample: Sample, stop: int) -> Sample:
    """The sample up to a position that lies behind all its media."""
    return _cut(sample, slice(None, stop), {IMAGE: 0, VIDEO: 0, AUDIO: 0})


def _media_before(sample: Sample, position: int) -> dict[int, int]:
    """Token type -> how many media lie before a position."""
    before = sample.token_types[:position]
    ends = {kind: np.cumsum([tokens for _, tokens in media]) for kind, media in _media(sample).items()}
    return {kind: int((each <= (before == kind).sum()).sum()) for kind, each in ends.items()}


def _cut(sample: Sample, kept: slice, gone: dict[int, int]) -> Sample:
    frames = tuple(frame for video in sample.videos for frame in video)[gone[VIDEO] :]
    return replace(
        sample, input_ids=sample.input_ids[kept], labels=sample.labels[kept], token_types=sample.token_types[kept],
        images=sample.images[gone[IMAGE] :], clips=sample.clips[gone[AUDIO] :], videos=(frames,) if frames else (),
    )  # fmt: skip
