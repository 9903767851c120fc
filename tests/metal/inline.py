"""Kernels whose text is in a test, not in kernels/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.kernel import Kernel, Launch, Template, Triple


@dataclass(frozen=True)
class Inline(Kernel):
    """A kernel with its text; messages call it `<name>.metal` and `<name>.h`. Inputs may be strided if it says so."""

    text: str = ""
    header_text: str = ""
    strided: bool = False

    @property
    def body(self) -> str:
        return self.text

    @property
    def header(self) -> str:
        return self.header_text


def launch(
    emulator: dispatch.Backend,
    text: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: Triple,
    threadgroup: Triple,
    *,
    header: str = "",
    template: Template | None = None,
    init: float | None = None,
    atomic: bool = False,
    name: str = "inline",
) -> list[mx.array]:
    """Outputs (name -> shape, dtype) of a kernel of that text. Threadgroups at the grid's ends may be partial."""
    kernel = Inline(name, tuple(inputs), tuple(outputs), atomic=atomic, text=text, header_text=header)
    shapes, dtypes = tuple(shape for shape, _ in outputs.values()), tuple(dtype for _, dtype in outputs.values())
    arrays = tuple(inputs.values())
    return emulator.run(Launch(kernel, arrays, dict(template or {}), grid, threadgroup, shapes, dtypes, init))


def only(made: Sequence[mx.array]) -> mx.array:
    (array,) = made
    return array
