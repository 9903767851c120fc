"""How often a run of ragged rows compiles, and what that costs.

    python benchmarks/compilations.py

300 batches of 4 rows of 20 to 2,000 tokens, with clips and pictures, through the demo's model: with the compiler's
cache empty (MLX calls g++ on a CPU and keeps the libraries in the folder of temporary files), with it filled, and
uncompiled.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import ragged

import mlx.core as mx  # isort: skip

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.buckets import choose_buckets
from gemma_mlx.data.order import Shuffled
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.step import Step

BATCH = 4


def measure(compiled: bool, steps: int) -> dict:
    """Seconds of the first step and of steps that compiled nothing, and what was compiled, of one run."""
    model, weights = ragged.model()
    samples = ragged.rows(model.spec)
    plan = Shuffled(len(samples), BATCH)
    step = Step(model, clip=1.0, compiled=compiled)
    if compiled:
        step.buckets = choose_buckets(ragged.sizes(samples), plan, BATCH, partial(step.work, BATCH))
    batches, moments, seconds, compiling = Batches(samples, BATCH, plan=plan), adamw_init(weights), [], []
    tokens = positions = 0
    for i in range(steps):
        batch, before, began = next(batches), step.compilations, time.perf_counter()
        grads, sums = step.gradients(weights, batch, mx.random.key(0))
        weights, moments, norm = step.apply(weights, moments, grads, sums.labels, adamw_scalars(i + 1, 1e-4, 0.0))
        mx.eval(weights, moments, norm, sums.loss)
        step.install(weights)
        (seconds if step.compilations == before else compiling).append(time.perf_counter() - began)
        tokens, positions = tokens + sums.tokens, positions + sums.positions
    batches.close()
    return {
        "first": (compiling or seconds)[0], "compiling": sum(compiling), "steady": statistics.median(seconds),
        "traces": step.traces, "padding": 1 - tokens / positions, "buckets": len(step.buckets.sizes) if compiled else 0,
    }  # fmt: skip


def in_child(folder: str, mode: str, steps: int) -> dict:
    """``measure`` in a process whose compiler cache lies in ``folder``."""
    command = [sys.executable, __file__, "--child", mode, "--steps", str(steps)]
    environment = {**os.environ, "TMPDIR": folder}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--child", choices=("compiled", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child == "compiled", options.steps)))
        return
    print(
        f"{platform.machine()}, {mx.default_device()}, MLX {mx.__version__}, batches of {BATCH} rows, "
        "seed 0\n\n| | steps | first step s | steps that compile s | other steps, median s | compilations | padding |\n"
        + "| --- " * 7 + "|"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        few = min(options.steps, 40)
        runs = {"cache empty": options.steps, "cache filled": few, "uncompiled": few}
        for name, steps in runs.items():
            mode = "plain" if name == "uncompiled" else "compiled"
            found = in_child(folder, mode, steps)
            traces = ", ".join(f"{n} {k}" for k, n in found["traces"].items())
            print(
                f"| {name} | {steps} | {found['first']:.1f} | {found['compiling']:.1f} | {found['steady']:.3f} | "
                f"{traces} | {found['padding']:.0%} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
