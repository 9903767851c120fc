"""`python -m gemma_mlx evaluate`: score a model, with or without an adapter, on a file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import data_options, model_options
from gemma_mlx.errors import InputError


@click.command()
@model_options
@data_options
@click.option("--data", required=True, help="Rows with their references: whatever train reads.")
@click.option("--split", default="test", show_default=True, help="Split of --data, where it has several.")
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
@click.option(
    "--flag-bad-rows",
    metavar="LIMIT",
    type=float,
    help="Write transcripts of a word error rate above LIMIT (0.5) to delete.csv in --out: rows to look at.",
)
def command(data: str, out: Path | None, flag_bad_rows: float | None, **options: Any) -> None:
    """Answer every row of DATA and compare: WER and CER for transcripts, exact match for answers."""
    from gemma_mlx.cli.use import load_model_and_rows
    from gemma_mlx.evaluation import PREDICTIONS, evaluate
    from gemma_mlx.flagging import check_limit, flag_rows
    from gemma_mlx.progress import Reporter

    if flag_bad_rows is not None:
        check_limit(flag_bad_rows)
        if out is None:
            raise InputError("--flag-bad-rows writes delete.csv into --out; give --out FOLDER")
    model, processor, reading = load_model_and_rows(options)
    report = evaluate(model, processor, data, out, progress=Reporter().counter("answering"), **reading, **options)
    click.echo(report.table())
    if out:
        click.echo(f"predictions: {out / PREDICTIONS}")
    if out and flag_bad_rows is not None:
        click.echo(flag_rows(report.predictions, flag_bad_rows, out, options["normalize"]))
