"""An op with its kernels in the emulator, against the same formula in torch's float64.

Tolerances are largest differences relative to the largest value of each array: 1e-5 in float32, 2e-3 in float16, 1e-2
in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from gemma_mlx.ops import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "metal"))

from emulator import SCHEDULES, Emulator

TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
NAMES = tuple(str(d).rsplit(".", 1)[-1] for d in DTYPES)


def arrays(seed: int, dtype: mx.Dtype, *shapes: tuple[int, ...], size: float = 1.0) -> list[mx.array]:
    """Normal values."""
    random = np.random.default_rng(seed)
    return [mx.array((size * random.standard_normal(shape)).astype(np.float32)).astype(dtype) for shape in shapes]


def exact(x: Any) -> Any:
    """An array in torch's float64 (integers as they are); anything else as it is."""
    if not isinstance(x, mx.array):
        return x
    if x.dtype in (mx.bfloat16, mx.float16, mx.float32):
        return torch.tensor(np.array(x.astype(mx.float32)), dtype=torch.float64)
    return torch.tensor(np.array(x))


def listed(x: Any) -> list:
    return list(x) if isinstance(x, (list, tuple)) else [x]


def cotangents_of(outputs: Sequence[mx.array], seed: int) -> list[mx.array]:
    random = np.random.default_rng(seed + 1)
    return [mx.array(random.standard_normal(o.shape).astype(np.float32)).astype(o.dtype) for o in outputs]


def ours(function: Callable, arguments: Sequence, wrt: Sequence[int], seed: int) -> tuple[list, list, list]:
    """(outputs, cotangents, gradients) of `function`, on whatever backend is in use."""

    def of_chosen(*chosen: mx.array) -> list[mx.array]:
        given = list(arguments)
        for i, x in zip(wrt, chosen, strict=True):
            given[i] = x
        return listed(function(*given))

    if not wrt:
        return of_chosen(), [], []
    chosen = [arguments[i] for i in wrt]
    outputs = of_chosen(*chosen)
    cotangents = cotangents_of(outputs, seed)
    outputs, gradients = mx.vjp(of_chosen, chosen, cotangents)
    return outputs, cotangents, gradients


def theirs(oracle: Callable, arguments: Sequence, wrt: Sequence[int], cotangents: Sequence) -> tuple[list, list]:
    """(outputs, gradients) of the formula in torch."""
    given = [exact(a) for a in arguments]
    for i in wrt:
        given[i].requires_grad_(True)
    outputs = listed(oracle(*given))
    if not wrt:
        return outputs, []
    sum((o * exact(c)).sum() for o, c in zip(outputs, cotangents, strict=True)).backward()
    return outputs, [torch.zeros_like(given[i]) if given[i].grad is None else given[i].grad for i in wrt]


def difference(a: mx.array, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `b` (at least 1e-6)."""
    a = np.array(a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, dtype=np.float64)
    b = b.detach().numpy().astype(np.float64)
    assert a.shape == b.shape, f"shape {a.shape}, should be {b.shape}"
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-6))


def check(
    function: Callable,
    oracle: Callable,
    arguments: Sequence,
    wrt: Sequence[int] = (),
    *,
    schedules: Sequence[str] = ("fifo",),
    seed: int = 0,
    tolerance: float | None = None,
    **options: Any,
) -> list[Emulator]:
    """Runs values and gradients under each schedule and compares them; the emulator raises what it finds.

    Args:
        function: the op; its outputs may be one array or several.
        oracle: the same of torch tensors in float64.
        arguments: of both; arrays and anything else.
        wrt: which have gradients, for random cotangents in the dtype of the outputs.
        tolerance: instead of that of the first array's dtype, where a test says why.
    """
    dtype = next(a.dtype for a in arguments if isinstance(a, mx.array))
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    ran = []
    for schedule in schedules:
        with dispatch.using(Emulator(schedule, seed, **options)) as emulator:
            outputs, cotangents, gradients = ours(function, arguments, wrt, seed)
            mx.eval(outputs, gradients)
        assert emulator.launches, "no kernel ran"
        expected, wanted = theirs(oracle, arguments, wrt, cotangents)
        for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
            assert difference(a, b) <= bound, f"{schedule}: output {i} is off by {difference(a, b):.1e}"
        for i, a, b in zip(wrt, gradients, wanted, strict=True):
            assert a.dtype == arguments[i].dtype
            assert difference(a, b) <= bound, f"{schedule}: gradient of argument {i} is off by {difference(a, b):.1e}"
        ran.append(emulator)
    return ran


__all__ = ["DTYPES", "NAMES", "SCHEDULES", "TOLERANCE", "Emulator", "arrays", "check", "difference", "exact", "ours"]
