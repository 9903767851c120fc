"""The demo's losses over 200 steps with every saving off and with every saving on, from the same seed.

    python benchmarks/traces.py [--steps 200] [--runs off,on,noise] [--out FOLDER]

Off: all layers at all positions, logits formed, frozen towers encoded within the function that is differentiated, for
every batch anew. On: label positions, the loss without logits (which the demo's small vocabulary would not choose by
itself), frozen towers outside and kept, every layer recomputed in the backward. Noise: off, with the adapters' first
weights moved by 1e-7 of their size: what float32's rounding alone makes of a trace. Other names in --runs are single
savings: labels, loss, towers, recompute.

Prints the largest difference of a step's loss from off (bound: 1e-3) and a line for each 20 steps; writes traces.json
and traces.png into --out, or a temporary folder.
"""

import argparse
import json
import tempfile
from pathlib import Path

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
from gemma_mlx.config import configure
from gemma_mlx.data.processor import Processor
from gemma_mlx.demo.run import CHECKPOINT, DATA, RECIPE
from gemma_mlx.loop import METRICS, Job
from gemma_mlx.models.load import load_model
from gemma_mlx.plots import read_metrics
from gemma_mlx.preparation import make_trainable, open_rows
from gemma_mlx.progress import Reporter
from gemma_mlx.signals import stop_request

SAVINGS = ("labels", "loss", "towers", "recompute")
RUNS = {"off": (), "on": SAVINGS, "noise": ()} | {name: (name,) for name in SAVINGS}
BOUND = 1e-3


def trace(name: str, steps: int, folder: Path) -> list[float]:
    """The mean loss of each step of one run."""
    savings, say = RUNS[name], Reporter(quiet=True)
    options = {"label_positions": "auto" if "labels" in savings else "off"}
    options |= {"checkpoint_layers": int("recompute" in savings), "dtype": "float32"}
    config = configure(
        RECIPE | options | {"model": str(CHECKPOINT), "data": str(DATA / "train.csv"), "out": str(folder)}
        | {"steps": steps, "save_every": 0}
    )  # fmt: skip
    model = load_model(CHECKPOINT, config.dtype)
    processor = Processor(CHECKPOINT, model.spec)
    make_trainable(model, config)
    job = Job(config, folder, model, processor, open_rows(config.data, processor, config, say), None, say)
    job.step.chunked_loss = "loss" in savings
    if "towers" not in savings:
        job.step.frozen = {}
    if name == "noise":
        job.weights = {k: w * (1 + 1e-7 * mx.random.normal(w.shape)) for k, w in job.weights.items()}
    try:
        with stop_request() as stop:
            job.start()
            while not job.done:
                job.advance(stop)
    finally:
        job.close()
    print(f"{name}: {job.progress.seconds / steps:.2f} s a step", flush=True)
    return [line["loss"] for line in read_metrics(folder / METRICS) if "loss" in line]


def plot(traces: dict[str, list[float]], path: Path) -> None:
    """Losses above, differences from off below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, losses in traces.items():
        top.plot(losses, label=name, lw=1)
        if name != "off":
            apart = [max(abs(a - b), 1e-9) for a, b in zip(losses, traces["off"], strict=True)]
            bottom.semilogy(apart, label=f"{name} − off", lw=1)
    bottom.axhline(BOUND, color="black", lw=0.5)
    top.set(ylabel="loss")
    bottom.set(ylabel="difference", xlabel="step")
    top.legend()
    bottom.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", default="off,on,noise", help="comma separated; off comes first in any case")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    out = Path(options.out or tempfile.mkdtemp(prefix="traces-"))
    out.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(["off", *options.runs.split(",")])
    with tempfile.TemporaryDirectory() as runs:
        traces = {name: trace(name, options.steps, Path(runs) / name) for name in names}
    (out / "traces.json").write_text(json.dumps(traces))
    plot(traces, out / "traces.png")
    for name, losses in traces.items():
        apart = [abs(a - b) for a, b in zip(losses, traces["off"], strict=True)]
        if name != "off":
            windows = " ".join(f"{max(apart[i : i + 20]):.0e}" for i in range(0, len(apart), 20))
            first = next((i + 1 for i, x in enumerate(apart) if x > BOUND), None)
            print(f"{name}: at most {max(apart):.1e} from off; each 20 steps {windows}; first above {BOUND}: {first}")
    print(f"{out / 'traces.png'}")


if __name__ == "__main__":
    main()
