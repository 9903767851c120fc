"""Which arrays hold a medium, and where its soft tokens lie once padding is dropped: for the model and the step."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_mlx.models.gemma4.audio import soft_token_index as audio_index
from gemma_mlx.models.gemma4.vision import soft_token_index as image_index

MEDIA = {
    "image": ("pixel_values", "image_position_ids"),
    "video": ("pixel_values_videos", "video_position_ids"),
    "audio": ("input_features", "input_features_mask"),
}
"""Kind of medium -> names of its values and of the array that tells them from padding, as in transformers' forward."""


def fixed_soft_tokens(spec: Any, kind: str) -> int | None:
    """Soft tokens of every medium of a kind where they are as many for all (Gemma 3n), else None."""
    part = spec.audio if kind == "audio" else spec.vision
    return getattr(part, "tokens_each", None)


def soft_token_index(spec: Any, kind: str, where: np.ndarray) -> np.ndarray:
    """int32 [n]: which of the flattened, padded soft tokens of a batch's media are real.

    Args:
        spec: the model's.
        kind: of medium.
        where: its array of positions [N, P, 2] (−1 in padding) or mask [M, F]; its values [N, …] where it has neither.

    Raises:
        InputError: a picture whose patches do not fill whole soft tokens.
    """
    if (fixed := fixed_soft_tokens(spec, kind)) is not None:
        return np.arange(len(where) * fixed, dtype=np.int32)
    if kind != "audio":
        return image_index(where, spec.vision.input_pooling)
    if spec.audio.frames_per_token == 1:
        return np.flatnonzero(np.asarray(where)).astype(np.int32)
    return audio_index(where)


def soft_token_counts(spec: Any, kind: str, where: np.ndarray) -> np.ndarray:
    """int [N]: soft tokens of each medium; `where` as for `soft_token_index`."""
    if (fixed := fixed_soft_tokens(spec, kind)) is not None:
        return np.full(len(where), fixed)
    if kind != "audio":
        return (np.asarray(where)[..., 0] != -1).sum(1) // spec.vision.input_pooling**2
    return np.asarray(where)[:, :: spec.audio.frames_per_token].sum(1)


def reads_padding(spec: Any, kind: str) -> bool:
    """Whether a tower's output for a medium depends on how far it is padded (Gemma 3n's convolutions look ahead)."""
    return kind == "audio" and fixed_soft_tokens(spec, kind) is not None


def module_names(kind: str) -> tuple[str, str]:
    """Names of a medium's tower and embedder in the model."""
    return ("audio_tower", "embed_audio") if kind == "audio" else ("vision_tower", "embed_vision")
