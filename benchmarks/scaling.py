"""How a training step's time, memory and counted FLOPs grow with each size of its batch and model.

    python benchmarks/scaling.py [--rounds 5] [--out FOLDER]

Gemma 4 E2B's pattern at an eighth of its width, ten layers, float32, words alone. One size is doubled at a time: tokens
of a row, rows, part of the tokens with labels, vocabulary. Growth is log2 of the ratio to the size before: 1 is
proportional, 2 the square, which attention over whole rows costs. Written to the folder: scaling.md and scaling.png.
"""

import argparse
import dataclasses
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
import eighth

from gemma_mlx import machine
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.flops import Picked
from gemma_mlx.lora import lora_parameters
from gemma_mlx.models.families import build
from gemma_mlx.spec import read_spec
from gemma_mlx.step import Step, should_compile

LAYERS, VOCABULARY = 10, 32_768
SIZES = {
    "tokens of a row": [dict(length=n) for n in (256, 512, 1024, 2048, 4096)],
    "rows": [dict(rows=n) for n in (1, 2, 4, 8, 16)],
    "part with labels": [dict(part=1 / n) for n in (32, 16, 8, 4, 2, 1)],
    "vocabulary": [dict(vocabulary=n) for n in (32_768, 65_536, 131_072, 262_144)],
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one measurement is made with."""

    length: int = 1024
    rows: int = 1
    part: float = 1 / 16
    vocabulary: int = VOCABULARY

    def batch(self) -> Batch:
        """Rows of random words, labels on the last of them."""
        r = np.random.default_rng(0)
        ids = r.integers(*eighth.TEXT_IDS, (self.rows, self.length)).astype(np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        count = max(1, round(self.part * self.length))
        labels[:, -count:] = ids[:, -count:]
        return Batch(ids, np.ones_like(ids), np.zeros_like(ids), labels, row_ids=("",) * self.rows)

    def model(self):
        """E2B's pattern in ten layers, five of which share keys and values."""
        config = eighth.config()
        text = config["text_config"]
        text |= {"num_hidden_layers": LAYERS, "num_kv_shared_layers": LAYERS // 2, "vocab_size": self.vocabulary}
        text["layer_types"] = (["sliding_attention"] * 4 + ["full_attention"]) * (LAYERS // 5)
        made = build(read_spec({**config, "audio_config": None}))
        made.freeze()
        mx.eval(eighth.adapted(made).parameters())
        return made


def measure(shape: Shape, rounds: int) -> tuple[float, int, int]:
    """(median seconds, peak bytes above what lay there, counted FLOPs) of the gradients of a step."""
    model, batch = shape.model(), shape.batch()
    weights = lora_parameters(model)
    step = Step(model, lanes=1 if should_compile() else machine.lanes(shape.rows, shape.length))
    seconds, peaks = [], []
    for _ in range(rounds + 1):  # the first warms up
        mx.clear_cache()
        mx.reset_peak_memory()
        before, began = mx.get_active_memory(), time.perf_counter()
        grads, sums = step.gradients(weights, batch, mx.random.key(0))
        mx.eval(grads, sums.loss)
        seconds.append(time.perf_counter() - began)
        peaks.append(mx.get_peak_memory() - before)
        del grads, sums
    return statistics.median(seconds[1:]), max(peaks[1:]), sum(flops(step, part) for part in step.lay_out(batch))


def flops(step: Step, part) -> int:
    """Decoder, head and their gradients."""
    places, text = part.arrays["positions"], step.model.spec.text
    picked = Picked(len(places), part.arrays["columns"].size) if "columns" in part.arrays else None
    return step.cost.step(*part.arrays["input_ids"].shape, picked) + 4 * text.hidden_size * text.vocab_size * len(
        places
    )


def growth(now: float, before: float | None) -> str:
    """log2 of the ratio of two measurements; nothing for the first."""
    return "" if before is None else f"{math.log2(now / before):.2f}"


def shown(size: float) -> str:
    """A size in a table."""
    return f"1/{round(1 / size)}" if size < 1 else f"{size:,.0f}"


def plot(found: dict[str, list], path: Path) -> None:
    """Seconds and memory against each size, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 6), layout="constrained")
    axes = figure.subplots(2, len(found), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(found.items()):
        sizes = [size for size, *_ in points]
        for line, (at, unit) in enumerate(((1, "seconds"), (2, "peak, MB"))):
            ax = axes[line][column]
            values = [point[at] / (1e6 if at == 2 else 1) for point in points]
            ax.loglog(sizes, values, "o-", base=2)
            ax.loglog(sizes, [values[0] * s / sizes[0] for s in sizes], ":", color="gray", label="proportional")
            ax.set_xlabel(name)
            ax.set_xticks(sizes, map(shown, sizes), rotation=30)
            ax.minorticks_off()
            ax.set_ylabel(unit if column == 0 else "")
            ax.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SIZES), help="sizes, comma separated")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    options = parser.parse_args()
    lines = [
        f"{platform.machine()}, {machine.describe()}, float32, seed 0; medians of {options.rounds} steps. Where "
        f"nothing else is said: 1 row of {Shape.length} tokens, {Shape.part:.0%} of them with labels, "
        f"{Shape.vocabulary:,} ids.",
        "", "| | | seconds | growth | peak MB | growth | GFLOP | growth |", "| --- " * 8 + "|",
    ]  # fmt: skip
    found: dict[str, list] = {}
    for name in options.only.split(","):
        before = (None, None, None)
        for change in SIZES[name]:
            now = measure(Shape(**change), options.rounds)
            (size,) = change.values()
            found.setdefault(name, []).append((size, *now))
            cells = [f"{now[0]:.3f}", f"{now[1] / 1e6:.0f}", f"{now[2] / 1e9:.1f}"]
            grown = [growth(a, b) for a, b in zip(now, before, strict=True)]
            lines.append(
                f"| {name} | {size:,.4g} | " + " | ".join(map(" | ".join, zip(cells, grown, strict=True))) + " |"
            )
            print(lines[-1], flush=True)
            before = now
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.md").write_text("\n".join(lines) + "\n")
    plot(found, options.out / "scaling.png")


if __name__ == "__main__":
    main()
