"""Fitting MLX to the machine, and keeping a Mac awake."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemma_mlx import blas  # before mlx.core

import mlx.core as mx  # isort: skip

from gemma_mlx.lanes import PART_TOKENS  # isort: skip

MOST_LANES = 4
CACHE_SHARE = 0.25
"""Part of the working set that freed buffers may occupy before MLX gives them back."""


def set_limits() -> dict[str, int]:
    """Wire memory up to what Metal recommends and bound MLX's cache of freed buffers; returns the limits in bytes.

    On a GPU only: a CPU device reports no memory size, and its allocator needs no limit.
    """
    if mx.default_device().type != mx.gpu:
        return {}
    info = mx.device_info()
    working_set = int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    if not working_set:
        return {}
    limits = {"cache": int(working_set * CACHE_SHARE)}
    mx.set_cache_limit(limits["cache"])
    if mx.metal.is_available():
        limits["wired"] = working_set
        mx.set_wired_limit(working_set)
    return limits


@dataclass(frozen=True)
class Room:
    """Memory that arrays may take: bytes in all, of a single buffer (None: no limit), and whose it is."""

    bytes: int
    buffer: int | None
    where: str

    def describe(self) -> str:
        """In words."""
        return f"the {self.bytes / 1e9:.2f} GB {self.where}"


def room(gigabytes: float | None = None) -> Room:
    """What this machine has for a run: on a GPU the working set that it recommends, on a CPU what is available now.

    ``gigabytes``: as if it had so many (10⁹ bytes).
    """
    if gigabytes is not None:
        return Room(int(gigabytes * 1e9), None, "of --memory-gb")
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    if mx.default_device().type == mx.gpu and size:
        return Room(int(size), info.get("max_buffer_length"), "that the GPU may use")
    import psutil

    memory = psutil.virtual_memory()
    where = f"that are free (of {memory.total / 1e9:.1f} GB)"
    return Room(memory.available, info.get("max_buffer_length"), where)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lanes(rows: int, length: float = 0) -> int:
    """Threads to share a batch of ``rows`` out to: 1 on a GPU; on a CPU up to one a core.

    Each gets at least 4 rows, or one where rows of ``length`` tokens are long enough to be parts of their own.

    OpenBLAS then gets the cores that are left to each thread: its own idle threads spin, and more of them than cores
    make a step several times slower.
    """
    if mx.default_device().type == mx.gpu:
        return 1
    chosen = max(1, min(MOST_LANES, cores(), rows, max(rows // 4, int(rows * length) // PART_TOKENS)))
    if blas.loaded and "OPENBLAS_NUM_THREADS" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(blas.loaded).openblas_set_num_threads(max(1, cores() // chosen))
    return chosen


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from idle sleep for the length of the block; elsewhere nothing.

    ``caffeinate`` watches this process, so it ends even if the process is killed.
    """
    if sys.platform != "darwin" or not (tool := shutil.which("caffeinate")):
        yield
        return
    process = subprocess.Popen([tool, "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def describe() -> str:
    """The device in a few words, for reports."""
    info = mx.device_info()
    name = info.get("device_name") or info.get("architecture") or "unknown"
    return f"{mx.default_device().type.name}: {name}, MLX {mx.__version__}"
