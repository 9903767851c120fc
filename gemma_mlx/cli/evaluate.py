"""`python -m gemma_mlx evaluate`: score a model, with or without an adapter, on a file of rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import data_options, model_options
from gemma_mlx.errors import InputError


def _listed(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


@click.command()
@model_options
@data_options
@click.option("--data", required=True, help="Rows with their references: whatever train reads.")
@click.option("--split", default="test", show_default=True, help="Split of --data, where it has several.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for predictions.csv, report.json, report.html; run again with the same options, it goes on there.",
)
@click.option("--restart", is_flag=True, help="Answer rows again that --out has from another evaluation.")
@click.option("--no-page", is_flag=True, help="Do not write report.html.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Rows answered at a time.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many rows.")
@click.option(
    "--metrics",
    metavar="NAME,NAME",
    callback=_listed,
    help="wer, cer, bleu, chrf, exact_match, f1, anls, over all rows; default: wer and cer of transcripts, "
    "exact_match, f1 and anls of other answers.",
)
@click.option(
    "--normalize",
    default="whisper",
    show_default=True,
    metavar="NAME",
    help="whisper: as Whisper is scored, by the row's language; basic: case, punctuation and spacing do not count; "
    "squad: nor do articles; none: only spacing does not.",
)
@click.option("--language", metavar="NAME", help="Language of rows that name none, such as English or en.")
@click.option("--likelihood", is_flag=True, help="Perplexity and token accuracy of the references too.")
@click.option(
    "--group-by",
    multiple=True,
    metavar="NAME",
    help="Scores by language, source, duration, media, reference_length, task or a column; repeatable.",
)
@click.option("--cluster-by", metavar="COLUMN", help="Rows of one value (a speaker) are drawn together in intervals.")
@click.option(
    "--compare",
    metavar="base|ADAPTER|FILE.csv",
    help="Another side: the base without the adapter, another adapter, or an earlier predictions.csv.",
)
@click.option("--without-media", is_flag=True, help="Silence for every clip, grey for every picture: what is guessed?")
@click.option(
    "--flag-bad-rows",
    metavar="LIMIT",
    type=float,
    help="Write transcripts of a word error rate above LIMIT (0.5) to delete.csv in --out: rows to look at.",
)
def command(data: str, out: Path | None, flag_bad_rows: float | None, no_page: bool, **options: Any) -> None:
    """Answer every row of DATA and compare: WER and CER for transcripts, exact match, F1 and ANLS for answers."""
    from rich.console import Console

    from gemma_mlx.cli.use import load_model_and_rows
    from gemma_mlx.evaluating.console import show
    from gemma_mlx.evaluating.measuring import check_metrics
    from gemma_mlx.evaluating.report import PAGE, PREDICTIONS
    from gemma_mlx.evaluation import evaluate
    from gemma_mlx.flagging import check_limit, flag_rows
    from gemma_mlx.normalizers import normalizer
    from gemma_mlx.progress import Reporter

    check_metrics(options["metrics"])
    normalizer(options["normalize"])
    if flag_bad_rows is not None:
        check_limit(flag_bad_rows)
        if out is None:
            raise InputError("--flag-bad-rows writes delete.csv into --out; give --out FOLDER")
    model, processor, reading = load_model_and_rows(options)
    count = Reporter().counter("answering")
    try:
        report = evaluate(model, processor, data, out, progress=count, page=not no_page, **reading, **options)
    except KeyboardInterrupt:
        if out:
            click.echo(f"stopped; the same command goes on where it was (finished rows are in {out})", err=True)
        raise
    show(report, Console(width=min(Console().width, 100) if sys.stdout.isatty() else 100))
    if out:
        click.echo(f"predictions: {out / PREDICTIONS}" + ("" if no_page else f"   to look at: {out / PAGE}"))
    if out and flag_bad_rows is not None:
        click.echo(flag_rows(report.predictions, flag_bad_rows, out, options["normalize"]))
