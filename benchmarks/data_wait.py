"""How long a step waits for its batch, at ten times the demo's speed.

    python benchmarks/data_wait.py

The demo's rows, processor and batch of 16 go through the same preparation and readers as in a run; a sleep stands in
for the step. The first epoch decodes every clip and picture, later ones find them in memory.
"""

import argparse
import platform
import statistics
import time

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip

from gemma_mlx.config import TrainConfig
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.processor import Processor
from gemma_mlx.demo.run import CHECKPOINT, DATA, RECIPE
from gemma_mlx.fit import fitted
from gemma_mlx.machine import cores, lanes
from gemma_mlx.models.load import load_model
from gemma_mlx.preparation import PAD_MULTIPLE, make_trainable, open_rows
from gemma_mlx.progress import Reporter
from gemma_mlx.step import Step

DEMO_SECONDS = 0.3
"""A step of the demo on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=float, default=10.0, help="the demo's speed")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    seconds = DEMO_SECONDS / options.times
    config = TrainConfig(**RECIPE)
    model = load_model(CHECKPOINT, "float32")
    rows = open_rows(DATA / "train.csv", Processor(CHECKPOINT, model.spec), config, Reporter(True))
    config, *_ = fitted(config, model, False, rows, None)
    make_trainable(model, config)
    step = Step(model, compiled=False, lanes=lanes(config.batch_size))
    multiple = PAD_MULTIPLE[mx.default_device().type.name]
    batches = Batches(rows, config.batch_size, rows.processor.pad_id, pad_to_multiple=multiple, finish=step.lay_out)
    batches.start()
    mx.eval(model.parameters())  # as a run does it
    print(
        f"{platform.machine()}, {cores()} cores, {len(rows)} rows, batch {config.batch_size}; simulated step "
        f"{seconds * 1e3:.0f} ms\n\n| epoch | mean wait ms | median ms | longest ms | of step time |\n"
        + "| --- " * 5 + "|"
    )  # fmt: skip
    for epoch in range(options.epochs):
        waits = []
        for _ in range(len(batches)):
            asked = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - asked)
            time.sleep(seconds)
        mean = statistics.mean(waits)
        print(
            f"| {epoch + 1} | {mean * 1e3:.2f} | {statistics.median(waits) * 1e3:.2f} | {max(waits) * 1e3:.1f} | "
            f"{mean / (mean + seconds):.1%} |", flush=True,
        )  # fmt: skip
    batches.close()


if __name__ == "__main__":
    main()
