"""What label positions and gradient checkpointing save in one training step, each on and off, in alternated pairs.

    python benchmarks/savings.py [--pairs 5] [--answer 48] [--clips 30,22,14,10] [--compiled]
        [--only "label positions,both (every layer)"]

Prints a Markdown table: counted FLOPs of the decoder, seconds (median), peak memory above what lies there before the
step, and how far loss and gradients are from those with everything off. Audio towers are frozen and their soft tokens
cached, so that a step is the decoder, the head and their gradients.
"""

import argparse
import platform
import statistics
import time

import numpy as np

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
import eighth

from gemma_mlx.flops import Picked
from gemma_mlx.lora import lora_parameters
from gemma_mlx.step import Step

SETTINGS = {
    "all off": {"pick_labels": False},
    "label positions": {},
    "checkpoint every layer": {"pick_labels": False, "recompute": 1},
    "checkpoint every 2nd layer": {"pick_labels": False, "recompute": 2},
    "both (every layer)": {"recompute": 1},
    "both (every 2nd layer)": {"recompute": 2},
}
OFF = "all off"


def timed(step: Step, weights: dict, batch) -> tuple[float, float, dict, float]:
    """(seconds, peak bytes above the start, gradients, loss) of one step's gradients."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, began = mx.get_active_memory(), time.perf_counter()
    grads, sums = step.gradients(weights, batch, mx.random.key(0))
    mx.eval(grads, sums.loss, sums.correct)
    return time.perf_counter() - began, mx.get_peak_memory() - before, grads, sums.loss.item()


def flops(step: Step, batch, options: dict) -> float:
    """Counted FLOPs of the decoder's forward and gradient."""
    arrays, (rows, length) = step.prepare(batch).arrays, batch.input_ids.shape
    picked = Picked(arrays["positions"].size, arrays["columns"].size) if "columns" in arrays else None
    return step.cost.step(rows, length, picked, options.get("recompute", 0))


def furthest(grads: dict, wanted: dict) -> float:
    """Largest ‖a − b‖ / ‖b‖ over the tensors."""
    pairs = ((np.array(grads[k], np.float64), np.array(wanted[k], np.float64)) for k in wanted)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def compare(name: str, steps: dict, weights: dict, batch, pairs: int) -> str:
    """A line of the table: a setting against everything off, in `pairs` alternated pairs."""
    seconds, peaks = {name: [], OFF: []}, {}
    for _ in range(pairs + 1):  # the first pair warms up
        found = {}
        for which in (OFF, name):
            took, peaks[which], *found[which] = timed(steps[which], weights, batch)
            seconds[which].append(took)
    mine, theirs = (statistics.median(seconds[which][1:]) for which in (name, OFF))
    (grads, loss), (wanted, plain) = found[name], found[OFF]
    counted = [flops(steps[which], batch, SETTINGS[which]) for which in (name, OFF)]
    return (
        f"| {name} | {counted[0] / 1e9:.0f} | {counted[0] / counted[1]:.2f} | {mine:.2f} | {mine / theirs:.2f} | "
        f"{peaks[name] / 1e6:.0f} | {peaks[name] / peaks[OFF]:.2f} | {abs(loss - plain) / plain:.1e} | "
        f"{furthest(grads, wanted):.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--answer", type=int, default=48, help="labels of a row")
    parser.add_argument("--clips", default="30,22,14,10", help="seconds of each row's clip")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings, comma separated")
    options = parser.parse_args()
    chosen = options.only.split(",")
    batch = eighth.clips([int(s) for s in options.clips.split(",")], answer=options.answer)
    model = eighth.model()
    weights = lora_parameters(model)
    steps = {name: Step(model, compiled=options.compiled, **SETTINGS[name]) for name in (OFF, *chosen)}
    first = steps[OFF]
    for step in steps.values():
        step.frozen = first.frozen  # one cache of soft tokens
    rows, length = batch.input_ids.shape
    print(
        f"{platform.machine()}, {mx.default_device()}, MLX {mx.__version__}, float32, seed 0; {rows} rows of up to "
        f"{length} tokens, {batch.label_count} labels; medians of {options.pairs} pairs\n"
    )
    heads = ("", "decoder GFLOP", "of off", "s", "of off", "peak MB", "of off", "loss differs by", "gradients by")
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name in chosen:
        print(compare(name, steps, weights, batch, options.pairs), flush=True)


if __name__ == "__main__":
    main()
