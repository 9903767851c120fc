"""`python -m gemma_mlx evaluate`: score a model, with or without an adapter, on a file of rows."""

from __future__ import annotations

from pathlib import Path

import click

from gemma_mlx.cli.options import data_options, model_options


@click.command()
@model_options
@data_options
@click.option("--data", required=True, help="CSV of rows with their references.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for predictions.csv and report.json.")
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
def command(model, adapter, dtype, allow_unexpected, audio_window, image_tokens, data, out, **options):
    """Answer every row of DATA and compare: WER and CER for transcripts, exact match for answers."""
    from gemma_mlx import evaluation
    from gemma_mlx.models.load import load

    loaded, processor = load(
        model, adapter=adapter, dtype=dtype, allow_unexpected=allow_unexpected, audio_window=audio_window
    )
    report = evaluation.evaluate(loaded, processor, data, out=out, progress=True, **options)
    click.echo(report.table())
    if out:
        click.echo(f"predictions: {out / evaluation.PREDICTIONS}")
