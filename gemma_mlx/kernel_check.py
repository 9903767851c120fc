"""The self-test of kernels on the machine at hand: each op against plain MLX, and how long both take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from gemma_mlx.errors import InputError
from gemma_mlx.kernel_counts import Count, arguments, listed, of_chosen, with_kernels
from gemma_mlx.machine import describe
from gemma_mlx.ops import dispatch
from gemma_mlx.ops.registry import Op, ops

TOLERANCES = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 2e-2}
"""Largest difference from plain MLX in float32, over the largest value of a result."""
REPEATS, CALLS = 11, 8
"""Timed evaluations, of which the median counts, and calls in each."""


@dataclass(frozen=True)
class Result:
    """What one op did at one size in one dtype.

    Attributes:
        error: the largest difference of a result or gradient from plain MLX in float32, over its largest value;
            infinite for NaN, and where a kernel failed.
        within: whether that is within the dtype's tolerance.
        seconds, plain_seconds: of value and gradients, by kernels and by plain MLX; None where it was not timed.
        moved: bytes that the kernels read and write, inputs and outputs once.
        failure: what the compiler or the device said where a kernel did not run at all.
    """

    op: str
    size: str
    dtype: str
    error: float
    within: bool
    seconds: float | None
    plain_seconds: float | None
    moved: int
    failure: str | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second."""
        return None if self.seconds is None else self.moved / self.seconds


def runnable() -> list[Op]:
    """The ops whose kernels can run here, trusted or not.

    Raises:
        InputError: none can.
    """
    with every_kernel():
        found = [op for op in ops() if dispatch.runs(op.name)]
    if not found:
        if dispatch.backend() is None:
            raise InputError(f"kernels need a GPU, MLX with Metal or CUDA; on {describe()} plain MLX runs instead")
        raise InputError(f"{dispatch.VARIABLE} is off: nothing to test")
    return found


@contextmanager
def every_kernel() -> Iterator[None]:
    """Within the block ``auto`` allows every op: what is tested need not be trusted yet."""
    chosen = dispatch.backend()
    if chosen is None:
        yield
        return
    with dispatch.using(chosen):
        yield


def faster(results: Sequence[Result]) -> list[str]:
    """The ops that were right every time, and at the checkpoints' size took less time in all than plain MLX."""
    by_op: dict[str, list[Result]] = {}
    for r in results:
        by_op.setdefault(r.op, []).append(r)
    chosen = []
    for name, those in by_op.items():
        timed = [r for r in those if r.seconds is not None]
        gains = sum(r.plain_seconds - r.seconds for r in timed)
        if timed and gains > 0 and all(r.within for r in those):
            chosen.append(name)
    return chosen


def _widened(a: Any) -> Any:
    return a.astype(mx.float32) if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating) else a


def both(function: Callable, given: Sequence[Any], wrt: Sequence[int]) -> list[mx.array]:
    """Floating outputs and gradients, for cotangents that follow from the shapes."""
    if not wrt:
        return [a for a in listed(function(*given)) if mx.issubdtype(a.dtype, mx.floating)]
    run, chosen = of_chosen(function, given, wrt), [given[i] for i in wrt]
    pulls = [_pull(a.shape).astype(a.dtype) for a in run(*chosen)]
    outputs, gradients = mx.vjp(run, chosen, pulls)
    return [*outputs, *gradients]


def _pull(shape: tuple[int, ...]) -> mx.array:
    """The same values in every dtype that can hold them: multiples of 1/8 within ±1."""
    count = 1
    for n in shape:
        count *= n
    return ((mx.arange(count) * 7 % 17) / 8 - 1).reshape(shape)


def difference(ours: mx.array, plain: mx.array) -> float:
    """Largest difference over the largest value; infinite where one is NaN and the other is not."""
    ours, plain = ours.astype(mx.float32), plain.astype(mx.float32)
    most = mx.maximum(mx.abs(plain).max(), 1e-30)
    found = (mx.abs(ours - plain).max() / most).item() if ours.size else 0.0
    return found if found == found else float("inf")


def error_of(op: Op, given: Sequence[Any]) -> float:
    """The largest difference of any result of an op's kernels from plain MLX in float32 on the same numbers."""
    plain = both(op.reference, list(map(_widened, given)), op.wrt)
    return max(difference(a, b) for a, b in zip(both(op.function, given, op.wrt), plain, strict=True))


def seconds_of(function: Callable, given: Sequence[Any], wrt: Sequence[int]) -> float:
    """Of one call, value and gradients: the median of evaluations of several calls."""
    taken = []
    for i in range(REPEATS + 2):
        start = time.perf_counter()
        mx.eval([both(function, given, wrt) for _ in range(CALLS)])
        if i >= 2:  # the first compile
            taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


def checked(op: Op, size: str, dtype: mx.Dtype, timed: bool) -> Result:
    """One op at one of its sizes."""
    given = arguments(op, size, dtype)
    mx.eval([a for a in given if isinstance(a, mx.array)])
    moved = sum(with_kernels(op, size, dtype), Count()).moved
    name = str(dtype).rsplit(".", 1)[-1]
    try:
        error = error_of(op, given)
        times = [seconds_of(f, given, op.wrt) if timed else None for f in (op.function, op.reference)]
    except (RuntimeError, ValueError) as e:  # of one kernel: the others are to be tested still
        return Result(op.name, size, name, float("inf"), False, None, None, moved, str(e) or type(e).__name__)
    return Result(op.name, size, name, error, error <= TOLERANCES[dtype], times[0], times[1], moved)


def check_all(sizes: Sequence[str] = ("small", "real")) -> Iterator[Result]:
    """Every op that runs here: small sizes in three dtypes, and the checkpoints' sizes in two, timed.

    Raises:
        InputError: no kernel runs here.
    """
    for op in runnable():
        for size in sizes:
            for dtype in TOLERANCES if size == "small" else (mx.float32, mx.bfloat16):
                with every_kernel():
                    result = checked(op, size, dtype, timed=size != "small")
                yield result


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """What to attach to an issue."""
    rows = [asdict(r) | {"error": _finite(r.error), "bytes_per_second": r.bandwidth} for r in results]
    return {
        "machine": describe(),
        "backend": dispatch.backend().name,
        "mlx": mx.__version__,
        "calls_per_evaluation": CALLS,
        "timed_evaluations": REPEATS,
        "results": rows,
    }
