"""A BigQuery table or query as one Parquet file on this machine, read once.

=================================  =====================================================================
source                             what is read
=================================  =====================================================================
``bq://project.dataset.table``     a table; a view, a wildcard (``events_*``) or an external table by a query
``bq://SELECT …``                  the rows of a query (``SELECT``, ``WITH``, ``FROM`` or a parenthesis), in GoogleSQL
``bq://PROJECT/…``                 either of them, billed to PROJECT instead of the credentials' own project
=================================  =====================================================================

A table has no order of its own, and neither has a read of it: only the snapshot fixes one, for every epoch and every
resumed run. Where a query says ``ORDER BY``, its result is read as a single stream, in that order.

A snapshot is found again, without reading or running anything, as long as the table, or the tables that the query
names, are unchanged (etag, time of the last change, rows). Tables that may not be looked at, as behind an authorized
view, are not watched, nor are functions such as ``RAND()``: delete the file to read anew.

Credentials: Application Default Credentials. ``BIGQUERY_EMULATOR_HOST`` (REST) and ``BIGQUERY_STORAGE_EMULATOR_HOST``
(gRPC without encryption) name a local server, which gets no credentials.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mlx.data.sources.bigquery_errors import errors_told
from gemma_mlx.data.sources.bigquery_read import copy_rows, rest_retry
from gemma_mlx.errors import InputError
from gemma_mlx.files import replace_whole

SYNTAX = "bq://project.dataset.table or bq://[PROJECT/]SELECT ..."

_QUERY = re.compile(
    r"(?:\s|--[^\n]*\n|#[^\n]*\n|/\*.*?\*/)*(?:(?:select|with|from)(?=[\s(*'\"`]|/\*|--)|\()", re.IGNORECASE | re.DOTALL
)
"""How a query begins, after comments; a project may be called with-love."""
_ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)
_BILLED = re.compile(r"([a-z][a-z0-9.:-]*)/(.*)", re.DOTALL)
_READABLE = ("TABLE", "SNAPSHOT")
"""Kinds of tables that the Storage Read API reads by itself."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a ``bq://`` source names: a table or a query.

    Attributes:
        name: for messages, in one short line.
        project: who pays; "" for the credentials' project.
        table: (project, dataset, table) or None.
        query: GoogleSQL or "".
    """

    name: str
    project: str
    table: tuple[str, str, str] | None
    query: str

    @property
    def sql(self) -> str:
        """The query, or one that reads the table."""
        return self.query or f"SELECT * FROM `{'.'.join(self.table or ())}`"


def parse(source: str) -> Source:
    """A ``bq://`` source's parts.

    Raises:
        InputError: it is neither a table nor a query.
    """
    name = " ".join(source.split())
    name = name if len(name) <= 90 else f"{name[:89]}…"
    if not source.startswith("bq://"):
        raise InputError(f"{name}: not a BigQuery source; write {SYNTAX}")
    what, project = source.removeprefix("bq://").strip().rstrip(";").rstrip(), ""
    if not _QUERY.match(what) and (billed := _BILLED.fullmatch(what)):
        project, what = billed[1], billed[2].strip()
    if _QUERY.match(what):
        return Source(name, project, None, what)
    if re.search(r"\s", what):
        raise InputError(f"{name}: {what.split()[0]!r} does not begin a query; only SELECT is run. Write {SYNTAX}")
    parts = what.replace("`", "").rsplit(".", 2)
    if len(parts) != 3 or not all(parts):
        raise InputError(f"{name}: names no table; write {SYNTAX}")
    if re.search(r"[$@]", parts[2]):
        raise InputError(
            f"{name}: parts of a table ($ and @ after its name) cannot be read by name; write a query with WHERE"
        )
    return Source(name, project, (parts[0], parts[1], parts[2]), "")


def snapshot(
    source: str, folder: Path, *, streams: int = 4, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The Parquet file with a source's rows, read now if the folder has none that is up to date.

    Numbers and truth values stay as they are, repeated fields are lists, records structs, BYTES binary; times, dates
    and NUMERICs are text (``2024-01-02 03:04:05.000000Z`` in UTC, ``1.5``). Rows are written as they come, in row
    groups of at most 50,000 rows and about 64 MB, so memory does not grow with the table. The file appears whole or
    not at all, and of two processes that ask for it only one reads.

    Args:
        source: ``bq://…``, see the top of this file.
        folder: where snapshots are kept; made if missing.
        streams: how many streams of an unordered table are read at once.
        progress: told (rows read, rows expected) after every batch.

    Raises:
        InputError: a source that cannot be read as it is written: no such table, no permission, bad SQL, no rows.
        SourceError: BigQuery does not answer, or stops answering.
    """
    asked = parse(source)
    with errors_told(asked.name), _client(asked) as client:
        query, state = _state(client, asked)
        label = ".".join(asked.table) if asked.table else "query"
        digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', label)[:120]}-{digest}.parquet"
        if path.is_file():
            return path
        with _alone(path, asked.name):
            if not path.is_file():
                told = {"gemma_mlx.source": json.dumps({"source": source, "state": state})}
                replace_whole(path, lambda part: _write(client, asked, query, part, streams, progress, told))
    return path


