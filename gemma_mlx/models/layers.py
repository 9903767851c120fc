"""Leaves that the text decoder and the towers share."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.ops.clamp import clamp
from gemma_mlx.ops.norm_residual import norm_residual


def unit_range(pixels: mx.array) -> mx.array:
    """uint8 as float32 in [0, 1]; anything else as it is."""
    return pixels.astype(mx.float32) * np.float32(1 / 255) if pixels.dtype == mx.uint8 else pixels


def trains(module: nn.Module) -> bool:
    """Whether a module is in training mode and has weights that train."""
    return module.training and bool(tree_flatten(module.trainable_parameters()))


class _Untrainable(set):
    """A module's set of frozen names that `Module.unfreeze` cannot empty of the names it was made with."""

    def __init__(self, names: Iterable[str]):
        super().__init__(names)
        self.names = frozenset(names)

    def clear(self) -> None:
        super().clear()
        self.update(self.names)

    def difference_update(self, *others: Iterable[str]) -> None:
        super().difference_update(*others)
        self.update(self.names)


class BufferModule(nn.Module):
    """A module with buffers: arrays that are loaded and saved under their names and are never trainable.

    They appear in `parameters()`, so that loading and saving need no second path, and stay out of
    `trainable_parameters()` even after `unfreeze()`.
    """

    def add_buffer(self, name: str, value: mx.array) -> None:
        """Attach `value` as `self.<name>`, frozen for good."""
        setattr(self, name, value)
        self._no_grad = _Untrainable({*getattr(self._no_grad, "names", ()), name})


class RMSNorm(nn.Module):
    """x · (mean(x²) + eps)^(−1/2) · weight over the last axis, computed in float32, in the dtype of x.

    The weight multiplies directly (transformers' ``Gemma4RMSNorm``; no "1 + weight" as in Gemma 1 to 3).

    Args:
        dims: size of the last axis.
        eps: added to the mean square.
        with_scale: False for the form without a weight (and without a tensor in the checkpoint).
    """

    def __init__(self, dims: int, eps: float = 1e-6, with_scale: bool = True):
        super().__init__()
        self.eps = eps
        if with_scale:
            self.weight = mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)

    def onto(self, x: mx.array, residual: mx.array, factor: float = 1.0, scale: mx.array | None = None) -> mx.array:
        """(residual + factor · norm(x)) · scale: one pass where `norm_residual`'s kernel runs.

        `scale` [1] is read in the dtype of x and has no gradient.
        """
        scale = None if scale is None else scale.astype(x.dtype)
        return norm_residual(x, residual, self.get("weight"), self.eps, factor, scale)


class ClippedLinear(BufferModule):
    """y = clamp(W · clamp(x, input_min, input_max), output_min, output_max), without bias.

    transformers' ``Gemma4ClippableLinear``: the four bounds are scalars of the checkpoint. An adapter replaces
    `linear`, so that it sits inside both clamps. Without `clipped` this is a plain linear one level deeper. Gradients
    pass on the bounds, as torch's do; where `clamp`'s kernel runs they keep a bit for each value.

    Args:
        input_dims, output_dims: sizes of the last axis of x and of y.
        clipped: whether the four bounds exist.
    """

    def __init__(self, input_dims: int, output_dims: int, clipped: bool = True):
        super().__init__()
        self.linear = nn.Linear(input_dims, output_dims, bias=False)
        self.clipped = clipped
        if clipped:
            for name, sign in (("input_min", -1), ("input_max", 1), ("output_min", -1), ("output_max", 1)):
                self.add_buffer(name, mx.array(sign * float("inf")))

    def __call__(self, x: mx.array) -> mx.array:
        if not self.clipped:
            return self.linear(x)
        y = self.linear(clamp(x, self.input_min, self.input_max))
        return clamp(y, self.output_min, self.output_max)


class MultimodalEmbedder(nn.Module):
    """Soft tokens of a tower [..., tower_dims] -> the decoder's embedding space [..., text_dims].

    RMSNorm without weight, then a linear without bias (transformers' ``Gemma4MultimodalEmbedder``).
    """

    def __init__(self, tower_dims: int, text_dims: int, eps: float = 1e-6):
        super().__init__()
        self.embedding_projection = nn.Linear(tower_dims, text_dims, bias=False)
        self.embedding_pre_projection_norm = RMSNorm(tower_dims, eps, with_scale=False)

    def __call__(self, soft_tokens: mx.array) -> mx.array:
        return self.embedding_projection(self.embedding_pre_projection_norm(soft_tokens))
