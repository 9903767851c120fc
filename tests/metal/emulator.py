"""Runs kernels on the CPU, from the text that MLX makes for Metal, and checks everything they do. See README.md."""

from __future__ import annotations

import ctypes
import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from metal.compiler import kernel_library, runtime_library
from metal.fault import Fault
from metal.lines import line_of
from metal.source import Source, check_spelling, source, translation_unit

from gemma_mlx.ops.kernel import Launch

__all__ = ["Emulator", "Fault", "Record"]

SCHEDULES = ("fifo", "lifo", "random")
MOST_THREADS = 1024
_POINTER = ctypes.c_void_p


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("data", _POINTER), ("result", _POINTER), ("written", _POINTER),
        ("size", ctypes.c_uint64), ("granule", ctypes.c_uint32), ("slot", ctypes.c_uint32), ("low", _POINTER),
        ("cells", _POINTER), ("loaded", ctypes.c_uint64), ("stored", ctypes.c_uint64),
        ("distinct", ctypes.c_uint64),
    ]  # fmt: skip


class _Setup(ctypes.Structure):
    _fields_ = [
        ("entry", _POINTER), ("image_low", ctypes.c_uint64), ("image_high", ctypes.c_uint64), ("buffers", _POINTER),
        ("buffer_count", ctypes.c_uint32), ("schedule", ctypes.c_uint32), ("seed", ctypes.c_uint64),
        ("group", ctypes.c_uint32 * 3), ("grid", ctypes.c_uint32 * 3), ("groups", _POINTER),
        ("group_count", ctypes.c_uint64), ("seconds", ctypes.c_long),
    ]  # fmt: skip


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 32), ("message", ctypes.c_char * 480), ("file", ctypes.c_char * 240),
        ("line", ctypes.c_uint32), ("place", ctypes.c_uint64), ("other", ctypes.c_uint64),
    ]  # fmt: skip


@cache
def _runtime(path: Path) -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@cache
def _kernel(path: Path) -> tuple[ctypes.CDLL, int, int, int]:
    """(library, entry, lowest and highest address)."""
    library = ctypes.CDLL(str(path))
    library.emulated_low.restype = library.emulated_high.restype = _POINTER
    return library, ctypes.cast(library.emulated_entry, _POINTER).value, library.emulated_low(), library.emulated_high()


@dataclass
class Record:
    """What one launch was.

    Attributes:
        kernel: its name.
        groups: threadgroups that ran, of how many.
        accesses: how often memory was read or written, private arrays included.
        written: for each output, which of its bytes were written: bool, shaped as the output with its bytes as a
            further axis.
        traffic: name of each input and output -> (bytes loaded, loaded once for each threadgroup, stored).
    """

    kernel: str
    groups: tuple[int, int]
    accesses: int
    written: list[np.ndarray]
    traffic: dict[str, tuple[int, int, int]]


@dataclass
class Emulator:
    """A backend of `gemma_mlx.ops.dispatch`.

    Attributes:
        schedule: which of the threads that may go on does: "fifo", the first; "lifo", the last; "random". Threadgroups
            run in that order too.
        seed: of "random" and of the sample.
        sample: how many threadgroups of a launch run at most; None: all. The first and the last are among them, outputs
            of others are NaN, or −1.
        checks: whether the kernel is checked; without, it runs several times as fast.
        optimise: False runs each statement as it is written, at a third of the speed: otherwise a private value that
            is never set may be optimised away before it is seen. None: True where a sample runs.
        seconds: of processor time that a launch may take.
        records: of the launches, in order.
    """

    schedule: str = "fifo"
    seed: int = 0
    sample: int | None = None
    checks: bool = True
    optimise: bool | None = None
    seconds: int = 300
    records: list[Record] = field(default_factory=list)
    name: str = "emulator"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: one of {', '.join(SCHEDULES)}")

    def groups(self, launch: Launch) -> np.ndarray:
        """Which threadgroups run, in order."""
        count = _count(launch)
        picked, chance = range(count), random.Random(self.seed)
        if self.sample is not None and self.sample < count:
            picked = sorted([0, count - 1, *chance.sample(range(1, count - 1), max(self.sample - 2, 0))])[: self.sample]
        picked = list(picked)
        if self.schedule == "lifo":
            picked.reverse()
        elif self.schedule == "random":
            chance.shuffle(picked)
        return np.array(picked, dtype=np.uint64)

    def run(self, launch: Launch) -> list[mx.array]:
        """The launch's outputs.

        Raises:
            Fault: the kernel did something that it must not.
        """
        threads = int(np.prod(launch.threadgroup))
        if not 0 < threads <= MOST_THREADS:
            message = f"{threads} threads in a group; there are 1 to {MOST_THREADS}"
            raise Fault("threads", f"{launch.kernel.name}.metal", 0, message)
        check_spelling(launch)
        made = source(launch)
        optimise = self.sample is not None if self.optimise is None else self.optimise
        path = kernel_library(
            translation_unit(launch, made), launch.kernel.name, self.checks, optimise or not self.checks
        )
        library = _runtime(runtime_library())
        _, entry, low, high = _kernel(path)
        buffers, outputs, written, kept = _buffers(launch, made)
        groups = self.groups(launch)
        array = (_Buffer * len(buffers))(*buffers)
        setup = _Setup(
            entry, low, high, ctypes.cast(array, _POINTER), len(buffers), SCHEDULES.index(self.schedule), self.seed + 1,
            (ctypes.c_uint32 * 3)(*_threadgroup(launch)), (ctypes.c_uint32 * 3)(*launch.grid), groups.ctypes.data,
            len(groups), self.seconds,
        )  # fmt: skip
        fault, accesses = _Fault(), ctypes.c_uint64()
        code = library.emulated_run(ctypes.byref(setup), ctypes.byref(fault), ctypes.byref(accesses))
        del kept
        if code == 1:
            raise _as_fault(fault, path, launch.kernel.name)
        if code:
            raise MemoryError(f"{launch.kernel.name}: the emulator has no address space for the buffers ({code})")
        traffic = {b.name.decode(): (b.loaded, b.distinct, b.stored) for b in array}
        ran = (len(groups), _count(launch))
        self.records.append(Record(launch.kernel.name, ran, accesses.value, written, traffic))
        return [_to_mlx(a, d) for a, d in zip(outputs, launch.dtypes, strict=True)]