def _write(
    client: Any,
    asked: Source,
    query: str,
    part: Path,
    streams: int,
    progress: Callable[[int, int], None] | None,
    metadata: dict[str, str],
) -> None:
    """Run the query if there is one, and copy the rows of its result, or of the table, to the file `part`."""
    table, expected = asked.table, None
    if query:
        job = client.query(query, retry=rest_retry(), job_retry=None)
        expected = job.result(retry=rest_retry(), job_retry=None).total_rows
        table = (job.destination.project, job.destination.dataset_id, job.destination.table_id)
    assert table is not None
    path = "projects/{}/datasets/{}/tables/{}".format(*table)
    count = 1 if _ORDERED.search(query) else streams
    copy_rows(client, path, part, count, asked.name, expected, progress, metadata)


def _state(client: Any, asked: Source) -> tuple[str, list[Any]]:
    """(the query to run, "" for none; what must be unchanged for a snapshot to be up to date)."""
    if asked.table and "*" not in asked.table[2]:
        table = client.get_table(".".join(asked.table), retry=rest_retry())
        if table.table_type in _READABLE:
            return "", [_version(table)]
        return asked.sql, [_version(table), *_query_state(client, asked)]
    return asked.sql, _query_state(client, asked)


def _query_state(client: Any, asked: Source) -> list[Any]:
    """The query and the tables that it reads, told by a dry run, which costs nothing."""
    from google.api_core.exceptions import Forbidden, NotFound
    from google.cloud.bigquery import QueryJobConfig

    config = QueryJobConfig(dry_run=True, use_query_cache=False)
    job = client.query(asked.sql, job_config=config, retry=rest_retry(), job_retry=None)
    if job.statement_type != "SELECT":
        raise InputError(f"{asked.name}: the query is a {job.statement_type or 'script'}; give one SELECT statement")
    state: list[Any] = [asked.sql]
    for reference in sorted(job.referenced_tables, key=str):
        try:
            state.append(_version(client.get_table(reference, retry=rest_retry())))
        except (Forbidden, NotFound):
            state.append([str(reference)])
    return state


def _version(table: Any) -> list[Any]:
    """What changes whenever a table's rows do."""
    waiting = table.streaming_buffer.estimated_rows if table.streaming_buffer else 0
    name = f"{table.project}.{table.dataset_id}.{table.table_id}"
    return [name, table.etag, str(table.modified), table.num_rows, waiting]


@contextlib.contextmanager
def _client(asked: Source) -> Iterator[Any]:
    """The REST client, with credentials and a project that pays."""
    try:
        import google.auth
        import pyarrow  # noqa: F401
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import bigquery, bigquery_storage_v1  # noqa: F401
    except ImportError:
        raise InputError(f"{asked.name}: BigQuery needs its client: pip install 'gemma-mlx[bigquery]'") from None
    host, options = os.environ.get("BIGQUERY_EMULATOR_HOST", ""), None
    if host:
        credentials: Any = AnonymousCredentials()
        project = os.environ.get("GOOGLE_CLOUD_PROJECT")
        options = {"api_endpoint": host if "://" in host else f"http://{host}"}
        if not os.environ.get("BIGQUERY_STORAGE_EMULATOR_HOST"):
            raise InputError(
                f"{asked.name}: BIGQUERY_EMULATOR_HOST is set; set BIGQUERY_STORAGE_EMULATOR_HOST (host:port) as well"
            )
    else:
        credentials, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    project = asked.project or project or (asked.table[0] if asked.table else "")
    if not project:
        raise InputError(f"{asked.name}: no project to bill; write bq://PROJECT/SELECT ... or set GOOGLE_CLOUD_PROJECT")
    client = bigquery.Client(project=project, credentials=credentials, client_options=options)
    with contextlib.closing(client):
        yield client


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Be the only process that makes this file; others wait, and then find it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f".{path.name}.lock").open("w")
    except OSError as e:
        raise InputError(f"{name}: its snapshot cannot be written to {path.parent} ({e.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
