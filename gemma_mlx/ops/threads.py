"""How values and rows are shared out to threads."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

Triple = tuple[int, int, int]

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
"""What kernels read and write; they compute in float32."""

MOST = 1024
"""Threads of a group, at most."""

STREAM = {"THREADS": 256, "VALUES": 4}
"""Template of a kernel that goes through values one by one."""


def one_dtype(*arrays: mx.array) -> bool:
    """Whether they hold something, all in the same dtype, one of ``FLOATS``."""
    first = arrays[0].dtype
    return first in FLOATS and all(a.dtype == first and a.size > 0 for a in arrays)


def stream(count: int) -> tuple[Triple, Triple]:
    """(grid, threadgroup) of a launch over `count` values with the template ``STREAM``."""
    threads = STREAM["THREADS"]
    return (-(-count // (threads * STREAM["VALUES"])) * threads, 1, 1), (threads, 1, 1)


def row_template(width: int, least: int = 4) -> dict[str, int]:
    """THREADS of a row of `width` values, whole SIMD groups, and the VALUES of each: `least` if that many do."""
    threads = min(MOST, 32 * -(-width // (32 * least)))
    return {"THREADS": threads, "VALUES": -(-width // threads)}


def row_groups(rows: int, threads: int) -> tuple[Triple, Triple]:
    """(grid, threadgroup) of a group of threads for each row."""
    return (rows * threads, 1, 1), (threads, 1, 1)


def random_arrays(random, dtype: mx.Dtype, shapes: Sequence[tuple[int, ...]], size: float = 1.0) -> list[mx.array]:
    """Normal values of NumPy's generator `random`, for tries of an op."""
    return [mx.array(size * random.standard_normal(shape)).astype(dtype) for shape in shapes]