def _threadgroup(launch: Launch) -> list[int]:
    """MLX makes no threadgroup larger than the grid."""
    return [min(t, g) for t, g in zip(launch.threadgroup, launch.grid, strict=True)]


def _count(launch: Launch) -> int:
    """Threadgroups of the launch; the last in a dimension may be smaller."""
    return math.prod(-(-g // t) for g, t in zip(launch.grid, _threadgroup(launch), strict=True))


def _as_fault(fault: _Fault, path: Path, kernel: str) -> Fault:
    message = fault.message.decode()
    file, line = fault.file.decode(), fault.line
    if fault.place:
        file, line = line_of(path, fault.place)
    if fault.other:
        message += " (the other at {}:{})".format(*line_of(path, fault.other))
    return Fault(fault.kind.decode(), Path(file).name or f"{kernel}.metal", line, message)


def _extent(array: np.ndarray) -> np.ndarray:
    """All that lies between its first element and its last, as a flat array: what the buffer of a strided one holds."""
    length = 1 + sum((n - 1) * s // array.itemsize for n, s in zip(array.shape, array.strides, strict=True))
    return np.lib.stride_tricks.as_strided(array, (length if array.size else 0,), (array.itemsize,))


def _bits(array: mx.array, strided: bool = False) -> np.ndarray:
    """Its bytes, in its shape; unless `strided`, with row-contiguous elements."""
    array = array if strided else mx.contiguous(array)
    mx.eval(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    elif array.dtype == mx.bool_:
        array = array.view(mx.uint8)
    return np.array(array, copy=False) if strided else np.ascontiguousarray(np.array(array))


_NUMPY = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32, mx.bool_: np.uint8}


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    made = mx.array(array)
    return made if made.dtype == dtype else made.view(dtype)


def _numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    return np.dtype(_NUMPY.get(dtype) or str(dtype).rsplit(".", 1)[-1])


def _buffers(launch: Launch, made: Source) -> tuple[list[_Buffer], list[np.ndarray], list[np.ndarray], list]:
    """(the buffers by index, outputs, which of their bytes were written, what must stay alive)."""
    kept: list = []
    strided = getattr(launch.kernel, "strided", False)
    given = {name: _bits(a, strided) for name, a in zip(launch.kernel.inputs, launch.inputs, strict=True)}
    held = {name: _extent(array) for name, array in given.items()}
    for name, array in given.items():
        shape = np.array(array.shape, dtype=np.int32)
        strides = np.array([s // array.itemsize for s in array.strides], dtype=np.int64)
        held |= {f"{name}_shape": shape, f"{name}_strides": strides, f"{name}_ndim": np.array([array.ndim], np.int32)}
    outputs, written, buffers = [], [], {}
    for name, shape, dtype in zip(launch.kernel.outputs, launch.shapes, launch.dtypes, strict=True):
        out = np.empty(shape, _numpy_dtype(dtype))
        mask = np.zeros((*shape, out.itemsize), bool)
        initial = None
        if launch.init is not None:
            initial = _bits(mx.full(shape, launch.init, dtype))
        kept.append(initial)
        outputs.append(out)
        written.append(mask)
        granule = out.itemsize if out.itemsize in (1, 2, 4) else 4
        buffers[name] = _Buffer(
            name.encode(), None if initial is None else initial.ctypes.data, out.ctypes.data, mask.ctypes.data,
            out.nbytes, granule,
        )  # fmt: skip
    for name, array in held.items():
        buffers[name] = _Buffer(name.encode(), array.ctypes.data, None, None, array.nbytes, 4)
    kept.append(held)
    by_index = sorted((p for p in made.parameters if p.buffer is not None), key=lambda p: p.buffer)
    return [buffers[p.name] for p in by_index], outputs, written, kept
