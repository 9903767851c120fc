"""How a worker of ``step.py`` answers: a line of JSON for every line it reads, a training step each.

Standard library and NumPy alone, so that it runs in every peer's own environment.
"""

import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RANK, ALPHA, LR = 16, 16.0, 1e-4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fast_blas() -> None:
    """Give MLX on a Linux CPU the same BLAS in every environment. Before ``mlx.core``."""
    if "BENCHMARK_BLAS" in os.environ:
        runpy.run_path(os.environ["BENCHMARK_BLAS"])


def arguments() -> tuple[str, dict[str, np.ndarray], str]:
    """(checkpoint folder, the batch's arrays, dtype) from the command line."""
    folder, batch, dtype = sys.argv[1:4]
    with np.load(batch) as arrays:
        return folder, dict(arrays), dtype


def serve(name: str, step: Callable[[], float], peak: Callable[[], int] | None = None, **facts: Any) -> None:
    """Say what runs here, then take a step and report it for every line that comes.

    Args:
        step: one whole training step, evaluated; returns its loss.
        peak: the allocator's peak in bytes; without one the process's own.
        facts: of the worker, for the report.
    """
    answer = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    _say(answer, {"name": name, **facts})
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        held = _resident() if peak is None else peak()
        _say(answer, {"seconds": seconds, "loss": loss, "peak": held, "resident": _resident()})


def _say(out: Any, record: dict[str, Any]) -> None:
    out.write(json.dumps(record) + "\n")
    out.flush()


def _resident() -> int:
    """The most memory that the process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
