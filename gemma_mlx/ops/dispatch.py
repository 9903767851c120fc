"""Which implementation of an op runs: its kernel on Metal or CUDA, or its plain MLX reference.

A kernel runs where all of this holds, and the choice never depends on whether a launch fails:

1. the default device is a GPU and MLX has Metal, or CUDA and the kernel has a CUDA form;
2. ``GEMMA_MLX_KERNELS`` allows it: ``auto`` (default), the ops that ``doctor --kernels`` found right and faster than
   plain MLX on this machine; ``on``, ``off``, or names of ops separated by commas;
3. the op takes the shapes and dtypes (its own file says which).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from gemma_mlx.errors import InputError

if TYPE_CHECKING:
    from gemma_mlx.ops.kernel import Launch

VARIABLE = "GEMMA_MLX_KERNELS"
log = logging.getLogger("gemma_mlx")


class Backend(Protocol):
    """What launches kernels."""

    name: str

    def run(self, launch: Launch) -> list[mx.array]: ...


class Metal:
    name = "metal"

    def run(self, launch: Launch) -> list[mx.array]:
        from gemma_mlx.ops.kernel import metal

        return launch.through(metal(launch.kernel))


class Cuda:
    name = "cuda"

    def run(self, launch: Launch) -> list[mx.array]:
        from gemma_mlx.ops.kernel import cuda

        return launch.through(cuda(launch.kernel))


_backend: Backend | None = None
_reported: set[str] = set()


def backend() -> Backend | None:
    """What kernels of this process run on; None: they do not."""
    if _backend is not None:
        return _backend
    if mx.default_device().type != mx.gpu:
        return None
    if mx.metal.is_available():
        return Metal()
    return Cuda() if mx.cuda.is_available() else None


@contextmanager
def using(chosen: Backend) -> Iterator[Backend]:
    """Within the block kernels are launched by `chosen`, as the tests' emulator is."""
    global _backend
    held, _backend = _backend, chosen
    try:
        yield chosen
    finally:
        _backend = held


def allowed(op: str) -> bool:
    """Whether ``GEMMA_MLX_KERNELS`` allows this op's kernels. A backend in `using` was chosen: ``auto`` allows all.

    Raises:
        InputError: it names an op that does not exist.
    """
    setting = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if setting in ("on", "off"):
        return setting == "on"
    if setting == "auto":
        return _backend is not None or _tested(op)
    from gemma_mlx.ops.registry import names

    chosen = {name.strip() for name in setting.split(",")}
    if unknown := sorted(chosen - set(names())):
        raise InputError(
            f"{VARIABLE}={setting}: no kernel {', '.join(unknown)}; there are auto, on, off, {', '.join(names())}"
        )
    return op in chosen


def _tested(op: str) -> bool:
    """Whether this machine's self-test chose the op; says once how to have one."""
    from gemma_mlx.ops.trust import tested, trusted

    if "" not in _reported and not tested():
        _reported.add("")
        log.info("kernels: none until `python -m gemma_mlx doctor --kernels` has tested and timed them here")
    return op in trusted()


@cache
def has_cuda_form(op: str) -> bool:
    """Whether all kernels of an op have a CUDA form."""
    from gemma_mlx.ops.registry import ops

    return all(kernel.cuda for found in ops() if found.name == op for kernel in found.kernels)


def runs(op: str) -> bool:
    """Whether the kernels of `op` run here; said once in the log."""
    chosen = backend()
    if chosen is None or not allowed(op) or (chosen.name == "cuda" and not has_cuda_form(op)):
        return False
    if op not in _reported:
        _reported.add(op)
        log.info("%s: kernel on %s", op, chosen.name)
    return True
