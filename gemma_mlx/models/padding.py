"""Which keys may be seen, from a batch's attention mask."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.models.cache import Cache


def host(array: Any) -> np.ndarray | None:
    """The array as numpy; None where it is None or being traced, so that its values are not known."""
    if array is None or isinstance(array, np.ndarray):
        return array
    try:
        return np.array(array)
    except (ValueError, RuntimeError):  # inside mx.compile nothing may be evaluated
        return None


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
