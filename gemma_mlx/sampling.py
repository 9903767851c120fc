"""How a token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mlx.errors import InputError

Sampler = Callable[[mx.array], mx.array]
"""float32 logits [B, V] -> token ids [B]."""
Filter = Callable[[mx.array], mx.array]
"""Log-probabilities [B, V] -> the same, −inf at tokens that are out."""
BARRED = -1e9
"""Logit of a token that must not come."""


@dataclass(frozen=True)
class Settings:
    """How answers are made. Temperature 0 takes the likeliest token.

    Attributes:
        max_tokens: the most tokens of an answer.
        temperature, top_p, top_k, min_p: of mlx-lm's sampling chain.
        repetition_penalty: above 1 for less of what the last ``repetition_context`` tokens hold; 1 changes nothing.
        repetition_context: tokens, the prompt's among them, that the penalty looks at.
        stop: texts that end an answer, which holds what is before them.
        seed: makes sampling repeatable: what a row draws follows from the seed and its index alone, whatever rows
            are answered beside it.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_tokens", self.max_tokens, 1, None, int)
        _check("temperature", self.temperature, 0, None)
        _check("top_p", self.top_p, 0, 1)
        _check("top_k", self.top_k, 0, None, int)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_context", self.repetition_context, 1, None, int)
        if not (_check("repetition_penalty", self.repetition_penalty, 0, None) > 0):
            raise InputError("repetition_penalty is 0; expected a number above 0 (1 changes nothing)")
        if self.seed is not None:
            _check("seed", self.seed, 0, None, int)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise InputError(f"stop holds {self.stop!r}; expected texts of at least one character")


def _check(name: str, value: float, least: float, most: float | None, kind: type = float) -> float:
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value < least or (most is not None and value > most):
        what = "a whole number" if kind is int else "a number"
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {value!r}; expected {what} {limits}")
    return value


class Chooser:
    """Chooses the next token of each row of a batch, whose rows come and go.

    Args:
        settings: how.
        prompts: ids of each row's prompt.
        rows: a number for each row, from which with the seed all that it draws follows.
        barred: ids that never come.
        seed: in place of the settings' where those have none.
    """

    def __init__(
        self,
        settings: Settings,
        prompts: Sequence[np.ndarray],
        rows: Sequence[int],
        barred: Sequence[int] = (),
        seed: int = 0,
    ):
        self.settings, self.barred = settings, barred
        seed = settings.seed if settings.seed is not None else seed
        self._keys = np.array([np.random.SeedSequence([seed, row]).generate_state(2) for row in rows], np.uint32)
        self._past = None if settings.repetition_penalty == 1 else _past(prompts, settings.repetition_context)
        self._filters = filters(settings)

    def __call__(self, logits: mx.array) -> mx.array:
        """float32 logits [B, V] -> token ids int [B], which count as said."""
        logits = barring(logits, self.barred)
        if self._past is not None:
            logits = penalised(logits, self._past, self.settings.repetition_penalty)
        tokens = self._drawn(logits) if self.settings.temperature else greedy(logits)
        if self._past is not None:
            self._past = mx.concatenate([self._past[:, 1:], tokens[:, None].astype(mx.int32)], axis=1)
        self._keys[:, 1] += 1
        return tokens

    def _drawn(self, logits: mx.array) -> mx.array:
        left = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for narrowed in self._filters:
            left = narrowed(left)
        return mx.vmap(_categorical)(left * (1 / self.settings.temperature), mx.array(self._keys))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._keys = self._keys[list(rows)]
        if self._past is not None:
            self._past = self._past[mx.array(np.array(rows, np.int32))]

    def join(self, other: Chooser) -> None:
        """Take in the rows of another with the same settings, behind one's own."""
        self._keys = np.concatenate([self._keys, other._keys])
        if self._past is not None:
            self._past = mx.concatenate([self._past, other._past])


def _categorical(scores: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(scores, key=key)


def _past(prompts: Sequence[np.ndarray], context: int) -> mx.array:
    """int32 [B, context]: the last ids of each prompt; before a short one its first id, which counts once anyway."""
    rows = [np.asarray(ids, np.int32)[-context:] for ids in prompts]
    return mx.array(np.stack([np.pad(row, (context - len(row), 0), mode="edge") for row in rows]))


def penalised(logits: mx.array, past: mx.array, penalty: float) -> mx.array:
    """Logits [B, V] where those of the ids `past` [B, n] are made smaller: divided if above 0, else multiplied."""
    found = mx.take_along_axis(logits, past, axis=-1)
    return mx.put_along_axis(logits, past, mx.where(found < 0, found * penalty, found / penalty), axis=-1)


def barring(logits: mx.array, ids: Sequence[int]) -> mx.array:
    """Logits [B, V] by which none of these ids is ever chosen."""
    if not len(ids):
        return logits
    barred = mx.broadcast_to(mx.array(list(ids)), (len(logits), len(ids)))
    return mx.put_along_axis(logits, barred, mx.array(BARRED, logits.dtype), axis=-1)


def greedy(logits: mx.array) -> mx.array:
    """The likeliest token of each row."""
    return mx.argmax(logits, axis=-1)


def filters(settings: Settings) -> list[Filter]:
    """mlx-lm's, in its order; those that change nothing are left out."""
    found: list[Filter] = []
    if not settings.temperature:
        return found
    if 0 < settings.top_p < 1:
        found.append(lambda x: _mlx_lm("apply_top_p")(x, settings.top_p))
    if settings.min_p:
        found.append(lambda x: _mlx_lm("apply_min_p")(x, settings.min_p))
    if settings.top_k:
        found.append(lambda x: _mlx_lm("apply_top_k")(x, settings.top_k) if settings.top_k < x.shape[-1] else x)
    return found


def _mlx_lm(name: str) -> Callable[..., mx.array]:
    from mlx_lm import sample_utils

    return getattr(sample_utils, name)


def suppressing(sampler: Sampler, ids: Sequence[int]) -> Sampler:
    """The sampler, never giving any of these tokens: slots of media that are not there, say."""
    return (lambda logits: sampler(barring(logits, ids))) if len(ids) else sampler
