"""`prepare`: rows -> what is in them and what is wrong with them, and, if asked, data written anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.data.examples import MEDIA as NAMES
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError
from gemma_mlx.preparing import reports
from gemma_mlx.preparing.cells import exchanged, normal
from gemma_mlx.preparing.check import Checker
from gemma_mlx.preparing.convert import MEDIA, Placer, url_of
from gemma_mlx.preparing.lengths import TokenCount, counted, estimated
from gemma_mlx.preparing.rows import Rows, Source
from gemma_mlx.preparing.split import assign
from gemma_mlx.preparing.staging import Staging
from gemma_mlx.preparing.tally import Tally, duplicates, leaks, spread
from gemma_mlx.preparing.workers import default_workers, in_order
from gemma_mlx.preparing.write import FORMATS, Values, write_rows
from gemma_mlx.progress import Reporter
from gemma_mlx.spec import SAMPLE_RATE


@dataclass(frozen=True)
class Preparation:
    """What is to be done with rows that were opened.

    Attributes:
        model: checkpoint whose tokenizer counts tokens; None to estimate.
        image_tokens, long_audio: as in `gemma_mlx.config.TrainConfig`.
        headers_only: decode no medium.
        skip_bad: write the good rows although there are bad ones.
        write: "parquet", "jsonl" or "csv", with the media beside it; None to write nothing.
        convert: clips to 16 kHz mono FLAC, HEIC to PNG.
        embed: media inside the Parquet file.
        fetch: media that are given as URLs become files too.
        split: name -> share of the rows; None for one file.
        split_by: column whose rows stay together; None for rows with the same media or text.
        seed: of the split.
        workers: threads.
    """

    model: str | None = None
    image_tokens: int | None = None
    long_audio: str = "error"
    headers_only: bool = False
    skip_bad: bool = False
    write: str | None = None
    convert: bool = False
    embed: bool = False
    fetch: bool = False
    split: Mapping[str, float] | None = None
    split_by: str | None = None
    seed: int = 0
    workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        if self.write is not None and self.write not in FORMATS:
            raise InputError(f"--write {self.write}: expected {', '.join(FORMATS)}")
        if self.embed and self.write != "parquet":
            raise InputError("--embed puts media into Parquet; add --write parquet")
        if self.headers_only and (self.convert or self.embed or self.fetch):
            raise InputError("--headers-only reads no media, so none can be written; leave one of the two out")
        if self.split_by and not self.split:
            raise InputError("--split-by goes with --split")

    @property
    def fetches(self) -> bool:
        """Media that are given as URLs become files as well."""
        return self.convert or self.embed or self.fetch


def prepare(
    tables: Mapping[str, Rows], options: Preparation, place: Staging, reporter: Reporter
) -> tuple[dict[str, Any], list[str]]:
    """Check all rows, tell what they are, and write them as asked; `place` is published.

    Args:
        tables: "train", and "valid" if there are validation rows of their own.
        options: what to do.
        place: where to do it.
        reporter: is told about progress.

    Returns:
        What report.json holds, and the first bad rows as ``where: reason``. Rows are written, and "written" says so,
        where there are no bad ones or they are to be skipped, and there are good ones.

    Raises:
        InputError: an option that does not go with these data.
        SourceError: the rows cannot be read.
    """
    if options.split and "valid" in tables:
        raise InputError("--split makes the validation rows; leave --valid out, or --split")
    if options.split_by and options.split_by not in tables["train"].columns:
        found = ", ".join(tables["train"].columns)
        raise InputError(f"{tables['train'].name}: no column {options.split_by!r} (--split-by); found {found}")
    tokens = (
        counted(options.model, image_tokens=options.image_tokens, long_audio=options.long_audio)
        if options.model
        else estimated(options.image_tokens)
    )
    placer = Placer(place.path, options.convert, options.fetches) if options.write else None
    with reports.BadRows(place.path / reports.BAD_ROWS) as bad:
        tallies = {
            name: _checked(rows, tokens, placer, bad, options, reporter.counter(f"checking {rows.name}"))
            for name, rows in tables.items()
        }
    report = _report(tables, tallies, options, place.path)
    whole = (options.skip_bad or not bad.count) and all(1 in tally.good for tally in tallies.values())
    if placer and whole:
        report["written"] = _written(tables, tallies, placer, options, reporter)
    if not whole or options.embed:
        shutil.rmtree(place.path / MEDIA, ignore_errors=True)
    reports.write_report(place.path / reports.REPORT, report)
    place.publish(finished=whole)
    return report, bad.shown


def _checked(
    rows: Rows,
    tokens: TokenCount,
    placer: Placer | None,
    bad: reports.BadRows,
    options: Preparation,
    progress: Callable[[int, int], None],
) -> Tally:
    """All rows of one table, in order."""
    check = Checker(
        rows,
        tokens,
        long_audio=options.long_audio,
        headers_only=options.headers_only,
        split_by=options.split_by,
        placer=placer,
    )
    tally = Tally()
    for row in in_order(check, len(rows), options.workers):
        tally.add(row)
        if row.reason:
            bad.add(row)
            if not options.skip_bad:
                check.placer = None  # nothing will be written
        progress(len(tally), len(rows))
    return tally


def _report(
    tables: Mapping[str, Rows], tallies: Mapping[str, Tally], options: Preparation, folder: Path
) -> dict[str, Any]:
    """What report.json holds, and the files beside it: duplicates.csv and the histograms."""
    from gemma_mlx.plots import plot_histogram

    train, by = tallies["train"], options.model or "estimated from characters and media"
    repeated = duplicates(train)
    report: dict[str, Any] = {"data": tables["train"].name, "train": train.summary()}
    report["tokens"] = _token_summary(train, by)
    report["media_compared_by"] = "name" if options.headers_only else "content"
    report["duplicates"] = {kind: len(pairs) for kind, pairs in repeated.items()}
    listed = {kind: (tables["train"], tables["train"], pairs) for kind, pairs in repeated.items()}
    if "valid" in tables:
        shared = leaks(train, tallies["valid"])
        report |= {"valid_data": tables["valid"].name, "valid": tallies["valid"].summary()}
        report["valid_tokens"] = _token_summary(tallies["valid"], by)
        report["leaks"] = {kind: len(pairs) for kind, pairs in shared.items()}
        listed |= {f"leak: {kind}": (tables["valid"], tables["train"], pairs) for kind, pairs in shared.items()}
    reports.write_duplicates(folder / reports.DUPLICATES, listed)
    if len(train.lengths()):
        plot_histogram(folder / "token_lengths.png", train.lengths(), f"tokens of a row ({by})", tables["train"].name)
    if len(train.seconds):
        seconds = np.array(train.seconds, np.float64)
        plot_histogram(folder / "durations.png", seconds, "seconds of a clip", tables["train"].name, mark=30.0)
    return report


def _token_summary(tally: Tally, by: str) -> dict[str, Any]:
    lengths = tally.lengths()
    return {"by": by, "total": int(lengths.sum()), "each": spread(lengths)}


def _written(
    tables: Mapping[str, Rows],
    tallies: Mapping[str, Tally],
    placer: Placer,
    options: Preparation,
    reporter: Reporter,
) -> dict[str, int]:
    """File name -> rows in it."""
    counts: dict[str, int] = {}
    for name, rows in tables.items():
        tally = tallies[name]
        good = np.flatnonzero(np.frombuffer(bytes(tally.good), np.uint8))
        parts = {name: good}
        if options.split:
            splits = assign(tally.key("group")[good], dict(options.split), options.seed)
            parts = {part: good[splits == i] for i, part in enumerate(options.split)}
        for part, chosen in parts.items():
            output = _Output(rows, tally, placer, options, chosen)
            file = f"{part}.{options.write}"
            counts[file] = write_rows(placer.folder / file, output.columns, output.rows, output.embedded)
            reporter.say(f"wrote {file}: {counts[file]} rows")
    return counts


class _Output:
    """The rows of one file as they are written."""

    def __init__(self, rows: Rows, tally: Tally, placer: Placer, options: Preparation, chosen: np.ndarray):
        self._rows, self._tally, self._placer, self._chosen = rows, tally, placer, chosen
        self._embed = options.embed
        rate = {"sampling_rate": SAMPLE_RATE} if options.convert else {}
        features = {"audio": {**rate, "_type": "Audio"}, "image": {"_type": "Image"}, "video": {"_type": "Video"}}
        kinds = {s.names[name]: kind for s in rows.sources for kind, names in NAMES.items() for name in names[:2]}
        known = [name for name in dict.fromkeys((*rows.columns, *tally.columns)) if name in tally.columns]
        renamed = (name for column in known for s in rows.sources for name in (column, self._renamed(s, column)))
        self.columns = list(dict.fromkeys(renamed))
        self.embedded = {name: features[kinds[name]] for name in self.columns if name in kinds and self._embed}

    def _renamed(self, source: Source, column: str) -> str:
        """``audio_path`` for ``audio``: names of files are read from there alone."""
        for kind, names in NAMES.items():
            if column in names[1:] and source.names[column] == column and not self._embed:
                return source.names[f"{kind}_path"]
        return column

    def rows(self, with_bytes: bool) -> Iterator[tuple[Values, str]]:
        """(values, where) of every row, media referred to as they are written."""
        for index in self._chosen.tolist():
            source, place = self._rows.find(index)
            row = source.row(place)
            yield self._values(source, row, index, with_bytes), row.where

    def _values(self, source: Source, row: Row, index: int, with_bytes: bool) -> Values:
        contents = self._tally.content(index)
        new = {}
        for (address, kind, medium), content in zip(source.media(row), contents, strict=True):
            if self._embed and len(address) > 2:
                told = f"{row.where}: {address[0]}"
                raise InputError(f"{told}: media inside messages are not embedded; leave --embed out")
            if self._placer.takes(medium):
                name = self._placer.name(medium, kind, content)
                new[address] = self._held(name, with_bytes) if self._embed else name
            else:  # a path relative to a URL would lead elsewhere from here
                new[address] = url_of(medium)
        if not new:
            return row.values
        used = source.media_columns(row.values)
        unread = {source.names[name] for names in NAMES.values() for name in names} - used.keys()
        values = exchanged(normal(row.values, used), new)
        return {self._renamed(source, name): value for name, value in values.items() if name not in unread}

    def _held(self, name: str, with_bytes: bool) -> dict[str, Any]:
        data = (self._placer.folder / name).read_bytes() if with_bytes else b""
        return {"bytes": data, "path": Path(name).name}
