"""No barrier of a kernel is idle: without any one of them that runs, the emulator complains of it."""

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import SCHEDULES, Emulator, Fault
from metal.inline import Inline
from ops.harness import emulated

from gemma_mlx.ops.registry import ops

BARRIER = re.compile(r"(?:threadgroup|simdgroup)_barrier\([^;]*;")


class Recorder(Emulator):
    def run(self, launch):
        launches.setdefault(launch.kernel.name, launch)
        return super().run(launch)


launches: dict = {}


def variants(launch, instead):
    """(where, the launch with that barrier replaced) for each barrier in its texts."""
    kernel = launch.kernel
    texts = {"text": kernel.body, "header_text": kernel.header}
    for part, text in texts.items():
        for found in BARRIER.finditer(text):
            changed = texts | {part: text[: found.start()] + instead + text[found.end() :]}
            inline = Inline(kernel.name, kernel.inputs, kernel.outputs, atomic=kernel.atomic, **changed)
            yield f"{kernel.name} {part}:{text.count(chr(10), 0, found.start()) + 1}", replace(launch, kernel=inline)


def complains(launch, kinds=None):
    for schedule in SCHEDULES:
        try:
            Emulator(schedule, optimise=True).run(launch)
        except Fault as fault:
            assert kinds is None or fault.kind in kinds, fault
            return True
    return False


LONG = ("banded_attention", "flash_matrix", "flash_attention")
"""Many barriers in long kernels: a minute of emulation."""


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] * (op.name in LONG), id=op.name) for op in ops()]
)
def test_every_barrier_is_needed(op):
    launches.clear()
    arguments = op.sizes["small"](np.random.default_rng(0), mx.float32)
    emulated(op.function, arguments, op.wrt, Recorder(optimise=True))
    for launch in list(launches.values()):
        # one that runs, in a helper function that this kernel calls, is told by a division in its place
        runs = dict(variants(launch, "{ volatile int none = 0; none = 1 / none; }"))
        for where, without in variants(launch, ""):
            if not complains(runs[where], ("division-by-zero",)):
                assert "header_text" in where, f"{where} is not reached at the op's small size"
                continue
            told = complains(without, ("race", "race-across-threadgroups", "uninitialised"))
            assert told, f"{where} is idle"
