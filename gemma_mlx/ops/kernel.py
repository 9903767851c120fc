"""A kernel's one definition: what Metal, CUDA, the self-test and the tests' emulator launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.sources import kernels_folder

Triple = tuple[int, int, int]
Template = Mapping[str, int | bool | mx.Dtype]


@cache
def text_of(file: str) -> str:
    """A file of `kernels/`."""
    return (kernels_folder() / file).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: of the kernel, and of its body `kernels/<name>.metal`: statements within MLX's generated signature.
        inputs, outputs: the names that the body uses for them, in order.
        headers: files of `kernels/` with helper functions, in order. MLX looks for attribute and ``_shape`` names in
            the body only, so a helper takes them as arguments.
        atomic: whether outputs are atomic; their launch then gives ``init``.
        cuda: whether the body also is CUDA: no simdgroup matrices.
        read: bytes that a launch reads, for a kernel whose threadgroups read the same again; None: each input once.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    atomic: bool = False
    cuda: bool = True
    read: Callable[[Launch], int] | None = None

    @property
    def body(self) -> str:
        return text_of(f"{self.name}.metal")

    @property
    def header(self) -> str:
        return "\n".join(text_of(file) for file in self.headers)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: Triple,
        threadgroup: Triple,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
        init: float | None = None,
    ) -> list[mx.array]:
        """Launches the kernel where `dispatch.backend` says.

        Args:
            inputs: as `self.inputs`; MLX makes them row-contiguous. Scalars are arrays of one element.
            template: names and values of the body's template parameters.
            grid: threads in all, whole threadgroups in each dimension (CUDA has no others).
            threadgroup: threads of one group: at most 1,024.
            shapes, dtypes: of the outputs.
            init: what outputs hold before the launch; None: nothing that may be read.
        """
        if any(g % t for g, t in zip(grid, threadgroup, strict=True)):
            raise ValueError(f"{self.name}: grid {grid} is not whole threadgroups of {threadgroup}")
        launch = Launch(self, tuple(inputs), dict(template), grid, threadgroup, tuple(shapes), tuple(dtypes), init)
        return dispatch.backend().run(launch)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that one launch needs. See ``Kernel.__call__``."""

    kernel: Kernel
    inputs: tuple[mx.array, ...]
    template: dict[str, int | bool | mx.Dtype]
    grid: Triple
    threadgroup: Triple
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    init: float | None = None

    def through(self, made: Callable[..., list[mx.array]], **options) -> list[mx.array]:
        """The launch by what ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel`` returned."""
        return made(
            inputs=list(self.inputs),
            template=list(self.template.items()),
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=list(self.shapes),
            output_dtypes=list(self.dtypes),
            init_value=self.init,
            **options,
        )


@cache
def metal(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """What MLX made of the kernel, for Metal. It can be traced without Metal, not run."""
    return mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=kernel.header,
        ensure_row_contiguous=True,
        atomic_outputs=kernel.atomic,
    )


@cache
def cuda(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """What MLX made of the kernel, for CUDA: its body after `kernels/cuda.h`."""
    return mx.fast.cuda_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=f"{text_of('cuda.h')}\n{kernel.header}",
        ensure_row_contiguous=True,
    )
