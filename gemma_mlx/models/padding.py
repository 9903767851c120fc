"""What is read of a batch's arrays where their values are known: ids that do not fit, keys that may be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import local
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.cache import Cache

_here = local()


@contextmanager
def chosen_by_model() -> Iterator[None]:
    """Ids that come within the block are the model's own choices: nobody waits for them in order to check them."""
    before, _here.chosen = getattr(_here, "chosen", False), True
    try:
        yield
    finally:
        _here.chosen = before


def host(array: Any) -> np.ndarray | None:
    """The array as numpy; None where it is None or being traced, so that its values are not known."""
    if array is None or isinstance(array, np.ndarray):
        return array
    try:
        return np.array(array)
    except (ValueError, RuntimeError):  # inside mx.compile nothing may be evaluated
        return None


def check_ids(input_ids: Any, vocab_size: int, soft: Mapping[int, tuple[str, mx.array | None]]) -> None:
    """Raise InputError unless ids are in the vocabulary and each kind has as many slots as soft tokens.

    Args:
        input_ids: int [B, T]; not looked at while they are traced, or the model has chosen them.
        vocab_size: of the checkpoint.
        soft: id of a kind's slots -> (its name, its soft tokens [n, H], None for none).
    """
    if getattr(_here, "chosen", False):
        return
    ids, last = host(input_ids), vocab_size - 1
    if ids is None:
        return
    if (outside := ids[(ids < 0) | (ids > last)]).size:
        raise InputError(f"input_ids hold {outside[0]}; this checkpoint's ids are 0 to {last}")
    for token_id, (name, tokens) in soft.items():
        slots, found = int((ids == token_id).sum()), 0 if tokens is None else tokens.shape[0]
        if slots != found:
            raise InputError(
                f"input_ids have {slots} {name} slots (id {token_id}), but the media give {found} soft tokens"
            )


def known_valid(attention_mask: Any, shape: tuple[int, int], cache: Cache | None) -> mx.array | None:
    """bool [B, seen + T] of keys that may be seen, or None where causality hides all padding by itself.

    Args:
        attention_mask: [B, T] or, with a cache, [B, seen + T]; 1 on tokens; None where nothing is padding.
        shape: (B, T) of the new tokens.
        cache: what was seen before, or None.
    """
    mask = host(attention_mask)
    if cache is not None:
        valid = cache.extend_valid(mask, *shape)
        return None if valid is None else mx.array(valid)
    on_the_right = mask is not None and bool((np.diff(mask.astype(np.int8), axis=1) <= 0).all())
    if attention_mask is None or on_the_right:
        return None
    return mx.array(attention_mask).astype(mx.bool_)
