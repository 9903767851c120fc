"""`python -m gemma_mlx.train --demo`: a tiny Gemma 4 learns new words and handwritten digits, offline, in minutes.

The base knows everyday words and printed letters. It is asked about the NATO alphabet in voices it never heard and
about handwritten digits, is tuned with LoRA on a few hundred rows of both, and is asked again about rows it has not
seen. Silence and grey pictures show what it would get right by guessing.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from gemma_mlx.evaluation import Report, evaluate
from gemma_mlx.files import write_whole
from gemma_mlx.loop import finetune
from gemma_mlx.models.load import load
from gemma_mlx.plots import before_after

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
DATA = HERE / "data"
RECIPE: dict[str, Any] = {
    "steps": 260,
    "batch_size": 16,
    "rank": 16,
    "alpha": 32,
    "targets": "decoder,audio,embedders",
    "lr": 3e-3,
    "warmup": 0.1,
    "schedule": "cosine",
    "eval_every": 0,
    "save_every": 130,
    "seed": 0,
}
"""The run's options; everything else is the library's default."""
TESTS = {"everyday": "test_everyday.csv", "nato": "test_nato.csv", "digits": "test_digits.csv"}
RESULT, PLOT = "demo.json", "before_after.png"


@dataclass(frozen=True)
class Score:
    """One row of the table: what was measured, before and after, and whether low is good."""

    name: str
    before: float | None
    after: float | None
    low_is_good: bool


def main(out: str | Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and return its figures, which also go to ``demo.json`` in the run folder.

    ``out``: the run folder; by default `runs/demo`, or the first of `runs/demo-2`, … that holds no run.
    """
    started = time.perf_counter()
    folder = Path(out) if out else _free_folder()
    console = Console(quiet=quiet)
    console.print(f"A tiny Gemma 4 on this machine, no network. Everything it writes goes to {folder}/\n")
    base, processor = load(CHECKPOINT)
    before = {name: _score(console, f"before: {name}", base, processor, name) for name in TESTS}
    rows = {"data": str(DATA / "train.csv"), "valid": str(DATA / "valid.csv")}
    finetune(str(CHECKPOINT), **rows, out=str(folder), quiet=quiet, **RECIPE)
    tuned, processor = load(CHECKPOINT, adapter=folder / "adapter")
    after = {name: _score(console, f"after: {name}", tuned, processor, name, folder) for name in TESTS}
    for name in ("nato", "digits"):
        label = f"after: {name}, no {_medium(name)}"
        after[f"{name} muted"] = _score(console, label, tuned, processor, name, muted=True)
    result = _figures(before, after)
    result["seconds"] = time.perf_counter() - started
    write_whole(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    scores = _scores(result)
    before_after(folder / PLOT, [(s.name, s.before, s.after) for s in scores], "A tiny Gemma 4 before and after LoRA")
    _show(console, scores, before, after, result, folder)
    return result


def _free_folder() -> Path:
    names = ["runs/demo", *(f"runs/demo-{i}" for i in range(2, 1000))]
    return next(p for p in map(Path, names) if not p.exists() or not any(p.iterdir()))


def _medium(name: str) -> str:
    return "picture" if name == "digits" else "sound"


def _score(
    console: Console, label: str, model: Any, processor: Any, name: str, out: Path | None = None, muted: bool = False
) -> Report:
    """One test file answered, with a progress bar."""
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        return evaluate(
            model,
            processor,
            DATA / TESTS[name],
            out / "scores" / name if out else None,
            max_tokens=40,
            batch_size=32,
            normalize="basic",
            without_media=muted,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _figures(before: dict[str, Report], after: dict[str, Report]) -> dict[str, Any]:
    """Every score by name, and the interval that guessing the commonest digit would fall in."""
    result: dict[str, Any] = {"recipe": RECIPE}
    for when, reports in (("before", before), ("after", after)):
        result[when] = {name: report.scores for name, report in reports.items()}
    references = [p.reference for p in after["digits"].predictions]
    commonest = max(references.count(r) for r in set(references)) / len(references)
    result["commonest digit"] = {"share": commonest, "interval": binomial_interval(commonest, len(references))}
    return result


def binomial_interval(share: float, rows: int) -> tuple[float, float]:
    """Central 95 % of the accuracy over ``rows`` independent rows, each right with probability ``share``."""
    mass, low, high = 0.0, None, 1.0
    for k in range(rows + 1):
        mass += math.comb(rows, k) * share**k * (1 - share) ** (rows - k)
        low = k / rows if low is None and mass > 0.025 else low
        if mass >= 0.975:
            high = k / rows
            break
    return low or 0.0, high


def _scores(result: dict[str, Any]) -> list[Score]:
    before, after = result["before"], result["after"]
    return [
        Score("NATO words, new voices: WER", before["nato"]["wer"], after["nato"]["wer"], True),
        Score("  the same with silence: WER", None, after["nato muted"]["wer"], False),
        Score("Handwritten digits: right", before["digits"]["exact_match"], after["digits"]["exact_match"], False),
        Score("  the same, all grey: right", None, after["digits muted"]["exact_match"], True),
        Score("Everyday words (the base's own): WER", before["everyday"]["wer"], after["everyday"]["wer"], True),
    ]


def _show(
    console: Console,
    scores: list[Score],
    before: dict[str, Report],
    after: dict[str, Report],
    result: dict[str, Any],
    folder: Path,
) -> None:
    table = Table(title="Held-out rows", title_justify="left")
    for column, side in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=side)
    for s in scores:
        table.add_row(s.name, *("" if value is None else f"{value:.1%}" for value in (s.before, s.after)))
    console.print(table)
    examples = Table(title="Some of them", title_justify="left")
    for column in ("reference", "before", "after"):
        examples.add_column(column)
    for name in ("nato", "digits"):
        for b, a in list(zip(before[name].predictions, after[name].predictions, strict=True))[:4]:
            examples.add_row(b.reference, b.prediction, a.prediction)
    console.print(examples)
    low, high = result["commonest digit"]["interval"]
    console.print(f"Always answering the commonest digit would get {low:.1%} to {high:.1%} of them right.")
    console.print(f"{result['seconds']:.0f} s. Plot: {folder / PLOT}, rows: {folder / 'scores'}")
