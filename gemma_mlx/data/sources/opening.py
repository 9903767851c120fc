"""From what the user names to tables: by scheme, by suffix, by what lies in a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gemma_mlx.data.blob import suffix_of
from gemma_mlx.data.remote.patterns import expanded
from gemma_mlx.data.sources.cells import kind_of
from gemma_mlx.data.sources.hub_layout import KINDS, WILD
from gemma_mlx.data.sources.table import Table
from gemma_mlx.errors import InputError

REMOTE = ("https://", "http://", "gs://")


@dataclass(frozen=True)
class Shards:
    """Tables far away that are fetched one by one, when their turn comes.

    Attributes:
        names: of the shards, in order.
        open: a shard's name -> its table.
        close: a shard's name, when its table is not used any more.
        fetch: a shard's name, when it will be opened soon.
    """

    names: tuple[str, ...]
    open: Callable[[str], Table]
    close: Callable[[str], None]
    fetch: Callable[[str], None] = lambda name: None


@dataclass(frozen=True)
class Part:
    """Tables that the user named together, and how they are read.

    Attributes:
        tables: in order; or shards.
        weight: how often an epoch sees each row.
        options: what a mixture says of this part alone: columns, media_root.
    """

    tables: tuple[Table, ...] | Shards
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def open_parts(source: str, fetcher: Any = None, *, split: str = "train", lines: str = "line") -> list[Part]:
    """The tables behind a name.

    ==============================================  ==================================================================
    name                                            tables
    ==============================================  ==================================================================
    a file                                          by its suffix: .csv .tsv .jsonl .ndjson .json .parquet .tar .txt
    a folder                                        what ``datasets`` saved there; media with a metadata file or texts
                                                    of the same name; else its files of one kind
    ``shards-{000..127}.tar``, ``data/*.parquet``   these files
    ``https://…``, ``gs://…``                       the same kinds of files and patterns (``*`` on gs:// alone)
    ``hf://datasets/owner/name[@rev][/path]``       the data files of a repository on the Hugging Face Hub
    ``bq://project.dataset.table``, ``bq://SELECT`` a table of BigQuery, or a query's result
    ``mix.yaml``                                    a mixture: a list of ``data:`` and ``weight:``
    ==============================================  ==================================================================

    Args:
        source: see above.
        fetcher: a `gemma_mlx.data.remote.fetch.Fetcher`; None where only this machine is read.
        split: of what has several.
        lines: what is a row of plain text: a "line", a "paragraph" or the whole "document".

    Raises:
        InputError: there is nothing of this name, it is of no known kind, or its files are not in order.
    """
    if suffix_of(source) in (".yaml", ".yml"):
        from gemma_mlx.data.sources.mixture import read_mixture

        return read_mixture(source, partial(open_parts, fetcher=fetcher, lines=lines), split)
    opener = partial(open_file, lines=lines)
    if source.startswith("bq://"):
        return [Part((_bigquery(source),))]
    if source.startswith("hf://"):
        return [Part(_hub(source, split, opener))]
    if source.startswith(REMOTE):
        return [Part(_remote(source, fetcher, opener))]
    if "://" in source and not os.path.exists(source):
        raise InputError(f"{source}: {source.split('://')[0]}:// is not read; give a file, https://, gs://, hf:// or bq://")
    return [Part(_local(source, split, opener))]


def open_file(
    path: Path, name: str | None = None, base: str | None = None, *, lines: str = "line", among: int = 1
) -> Table:  # fmt: skip
    """The table in one file, by the suffix of its name; one `among` several that are opened together.

    Raises:
        InputError: no known suffix, or what the table's kind says.
    """
    suffix = suffix_of(name or str(path))
    if suffix in (".csv", ".tsv"):
        from gemma_mlx.data.sources.local import CsvTable

        return CsvTable(path, name, base)
    if suffix in (".jsonl", ".ndjson", ".json"):
        from gemma_mlx.data.sources.jsonl import JsonlTable, JsonTable, begins_a_list

        is_list = suffix == ".json" and path.is_file() and begins_a_list(path)
        return JsonTable(path, name, base) if is_list else JsonlTable(path, name, base)
    if suffix == ".parquet":
        from gemma_mlx.data.sources.parquet import WHOLE_BYTES, ParquetTable

        return ParquetTable(path, name, base, whole_bytes=WHOLE_BYTES // among)
    if suffix == ".tar":
        from gemma_mlx.data.sources.tar import TarTable

        return TarTable(path, name, base)
    if suffix == ".txt":
        from gemma_mlx.data.sources.text import TextTable

        return TextTable(path, name, base, sep=lines)
    raise InputError(
        f"{name or path}: {suffix or 'a name without a suffix'} is no known kind of data; expected "
        f"{', '.join(KINDS)} or a folder"
    )


def _local(source: str, split: str, opener: Callable[..., Table]) -> tuple[Table, ...]:
    path = Path(source)
    if path.is_dir():
        return _folder(path, split, opener)
    if path.exists() or not WILD.search(source):
        return (opener(path, source),)
    paths = [found for name in expanded(source) for found in (sorted(glob.glob(name, recursive=True)) or [name])]
    return tuple(opener(Path(p), p, among=len(paths)) for p in paths)


def _folder(path: Path, split: str, opener: Callable[..., Table]) -> tuple[Table, ...]:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        from gemma_mlx.data.sources.huggingface import HuggingFaceTable

        return (HuggingFaceTable(str(path), split),)
    seen = (p for p in sorted(path.rglob("*")) if not any(n.startswith(".") for n in p.relative_to(path).parts))
    files = [p for p in seen if p.is_file()]
    of_rows = [p for p in files if p.suffix.lower() in KINDS and not _BESIDE.match(p.name)]
    if all(p.suffix.lower() == ".txt" for p in of_rows) and len(of_rows) < len(files):
        of_rows = []  # texts beside media
    if of_rows and not any(kind_of(p.suffix.lower()) for p in files):
        kinds = ", ".join(sorted({p.suffix.lower() for p in of_rows}))
        if "," in kinds:
            raise InputError(f"{path}: holds files of several kinds ({kinds}); name those to read")
        chosen = of_split(path, of_rows, split)
        return tuple(opener(p, str(p), among=len(chosen)) for p in chosen)
    from gemma_mlx.data.sources.folder import FolderTable

    return (FolderTable(path),)


def of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files below a folder whose names, or whose folders' names, say that they are of a split; all where none says
    anything.

    Raises:
        InputError: some say, and none this split; or some say and others do not.
    """
    names = {file: file.relative_to(folder).as_posix().lower() for file in files}
    of = {file: {kind for kind, word in _SPLITS.items() if word.search(name)} for file, name in names.items()}
    kind = next((kind for kind, word in _SPLITS.items() if word.search(split.lower())), split)
    said = set().union(*of.values())
    if not said:
        return files
    chosen = [file for file in files if kind in of[file]]
    if not chosen:
        told = ", ".join(sorted(said))
        raise InputError(f"{folder}: no files of the split {split!r}, only of {told}; name the files")
    if silent := [file.name for file in files if not of[file]]:
        raise InputError(
            f"{folder}: {silent[0]} ({len(silent)} such files) belongs to no split, {chosen[0].name} to {split!r}; "
            "name the files to read"
        )
    return chosen


_BESIDE = re.compile(r"(readme|licen[cs]e|dataset_infos?\b|dataset_card)", re.IGNORECASE)
"""Files that lie beside rows and hold none."""
_SPLITS = {
    kind: re.compile(rf"(^|[^a-z])({words})([^a-z]|$)")
    for kind, words in {"train": "train", "validation": "valid|validation|val|dev", "test": "test|eval"}.items()
}


def _remote(source: str, fetcher: Any, opener: Callable[..., Table]) -> tuple[Table, ...] | Shards:
    if fetcher is None:
        raise InputError(f"{source}: only files of this machine can be read here")
    names = fetcher.list(source) if WILD.search(source) or source.endswith("/") else [source]
    if not names:
        raise InputError(f"{source}: nothing matches; correct the pattern")
    kinds = sorted({suffix_of(name) for name in names})
    if len(kinds) > 1 or kinds[0] not in KINDS:
        raise InputError(f"{source}: expected files of one known kind ({', '.join(KINDS)}), found {', '.join(kinds)}")

    def fetched(name: str) -> Table:
        return opener(fetcher.file(name), name, name.rsplit("/", 1)[0] + "/")

    if len(names) > 1 and kinds[0] in (".tar", ".parquet"):
        return Shards(tuple(names), fetched, fetcher.release, lambda name: fetcher.prefetch(fetcher.blob(name)))
    return tuple(map(fetched, names))


def _bigquery(source: str) -> Table:
    from gemma_mlx.data.sources.bigquery import snapshot
    from gemma_mlx.data.sources.parquet import ParquetTable
    from gemma_mlx.files import cache_folder

    return ParquetTable(snapshot(source, cache_folder() / "bigquery"), source, os.getcwd())


def _hub(source: str, split: str, opener: Callable[..., Table]) -> tuple[Table, ...]:
    from gemma_mlx.data.sources.hub import hub_tables

    return hub_tables(source, split, opener)


def tables_of(parts: Iterable[Part]) -> list[Table]:
    """All tables of parts that are no shards."""
    return [table for part in parts if not isinstance(part.tables, Shards) for table in part.tables]


def open_table(source: str, fetcher: Any = None, *, split: str = "train", lines: str = "line") -> Table:
    """The one table behind a name; arguments and errors as `open_parts`.

    Raises:
        InputError: the name stands for several tables.
    """
    tables = tables_of(open_parts(source, fetcher, split=split, lines=lines))
    if len(tables) != 1:
        raise InputError(f"{source}: stands for {len(tables)} tables; name one")
    return tables[0]
