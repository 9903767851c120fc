"""Functions with a gradient of their own, and how a trace sees through them.

``mx.export_function`` shows every operation of a step with its shapes, but stops at ``mx.custom_function``. While a
``Cuts`` is open, a custom function's outputs, and the gradients of its inputs, are therefore stand-ins in the
differentiated function; what they stand for is computed beside it, and ``Cuts.links`` says which array stands for
which. Outside of that these are ``mx.custom_function`` and ``mx.vjp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

Arrays = list[mx.array]
Function = Callable[..., Sequence[mx.array]]


@dataclass
class Cuts:
    """The custom functions of a trace, cut out.

    ``links``: (inputs, outputs, stand-ins, kind) of a call; no inputs where a stand-in is one array by another name.
    """

    links: list[tuple[Arrays, Arrays, Arrays, str]] = field(default_factory=list)
    calls: list[tuple[Any, ...]] | None = None
    """(gradient, inputs, outputs, kind) of each call in the function that is being differentiated."""
    given: Iterator[Arrays] | None = None
    """Stand-ins of the calls' outputs; None where they are computed."""
    made: int = 0

    def stand_in(self, like: mx.array) -> mx.array:
        """An array of this shape and dtype, unlike any other."""
        self.made += 1
        return mx.full(like.shape, self.made).astype(like.dtype)

    def call(self, function: Function, gradient: Function, inputs: Arrays, kind: str) -> Arrays:
        """A custom function's outputs."""
        if self.calls is None:
            return list(function(*inputs))
        calls, self.calls = self.calls, None
        outputs = list(function(*inputs))
        self.calls = calls
        calls.append((gradient, inputs, outputs, kind))
        return outputs if self.given is None else next(self.given)

    def run(
        self, function: Function, inputs: Sequence[mx.array], given: Iterator[Arrays] | None
    ) -> tuple[Arrays, list]:
        """(outputs of a function that is differentiated, its calls)."""
        held = self.calls, self.given
        self.calls, self.given = [], given
        try:
            return list(function(*inputs)), self.calls
        finally:
            self.calls, self.given = held

    def vjp(self, function: Function, primals: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
        """``mx.vjp`` with the custom functions cut out."""
        outer = self.calls, self.given
        _, planned = self.run(function, primals, None)
        outputs_of = [[self.stand_in(a) for a in outputs] for _, _, outputs, _ in planned]
        flat = [a for outputs in outputs_of for a in outputs]
        seen: list[tuple[Any, ...]] = []

        def cut(*arrays: mx.array) -> Arrays:
            rest = iter(arrays[len(primals) :])
            given = iter([[next(rest) for _ in outputs] for outputs in outputs_of])
            outputs, seen[:] = self.run(function, arrays[: len(primals)], given)
            return [*outputs, *(a for _, inputs, *_ in seen for a in _floats(inputs))]

        gradients_of = [[self.stand_in(a) for a in _floats(inputs)] for _, inputs, *_ in planned]
        outputs, gradients = mx.vjp(cut, [*primals, *flat], [*cotangents, *(a for made in gradients_of for a in made)])
        mine, theirs = gradients[: len(primals)], iter(gradients[len(primals) :])
        self.calls = None
        for (gradient, inputs, real, kind), made, of_inputs in zip(seen, outputs_of, gradients_of, strict=True):
            self.links.append((inputs, real, made, kind))
            again = [self.stand_in(a) for a in inputs]  # else what both compute would be taken for one and kept
            self.links += [([], [a], [b], "") for a, b in zip(inputs, again, strict=True)]
            back = list(gradient(again, [next(theirs) for _ in made], made))
            floats = [b for a, b in zip(inputs, back, strict=True) if mx.issubdtype(a.dtype, mx.floating)]
            self.links += [([], [b], [a], "") for a, b in zip(of_inputs, floats, strict=True)]
        self.calls, self.given = outer
        return outputs[: len(outputs) - sum(map(len, gradients_of))], mine


def _floats(arrays: Sequence[mx.array]) -> Arrays:
    return [a for a in arrays if mx.issubdtype(a.dtype, mx.floating)]


_open: Cuts | None = None


@contextmanager
def cutting() -> Iterator[Cuts]:
    """Within the block custom functions are cut out."""
    global _open
    _open = Cuts()
    try:
        yield _open
    finally:
        _open = None


def custom_function(function: Function, gradient: Function, kind: str = "") -> Callable[..., Sequence[mx.array]]:
    """``function`` of arrays, with ``gradient(inputs, cotangents, outputs)`` for its own.

    ``kind``: what a trace counts the memory within the function as.
    """
    custom = mx.custom_function(function)
    custom.vjp(gradient)

    def call(*inputs: mx.array) -> Sequence[mx.array]:
        return custom(*inputs) if _open is None else _open.call(function, gradient, list(inputs), kind)

    return call


def vjp(function: Function, primals: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
    """``mx.vjp``, (outputs, gradients), for functions that may call custom functions."""
    return mx.vjp(function, primals, cotangents) if _open is None else _open.vjp(function, primals, cotangents)


def contiguous(x: mx.array) -> mx.array:
    """``mx.contiguous`` of an array that was just computed, so that nothing is copied; a trace cannot show it."""
    return mx.contiguous(x) if _open is None else x
