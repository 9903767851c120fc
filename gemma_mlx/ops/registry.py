"""All ops with kernels of their own, for the self-test, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.ops.kernel import Kernel

MODULES: tuple[str, ...] = (
    "gated_gelu",
    "norm_residual",
    "clamp",
    "head_scores",
    "head_pulls",
    "altup_predict",
    "altup_correct",
    "sparse_gelu",
    "banded_attention",
    "glu_conv",
    "norm_relu",
    "cumulative_norm",
    "flash_attention",
    "flash_matrix",
    "qk_norm_rope",
    "norm_gelu",
    "depthwise_conv",
    "vision_pool",
    "patch_positions",
)
"""Files of gemma_mlx/ops that define an ``OP``; its name is the file's."""

Arguments = Callable[[np.random.Generator, mx.Dtype], Sequence[Any]]


@dataclass(frozen=True)
class Op:
    """An op: its public function, what it equals, and sizes to try it at.

    Attributes:
        name: of its file in gemma_mlx/ops and of its tests, and what ``GEMMA_MLX_KERNELS`` calls it.
        kernels: that it launches, forward and backward.
        function: the public function; takes the kernel where ``dispatch.runs(name)``.
        reference: plain MLX of the same signature.
        sizes: name -> arguments made from a generator, in a dtype: "small" (seconds in an emulator), "real" (as the
            checkpoints have it).
        wrt: which arguments have gradients.
    """

    name: str
    kernels: tuple[Kernel, ...]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    sizes: Mapping[str, Arguments]
    wrt: tuple[int, ...]


def names() -> tuple[str, ...]:
    return MODULES


def ops() -> list[Op]:
    """Every op, in order."""
    return [import_module(f"gemma_mlx.ops.{name}").OP for name in MODULES]
