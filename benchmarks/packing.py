"""What grouping by length and packing save on ragged text rows: an epoch's tokens a second, and its padding.

    python benchmarks/packing.py [--rows 96] [--pairs 5] [--batch 8] [--pack-tokens 512] [--lanes 1]

Rows of log-normal length, loss on their last third. Shuffled, grouped and packed batches in turn, `--pairs` times after
one to warm up; prints a Markdown table of medians. A packed batch has so many rows that it holds about as many tokens
as a shuffled one. Time is that of gradients: no optimizer, no reading ahead.
"""

import argparse
import platform
import statistics
import time

import numpy as np

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
import eighth

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.order import Grouped, Shuffled
from gemma_mlx.data.packing import Packed
from gemma_mlx.data.template import Sample
from gemma_mlx.flops import Picked
from gemma_mlx.lora import lora_parameters
from gemma_mlx.step import Step

PAD_MULTIPLE = 8


def text_rows(count: int, seed: int = 0) -> list[Sample]:
    """Rows of 8 to 512 tokens, 74 in the median, 102 in the mean."""
    r = np.random.default_rng(seed)
    rows = []
    for n in np.clip(r.lognormal(4.3, 0.8, count).astype(int), 8, 512):
        ids = r.integers(*eighth.TEXT_IDS, n).astype(np.int32)
        labels = np.where(np.arange(n) < n * 2 // 3, IGNORE_INDEX, ids).astype(np.int32)
        rows.append(Sample(ids, labels, np.zeros_like(ids)))
    return rows


def epoch(step: Step, weights: dict, batches: list) -> tuple[float, float]:
    """(seconds of all gradients, loss sum)."""
    mx.clear_cache()
    began, loss = time.perf_counter(), 0.0
    for batch in batches:
        grads, sums = step.gradients(weights, batch, mx.random.key(0))
        mx.eval(grads, sums.loss)
        loss += sums.loss.item()
    return time.perf_counter() - began, loss


def flops(step: Step, batches: list) -> int:
    """Counted FLOPs of the decoder's forward and gradient over all batches."""
    total = 0
    for batch in batches:
        arrays = step.prepare(batch).arrays
        picked = Picked(arrays["positions"].size, arrays["columns"].size) if "columns" in arrays else None
        total += step.cost.step(*batch.input_ids.shape, picked)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="rows in a shuffled or grouped batch")
    parser.add_argument("--pack-tokens", type=int, default=512)
    parser.add_argument("--lanes", type=int, default=1)
    options = parser.parse_args()
    rows = text_rows(options.rows)
    lengths = [len(row) for row in rows]
    tokens = sum(lengths)
    across = max(1, round(options.batch * tokens / len(rows) / options.pack_tokens))
    plans = {
        "shuffled": Shuffled(len(rows), options.batch),
        "grouped by length": Grouped(lengths, options.batch),
        f"packed, {across} × {options.pack_tokens}": Packed(lengths, across, options.pack_tokens),
    }
    made = {}
    for name, plan in plans.items():
        with Batches(rows, options.batch, epochs=1, pad_to_multiple=PAD_MULTIPLE, plan=plan) as batches:
            made[name] = list(batches)
    model = eighth.model()
    weights, step = lora_parameters(model), Step(model, compiled=False, lanes=options.lanes)
    seconds, losses = {name: [] for name in plans}, {}
    for _ in range(options.pairs + 1):
        for name, batches in made.items():
            took, losses[name] = epoch(step, weights, batches)
            seconds[name].append(took)
    print(
        f"{platform.machine()}, {mx.default_device()}, MLX {mx.__version__}, float32, seed 0, {options.lanes} lane(s); "
        f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, {tokens / len(rows):.0f} in the mean; medians "
        f"of {options.pairs}\n"
    )
    heads = (
        "batches",
        "of them",
        "padding",
        "decoder GFLOP",
        "of shuffled",
        "tokens/s",
        "× shuffled",
        "loss differs by",
    )
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    plain = next(iter(plans))
    for name, batches in made.items():
        positions = sum(batch.input_ids.size for batch in batches)
        counted = [flops(step, made[which]) for which in (name, plain)]
        times = [statistics.median(seconds[which][1:]) for which in (name, plain)]
        print(
            f"| {name} | {len(batches)} | {1 - tokens / positions:.1%} | {counted[0] / 1e9:.0f} | "
            f"{counted[0] / counted[1]:.2f} | {tokens / times[0]:.0f} | {times[1] / times[0]:.2f} | "
            f"{abs(losses[name] / losses[plain] - 1):.0e} |"
        )


if __name__ == "__main__":
    main()
