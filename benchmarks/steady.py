"""Whether memory stays flat over a long run of ragged rows.

    python benchmarks/steady.py

1,000 steps of 4 rows of 20 to 500 tokens, with clips and pictures, through the demo's model. Soft tokens of all media
are kept before the first step, so that no cache fills up on the way.
"""

import argparse
import os
import platform
import time

import ragged

import mlx.core as mx  # isort: skip

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.order import Shuffled
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.step import Step

BATCH, WINDOW = 4, 50


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--longest", type=int, default=500)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    model, weights = ragged.model()
    samples = ragged.rows(model.spec, options.rows, options.longest)
    step, moments = Step(model, clip=1.0, compiled=options.compiled), adamw_init(weights)
    with Batches(samples, BATCH, epochs=1, shuffle=False) as once:
        for batch in once:
            step.prepare(batch)
    batches = Batches(samples, BATCH, plan=Shuffled(len(samples), BATCH), finish=step.lay_out)
    print(
        f"{platform.machine()}, {mx.default_device()}, MLX {mx.__version__}, {options.steps} steps, "
        f"{'compiled' if options.compiled else 'uncompiled'}\n\n"
        "| steps | active MB, least | active MB, most | peak MB | resident MB | s a step |\n" + "| --- " * 6 + "|"
    )
    active, began = [], time.perf_counter()
    mx.reset_peak_memory()
    for i in range(options.steps):
        grads, sums = step.gradients(weights, next(batches), mx.random.key(0))
        weights, moments, norm = step.apply(weights, moments, grads, sums.labels, adamw_scalars(i + 1, 1e-4, 0.0))
        mx.eval(weights, moments, norm, sums.loss)
        step.install(weights)
        del grads, sums, norm
        active.append(mx.get_active_memory())
        if (i + 1) % WINDOW == 0:
            last, seconds = active[-WINDOW:], (time.perf_counter() - began) / WINDOW
            print(
                f"| {i + 2 - WINDOW}–{i + 1} | {min(last) / 1e6:.3f} | {max(last) / 1e6:.3f} | "
                f"{mx.get_peak_memory() / 1e6:.1f} | {resident() / 1e6:.0f} | {seconds:.3f} |", flush=True,
            )  # fmt: skip
            mx.reset_peak_memory()
            began = time.perf_counter()
    batches.close()
    later = active[WINDOW - 1 :]
    print(f"\nactive memory from step {WINDOW} on: {max(later) / later[0] - 1:+.2%}, {min(later) / later[0] - 1:+.2%}")


if __name__ == "__main__":
    main()
