"""Rows of a BigQuery table through the Storage Read API, as Arrow batches, into a Parquet file."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from gemma_mlx.data.sources.bigquery_types import as_text, text_schema
from gemma_mlx.errors import InputError, SourceError

GROUP_ROWS = 50_000
GROUP_BYTES = 64 << 20
"""A row group is written as soon as it has so many rows or bytes."""
WINDOW_BYTES = 4 << 20
"""What a stream may send ahead: at 50 ms of round trip still 80 MB/s."""
PATIENCE_S = 120.0
"""Seconds of failures without a single row before the source counts as failed."""
STALL_S = 45.0
"""The longest that one request for rows lasts; the next goes on from its last row, so a stalled one costs little."""
SESSIONS = 3
"""A session lives for six hours. Another would give rows in another order, so its copy begins from the start."""


class _SessionExpired(Exception):
    pass


def rest_retry() -> Any:
    """The client's own retries, for `PATIENCE_S`."""
    from google.cloud.bigquery import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(PATIENCE_S)


def copy_rows(
    client: Any,
    table: str,
    part: Path,
    streams: int,
    name: str,
    expected: int | None,
    progress: Callable[[int, int], None] | None,
    metadata: dict[str, str],
) -> None:
    """Copy a table's rows, as they are at one moment, to a Parquet file.

    Args:
        client: the REST client, for its credentials and the project that pays.
        table: ``projects/…/datasets/…/tables/…``.
        part: the file; `streams` of more than one leave parts beside it while they are read.
        streams: the most streams to read at once; with 1 the rows come in the table's order.
        name: the source, for messages.
        expected: rows that there must be, where that is known.
        progress: told (rows read, rows expected) after every batch.
        metadata: kept in the file.

    Raises:
        InputError: no rows, or a column that has no counterpart in Parquet.
        SourceError: the session expired again and again, a stream keeps breaking, or rows are missing.
    """
    with contextlib.closing(_storage(client)) as transport:
        for _ in range(SESSIONS):
            session = _session(client, transport, table, streams)
            try:
                rows = _copy(transport, session, part, name, progress, metadata)
                break
            except _SessionExpired:
                continue
        else:
            raise SourceError(
                f"{name}: the read session expired {SESSIONS} times before its last row; read fewer columns or rows "
                "with a query"
            )
    if not rows:
        raise InputError(f"{name}: no rows; check the table, or the query's WHERE")
    if expected is not None and rows != expected:
        raise SourceError(f"{name}: {rows} rows came of {expected}; try again")


def _storage(client: Any) -> Any:
    """The gRPC transport of the Storage Read API."""
    from google.cloud.bigquery_storage_v1.services.big_query_read.transports import BigQueryReadGrpcTransport

    # As in the library's own channels, a response may hold more than gRPC's 4 MB. The fixed window bounds what waits
    # here unread: left to itself, gRPC takes in a gigabyte when the disk is slower than the network.
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ]
    if host := os.environ.get("BIGQUERY_STORAGE_EMULATOR_HOST", "").removeprefix("http://"):
        import grpc

        channel = grpc.insecure_channel(host, options=options)
    else:
        make = BigQueryReadGrpcTransport.create_channel
        channel = make(f"{BigQueryReadGrpcTransport.DEFAULT_HOST}:443", client._credentials, options=options)
    return BigQueryReadGrpcTransport(channel=channel)


def _reader(transport: Any) -> Any:
    """The generated client: the handwritten one reconnects for ever to a stream that keeps breaking."""
    from google.cloud.bigquery_storage_v1.services.big_query_read import BigQueryReadClient

    return BigQueryReadClient(transport=transport)


def _session(client: Any, transport: Any, table: str, streams: int) -> Any:
    from google.api_core.exceptions import ServiceUnavailable
    from google.api_core.retry import Retry, if_exception_type
    from google.cloud.bigquery_storage_v1 import types

    request = types.CreateReadSessionRequest(
        parent=f"projects/{client.project}",
        read_session=types.ReadSession(table=table, data_format=types.DataFormat.ARROW),
        max_stream_count=streams,
    )
    retry = Retry(if_exception_type(ServiceUnavailable), initial=0.2, maximum=10.0, timeout=PATIENCE_S)
    return _reader(transport).create_read_session(request=request, retry=retry)


