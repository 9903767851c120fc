"""Ops with their kernels emulated, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from metal.emulator import Emulator

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.registry import Op

SCHEDULES = ("fifo", "lifo", "random")
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}
"""Of the largest absolute value of a result."""
DTYPES = tuple(TOLERANCE)


def flat(made: Any) -> list:
    return list(made) if isinstance(made, (list, tuple)) else [made]


def numbers(array: mx.array) -> np.ndarray:
    """float64."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array).astype(np.float64)


def _given(argument: Any, dtype: mx.Dtype) -> Any:
    if isinstance(argument, np.ndarray) and argument.dtype.kind == "f":
        return mx.array(argument.astype(np.float32)).astype(dtype)
    return mx.array(argument) if isinstance(argument, np.ndarray) else argument


def _exact(given: Any, differentiated: bool) -> Any:
    if not isinstance(given, mx.array):
        return given
    if not mx.issubdtype(given.dtype, mx.floating):
        return torch.tensor(np.array(given))
    return torch.tensor(numbers(given), requires_grad=differentiated)


def cotangents_for(outputs: Sequence[mx.array]) -> list[mx.array]:
    return [mx.random.normal(a.shape, key=mx.random.key(7 + i)).astype(a.dtype) for i, a in enumerate(outputs)]


def emulated(
    function: Callable, given: Sequence[Any], wrt: Sequence[int], emulator: Emulator
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """(outputs, cotangents, gradients of the arguments `wrt`), with kernels on the emulator.

    Only floating outputs have cotangents, all random.
    """

    def of(*arrays: mx.array) -> list[mx.array]:
        arguments = list(given)
        for i, array in zip(wrt, arrays, strict=True):
            arguments[i] = array
        return flat(function(*arguments))

    with dispatch.using(emulator):
        outputs = of(*(given[i] for i in wrt))
        mx.eval(outputs)
        floats = [i for i, a in enumerate(outputs) if mx.issubdtype(a.dtype, mx.floating)]
        cotangents = cotangents_for([outputs[i] for i in floats])
        gradients = []
        if wrt:
            _, gradients = mx.vjp(lambda *a: [of(*a)[i] for i in floats], [given[i] for i in wrt], cotangents)
            mx.eval(gradients)
    return outputs, cotangents, gradients


def exactly(
    oracle: Callable, given: Sequence[Any], wrt: Sequence[int], cotangents: Sequence[mx.array]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(outputs, gradients) of `oracle`, torch in float64, for the same (rounded) arguments and cotangents."""
    arguments = [_exact(a, i in wrt) for i, a in enumerate(given)]
    outputs = flat(oracle(*arguments))
    floats = [a for a in outputs if a.dtype.is_floating_point]
    gradients = []
    if wrt:
        gradients = torch.autograd.grad(
            [a for a in floats if a.requires_grad], [arguments[i] for i in wrt],
            [torch.tensor(numbers(c)) for c, a in zip(cotangents, floats, strict=True) if a.requires_grad],
        )  # fmt: skip
    return [a.detach().double().numpy() for a in outputs], [a.numpy() for a in gradients]


def assert_close(name: str, ours: mx.array, theirs: np.ndarray, tolerance: float, sampled: bool = False) -> float:
    """The largest difference over the largest value; where `sampled`, of what is not NaN, which some must be."""
    mine = numbers(ours)
    assert mine.shape == theirs.shape, f"{name}: {mine.shape}, not {theirs.shape}"
    if mine.size == 0:
        return 0.0
    if sampled:
        ran = ~np.isnan(mine)
        assert ran.any(), f"{name}: nothing was computed"
        mine, theirs = mine[ran], theirs[ran]
    assert np.array_equal(np.isnan(mine), np.isnan(theirs)), f"{name}: {np.isnan(mine).sum()} NaNs"
    mine, theirs = np.nan_to_num(mine), np.nan_to_num(theirs)
    error = float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-30)) if np.any(mine != theirs) else 0.0
    assert error <= tolerance, f"{name}: {error:.2e} of the largest value, {tolerance:.0e} allowed"
    return error


def check(
    function: Callable | Op,
    arguments: Sequence[Any],
    oracle: Callable,
    wrt: Sequence[int] = (),
    dtype: mx.Dtype = mx.float32,
    schedules: Sequence[str] = SCHEDULES,
    tolerance: float | None = None,
    sample: int | None = None,
    launches: Sequence[str] | None = None,
) -> dict[str, float]:
    """Runs an op with emulated kernels, forward and backward, in each schedule, and compares it with `oracle`.

    All schedules must give the same bits, and no checker may complain.

    Args:
        function: an `Op`, or a function that takes the arguments.
        arguments: NumPy arrays of floats become arrays of `dtype`, other NumPy arrays arrays; the rest goes as it is
            (``mx.array`` of any dtype too). Generate what matters at sizes around a block.
        oracle: takes the arguments as torch tensors, floats as float64 (of the values after rounding to `dtype`), gives
            what `function` gives. Gradients by torch's autograd.
        wrt: arguments whose gradients are compared.
        tolerance: of the largest value of each result; by default 1e-5 in float32, 2e-3 in float16, 1e-2 in bfloat16.
        sample: so many threadgroups of a launch only; results that are NaN are then not compared.
        launches: names of kernels that must have been launched; by default an Op's all, where `wrt` is given.

    Returns:
        Name of each result ("output 0", "gradient 2" …) -> the largest difference over its largest value.
    """
    op = function if isinstance(function, Op) else None
    run = op.function if op else function
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    given = [_given(a, dtype) for a in arguments]
    errors: dict[str, float] = {}
    first = expected = None
    for schedule in schedules:
        # One schedule unoptimised: that sees every unset value, and shows that the optimiser changes nothing.
        emulator = Emulator(
            schedule, seed=len(schedule), sample=sample, optimise=schedule != schedules[-1] or bool(sample)
        )
        outputs, cotangents, gradients = emulated(run, given, wrt, emulator)
        ran = {record.kernel for record in emulator.records}
        required = set(launches) if launches is not None else {k.name for k in op.kernels} if op and wrt else set()
        assert ran and required <= ran, f"launched {sorted(ran)}, not {sorted(required - ran)}"
        expected = expected or exactly(oracle, given, wrt, cotangents)
        for kind, made, exact in zip(("output", "gradient"), (outputs, gradients), expected, strict=True):
            assert len(made) == len(exact)
            for i, (ours, theirs) in enumerate(zip(made, exact, strict=True)):
                name = f"{kind} {wrt[i] if kind == 'gradient' else i}"
                errors[name] = assert_close(f"{name}, {schedule}", ours, theirs, tolerance, sample is not None)
        if sample is None:
            bits = [numbers(a) for a in (*outputs, *gradients)]
            first = first or bits
            same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, bits, strict=True))
            assert same, f"{schedule} and {schedules[0]} differ"
    return errors
