"""`python -m gemma_mlx evaluate`: score a model, with or without an adapter, on a file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import data_options, model_options


@click.command()
@model_options
@data_options
@click.option("--data", required=True, help="CSV of rows with their references.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for predictions.csv.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Rows answered at a time.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many rows.")
@click.option(
    "--normalize",
    default="basic",
    show_default=True,
    type=click.Choice(["basic", "none"]),
    help="basic: case, punctuation and spacing do not count; none: only spacing does not.",
)
@click.option("--without-media", is_flag=True, help="Silence for every clip, grey for every picture: what is guessed?")
def command(data: str, out: Path | None, **options: Any) -> None:
    """Answer every row of DATA and compare: WER and CER for transcripts, exact match for answers."""
    from gemma_mlx.cli.use import load_model_and_rows
    from gemma_mlx.evaluation import PREDICTIONS, evaluate
    from gemma_mlx.progress import Reporter

    model, processor, reading = load_model_and_rows(options)
    report = evaluate(model, processor, data, out, progress=Reporter().counter("answering"), **reading, **options)
    click.echo(report.table())
    if out:
        click.echo(f"predictions: {out / PREDICTIONS}")
