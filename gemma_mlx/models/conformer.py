"""What the audio towers of all families share."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np


def relative_positions(distances: int, dims: int, dtype: mx.Dtype) -> mx.array:
    """[distances + 1, dims] sinusoids of distance `distances` … 0: sines, then cosines, of dims / 2 rates 1 … 1e-4."""
    rates = np.exp(np.arange(dims // 2) * (-math.log(1e4) / max(dims // 2 - 1, 1)))
    angle = np.arange(distances, -1, -1)[:, None] * rates
    return mx.array(np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(np.float32)).astype(dtype)
