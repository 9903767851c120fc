"""Pictures of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

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
    figure = _figure(8, 5)
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
    return _save(figure, path)


def before_after(path: str | Path, rows: Sequence[tuple[str, float | None, float | None]], title: str = "") -> Path:
    """Pairs of horizontal bars, one pair a row of (name, share before, share after), as a PNG; None leaves a bar out.

    Shares are fractions of 1; those above 1 (word error rates can be) run into the frame, with their number beside it.
    """
    figure = _figure(8, 1 + 0.7 * len(rows))
    axes = figure.subplots()
    for i, (_, *shares) in enumerate(rows):
        for j, share in enumerate(shares):
            if share is not None:
                y = i + (j - 0.5) * 0.38
                axes.barh(y, min(share, 1.0), 0.36, color=("tab:gray", "tab:blue")[j])
                axes.text(min(share, 1.0) + 0.01, y, f"{share:.1%}", va="center", fontsize=8)
    for label, colour in (("before", "tab:gray"), ("after", "tab:blue")):
        axes.barh(0, 0, color=colour, label=label)
    axes.set_yticks(range(len(rows)), [name.strip() for name, *_ in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12), title=title)
    axes.xaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    return _save(figure, path)


def plot_histogram(path: str | Path, values: Any, label: str, title: str = "", mark: float | None = None) -> Path:
    """How often values occur, as a PNG: counts on a logarithmic scale, so that few long rows are seen beside many.

    Args:
        path: the file.
        values: [n] numbers, n >= 1.
        label: what they are.
        title: what they are of.
        mark: where a line is drawn, such as a limit; it is drawn only if a value lies beyond nine tenths of it.
    """
    figure = _figure(7, 3.5)
    axes = figure.subplots()
    counts, edges = np.histogram(values, bins=60)
    axes.stairs(counts, edges, fill=True, color="tab:blue")
    if mark is not None and max(values) > 0.9 * mark:
        axes.axvline(mark, color="tab:orange", label=f"{mark:g}")
        axes.legend()
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.7, 2.0 * counts.max())
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel=label, ylabel="how many", title=title)
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """An empty figure in inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(Path(path), buffer.getvalue())
    return Path(path)