def _copy(
    transport: Any,
    session: Any,
    part: Path,
    name: str,
    progress: Callable[[int, int], None] | None,
    metadata: dict[str, str],
) -> int:
    """Rows copied of one session."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not session.streams:
        return 0
    source = pa.ipc.read_schema(pa.py_buffer(session.arrow_schema.serialized_schema))
    schema = text_schema(source, name).with_metadata(metadata)
    reader = _reader(transport)
    counted = _counted(session.estimated_row_count, progress)

    def read(stream: str) -> Iterator[Any]:
        return counted(batch for batch in _batches(reader, stream, source, name))

    rows = 0
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for group in _groups(_in_order(read, [stream.name for stream in session.streams], source, part.parent)):
            rows += sum(batch.num_rows for batch in group)
            texts = [as_text(batch, schema) for batch in group]
            writer.write_table(pa.Table.from_batches(texts, schema), row_group_size=GROUP_ROWS)
    return rows


def _counted(expected: int, progress: Callable[[int, int], None] | None) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Passes batches of several threads on and tells how many rows they had."""
    lock, done = threading.Lock(), 0

    def counted(batches: Iterable[Any]) -> Iterator[Any]:
        nonlocal done
        for batch in batches:
            with lock:
                done += batch.num_rows
                if progress and done:
                    progress(done, max(done, expected))
            yield batch

    return counted


def _batches(reader: Any, stream: str, schema: Any, name: str) -> Iterator[Any]:
    """A stream's batches; a broken connection goes on from the row after the last one that came."""
    import pyarrow as pa
    from google.api_core import exceptions as api

    offset, pause, since = 0, 0.1, time.monotonic()
    while True:
        try:
            for response in reader.read_rows(read_stream=stream, offset=offset, retry=None, timeout=STALL_S):
                data = pa.py_buffer(response.arrow_record_batch.serialized_record_batch)
                batch = pa.ipc.read_record_batch(data, schema)
                yield batch
                offset += batch.num_rows
                pause, since = 0.1, time.monotonic()
            return
        except (api.NotFound, api.FailedPrecondition) as e:
            if isinstance(e, api.NotFound) or "expired" in e.message:
                raise _SessionExpired from None
            raise
        except (api.ServerError, api.TooManyRequests, api.Aborted, api.Cancelled) as e:
            if time.monotonic() - since > PATIENCE_S:
                why = e.message.splitlines()[0] if e.message else type(e).__name__
                raise SourceError(
                    f"{name}: BigQuery stops answering after row {offset} of a stream ({why}); try again later"
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _in_order(read: Callable[[str], Iterator[Any]], streams: list[str], schema: Any, folder: Path) -> Iterator[Any]:
    """Batches of all streams, those of the first stream first; several streams are read at once, to files."""
    if len(streams) == 1:
        yield from read(streams[0])
        return
    stop = threading.Event()
    parts = [folder / f"stream-{i}.arrow" for i in range(len(streams))]
    with ThreadPoolExecutor(len(streams)) as pool:
        try:
            pairs = zip(streams, parts, strict=True)
            tasks = [pool.submit(_spool, read(stream), schema, part, stop) for stream, part in pairs]
            for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                task.result()
        finally:
            stop.set()
    for part in parts:
        yield from _spooled(part)
        part.unlink()


def _spool(batches: Iterable[Any], schema: Any, part: Path, stop: threading.Event) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(str(part), schema) as writer:
        for batch in batches:
            if stop.is_set():
                return
            writer.write_batch(batch)


def _spooled(part: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(str(part)) as file, pa.ipc.open_stream(file) as batches:
        yield from batches


def _groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Batches gathered until they make a row group."""
    group: list[Any] = []
    rows = size = 0
    for batch in batches:
        group.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group
