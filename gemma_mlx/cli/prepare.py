"""`python -m gemma_mlx prepare`: what is in a data set and what is wrong with it; convert, split and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import data_options, fetcher_of, field_options
from gemma_mlx.errors import InputError


@click.command()
@click.argument("data", required=False)
@click.option("--valid", metavar="DATA", help="Validation rows: checked too, and for what they share with DATA.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="New folder for the reports and data.")
@click.option("--model", metavar="MODEL", help="Count tokens with this checkpoint's tokenizer; no weights are read.")
@click.option("--manifest", type=click.Choice(["nemo"]), help="DATA is a NeMo manifest (found out by its keys too).")
@click.option("--headers-only", is_flag=True, help="Read media's headers alone: fast, but misses damaged files.")
@click.option(
    "--write", type=click.Choice(["parquet", "jsonl", "csv"]), help="Write rows and media; default: like DATA."
)
@click.option("--convert", type=click.Choice(["flac"]), help="Clips as 16 kHz mono FLAC, HEIC as PNG.")
@click.option("--embed", is_flag=True, help="Media inside the Parquet file, as Hugging Face datasets have them.")
@click.option("--download", is_flag=True, help="Fetch audio_url, image_url and video_url.")
@click.option("--split", metavar="0.9", help="Split: train's share, or train=0.8,valid=0.1,test=0.1.")
@click.option("--split-by", metavar="COLUMN", help="Keep rows with the same value together, such as a speaker's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the split.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: the cores, 8 at most.")
@click.option("--from-tuner", nargs=2, metavar="INI PROFILE", help="Write --out, a YAML for train --config.")
@field_options("on_bad_row", "train_split", "valid_split")
@data_options
def command(data: str | None, from_tuner: tuple[str, str] | None, out: Path | None, **options: Any) -> int | None:
    """Check every row of DATA without a model: 0 if all are good, 2 if one is not (then no data are written, unless
    with --on-bad-row skip).

    OUT gets report.json, bad_rows.csv, duplicates.csv and histograms; with --write, --convert, --embed, --split or
    --download also the good rows.
    """
    if from_tuner:
        if data is not None:
            raise InputError("--from-tuner takes its data from the profile; leave DATA out")
        return _from_tuner(Path(from_tuner[0]), from_tuner[1], out)
    if data is None or out is None:
        raise InputError("prepare needs the data and a new folder: prepare train.csv --out checked")
    return _prepare(data, out, options)


def _prepare(data: str, out: Path, options: dict[str, Any]) -> int:
    from gemma_mlx.data.examples import Prompts
    from gemma_mlx.preparing import reports
    from gemma_mlx.preparing.download import Downloader
    from gemma_mlx.preparing.rows import open_rows
    from gemma_mlx.preparing.run import prepare
    from gemma_mlx.preparing.staging import staging
    from gemma_mlx.progress import Reporter

    plan = plan_of(data, options)
    reading = {name: options[name] for name in ("columns", "patches", "language_mode")}
    reading |= {"nemo": options["manifest"] == "nemo", "lines": options["text_rows"]}
    reading["prompts"] = Prompts(*(options[name] for name in ("audio_prompt", "image_prompt", "system")))
    named = [data, *([options["valid"]] if options["valid"] else [])]
    with staging(out) as place, fetcher_of([*named, *options["media_root"]], options) as fetcher:
        roots = list(options["media_root"])
        if options["download"]:
            reading["change"] = Downloader(place.downloads, fetcher, options["columns"])
            roots.append(str(place.downloads))
        tables = {
            part: open_rows(name, roots, fetcher=fetcher, split=options[f"{part}_split"], **reading)
            for part, name in zip(("train", "valid"), named, strict=False)
        }
        try:
            report, shown = prepare(tables, plan, place, Reporter())
        finally:
            if kept := place.kept():
                click.echo(f"{kept} downloaded files are kept for the same command: {place.downloads}", err=True)
    for line in (*shown, *reports.lines(report)):
        click.echo(line)
    bad = report["train"]["bad"] + report.get("valid", {}).get("bad", 0)
    if bad > len(shown):
        click.echo(f"{bad} bad rows in all: {out / reports.BAD_ROWS}")
    click.echo(f"report: {out / reports.REPORT}")
    if bad and plan.skip_bad and plan.write and "written" not in report:
        raise InputError(f"no good row to write; the bad ones are listed in {out / reports.BAD_ROWS}")
    if bad and not plan.skip_bad:
        rows = "row" if bad == 1 else "rows"
        raise InputError(f"{bad} bad {rows}, listed in {out / reports.BAD_ROWS}; mend them, or --on-bad-row skip")
    return 0


def plan_of(data: str, options: dict[str, Any]) -> Any:
    """The `Preparation` that flags ask for."""
    from gemma_mlx.data.blob import suffix_of
    from gemma_mlx.preparing.run import Preparation
    from gemma_mlx.preparing.split import read_fractions
    from gemma_mlx.preparing.workers import default_workers

    write = options["write"]
    if write is None and any(options[name] for name in ("convert", "embed", "download", "split")):
        like = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
        write = "parquet" if options["embed"] else like.get(suffix_of(data), "jsonl")
    return Preparation(
        model=options["model"],
        image_tokens=options["image_tokens"],
        long_audio=options["long_audio"],
        headers_only=options["headers_only"],
        skip_bad=options["on_bad_row"] == "skip",
        write=write,
        convert=options["convert"] is not None,
        embed=options["embed"],
        fetch=options["download"],
        split=read_fractions(options["split"]) if options["split"] else None,
        split_by=options["split_by"],
        seed=options["seed"],
        workers=options["workers"] or default_workers(),
    )


def _from_tuner(config: Path, profile: str, out: Path | None) -> None:
    from gemma_mlx.data.tuner.profile import read_profile, to_yaml
    from gemma_mlx.files import write_whole

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"--out {out}: with --from-tuner expected the name of a YAML file in a folder that there is")
    options, notes = read_profile(config, profile)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    text = to_yaml(options, notes)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_whole(out, text.encode())
        click.echo(f"wrote {out}: python -m gemma_mlx train --config {out}")
