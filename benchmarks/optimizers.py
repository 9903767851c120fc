"""Bytes and seconds of each optimizer, with float32 masters and without, on the matrices of decoder layers of E2B.

    python benchmarks/optimizers.py [--layers 1] [--repeats 5]

Prints a Markdown table (docs/optimizers.md has its bytes). Bytes for a weight are counted from the arrays that lie
there between two steps (the module's bfloat16 weight, its master, the optimizer's state), and the gradient's while one
is under way; the peak is what clipping and update take above all of these, as MLX counts it.
"""

import argparse
import platform
import statistics
import time

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
from gemma_mlx.optim import clip_by_norm
from gemma_mlx.optimizers import OPTIMIZERS, rounding_key, update

LAYER = {"q_proj": (2048, 1536), "o_proj": (1536, 2048), "k_proj": (256, 1536), "v_proj": (256, 1536)}
LAYER |= {"gate_proj": (6144, 1536), "up_proj": (6144, 1536), "down_proj": (1536, 6144), "norm": (1536,)}
"""A layer of 40 million weights."""


def size(tree: dict) -> int:
    """Bytes of all arrays of a tree."""
    return sum(size(a) if isinstance(a, dict) else a.nbytes for a in tree.values())


def measure(name: str, masters: bool, layers: int, repeats: int) -> str:
    """A line of the table."""
    optimizer, dtype = OPTIMIZERS[name], mx.float32 if masters else mx.bfloat16
    shapes = {f"{layer}.{k}": s for layer in range(layers) for k, s in LAYER.items()}
    base = {k: mx.random.normal(s).astype(mx.bfloat16) for k, s in shapes.items()}
    weights = {k: w.astype(dtype) for k, w in base.items()}
    grads = {k: mx.random.normal(w.shape).astype(dtype) for k, w in weights.items()}
    state, seconds, peaks = optimizer.init(weights), [], []
    mx.eval(base, weights, grads, state)
    count = sum(w.size for w in weights.values())
    held = size(base) + masters * size(weights) + size(state)
    for step in range(repeats + 1):  # the first warms up
        scalars, key = optimizer.scalars(step + 1, 1e-5, 0.0), rounding_key(0, step)
        mx.clear_cache()
        mx.reset_peak_memory()
        before, began = mx.get_active_memory(), time.perf_counter()
        clipped, norm = clip_by_norm(grads, 1.0, mx.array(0.5))
        weights, state = update(optimizer, weights, state, clipped, scalars, key)
        del clipped
        mx.eval(weights, state, norm)
        seconds.append(time.perf_counter() - began)
        peaks.append(mx.get_peak_memory() - before)
    return (
        f"| {name} | {'float32' if masters else 'none'} | {(size(weights) if masters else 0) / count:.2f} | "
        f"{size(state) / count:.3f} | {held / count:.3f} | {size(grads) / count:.2f} | {max(peaks[1:]) / count:.1f} | "
        f"{statistics.median(seconds[1:]) / count * 1e9:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    mx.random.seed(0)
    print(
        f"{platform.machine()}, {mx.default_device()}, MLX {mx.__version__}, seed 0; {options.layers} layers of "
        f"{sum(mx.zeros(s).size for s in LAYER.values()):,} weights; medians of {options.repeats} updates\n"
    )
    heads = ("optimizer", "masters", "master", "state", "held with the weight", "gradient", "peak of an update", "ns")
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name in OPTIMIZERS:
        for masters in (True, False):
            print(measure(name, masters, options.layers, options.repeats), flush=True)


if __name__ == "__main__":
    main()
