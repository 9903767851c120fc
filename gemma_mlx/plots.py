"""Pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mlx.files import write_whole


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order; a cut-off last line is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    average, result = 0.0, []
    for i, value in enumerate(values):
        average = weight * average + (1.0 - weight) * value
        result.append(average / (1.0 - weight ** (i + 1)))
    return result


def plot_loss(records: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """Training loss (each logged step and a moving average), validation loss, and the learning rate, as a PNG."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]
    valid = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
    if train:
        steps, losses, rates = zip(*train, strict=True)
        top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        top.plot(steps, smooth(list(losses)), color="tab:blue", label="training loss (moving average)")
        bottom.plot(steps, rates, color="tab:gray")
    if valid:
        top.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", label="validation loss")
    top.set(ylabel="cross entropy per token (nats)", title=title)
    top.legend()
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path = Path(path)
    write_whole(path, buffer.getvalue())
    return path
