"""BigQuery: the real client libraries against a local server with faults, and an emulator where there is one."""

import datetime
import decimal
import json
import os
import subprocess
import sys
import threading

import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("google.cloud.bigquery_storage_v1")
import fake_bigquery
import grpc
import local_bigquery
import pyarrow.parquet as pq
from fake_bigquery import Faults, Query, Table

from gemma_mlx.data.sources import bigquery_read
from gemma_mlx.data.sources.bigquery import parse, snapshot
from gemma_mlx.errors import InputError, SourceError

TABLE = "p.ds.clips"
ROWS = 95


def clips(n=ROWS):
    return pa.table({"id": pa.array(range(n)), "text": [f"row {i}" for i in range(n)]})


@pytest.fixture(scope="module")
def server():
    with fake_bigquery.serving() as fake:
        yield fake


@pytest.fixture
def bq(server, monkeypatch):
    """The server with one table and no faults, found by the client libraries."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setattr(bigquery_read, "PATIENCE_S", 1.0)
    server.forget()
    server.tables, server.queries, server.faults, server.batch_rows = {TABLE: Table(clips())}, {}, Faults(), 10
    return server


def ids(path):
    return pq.read_table(path)["id"].to_pylist()


def refused(source, folder, error=InputError):
    """The one line that a source is refused with; nothing may be left in the folder."""
    with pytest.raises(InputError) as caught:
        snapshot(source, folder)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message and message.startswith("bq://")
    assert not [file for file in folder.glob("*") if not file.name.endswith(".lock")]
    return message


# what a source means


@pytest.mark.parametrize(
    "source, project, table, query",
    [
        ("bq://p.ds.t", "", ("p", "ds", "t"), ""),
        ("bq://`p.ds.t`", "", ("p", "ds", "t"), ""),
        ("bq://example.com:p.ds.t", "", ("example.com:p", "ds", "t"), ""),
        ("bq://payer/p.ds.t_*", "payer", ("p", "ds", "t_*"), ""),
        ("bq://with-love.ds.from", "", ("with-love", "ds", "from"), ""),
        ("bq://from-a/SELECT 1", "from-a", None, "SELECT 1"),
        ("bq://SELECT a/b FROM ds.t;\n", "", None, "SELECT a/b FROM ds.t"),
        ("bq://select/**/1", "", None, "select/**/1"),
        ("bq://payer/-- all\nWITH a AS (SELECT 1) SELECT * FROM a", "payer", None, None),
        ("bq://(SELECT 1)", "", None, "(SELECT 1)"),
        ("bq://FROM ds.t |> WHERE a", "", None, "FROM ds.t |> WHERE a"),
    ],
)
def test_a_source_is_a_table_or_a_query_and_may_name_who_pays(source, project, table, query):
    parsed = parse(source)
    assert (parsed.project, parsed.table) == (project, table)
    assert parsed.query == query or query is None
    assert parsed.sql == parsed.query or parsed.sql == f"SELECT * FROM `{'.'.join(table)}`"


@pytest.mark.parametrize(
    "source, told",
    [
        ("bq://", "names no table"),
        ("bq://ds.t", "names no table"),
        ("bq://p..t", "names no table"),
        ("bq://p/SELECT", "names no table"),
        ("bq://DROP TABLE ds.t", "'DROP' does not begin a query"),
        ("bq://p/DELETE FROM ds.t WHERE TRUE", "'DELETE' does not begin a query"),
        ("bq://p.ds.t$20240101", "$ and @"),
        ("bq://p.ds.t@-3600", "$ and @"),
        ("gs://p/x", "not a BigQuery source"),
    ],
)
def test_what_is_neither_is_refused_with_the_syntax(source, told):
    with pytest.raises(InputError, match=r"^\S.*: ") as caught:
        parse(source)
    assert told in str(caught.value) and (
        "write bq" in str(caught.value).lower() or "write a query" in str(caught.value)
    )


def test_a_long_query_is_short_in_messages():
    parsed = parse("bq://SELECT " + ",\n".join(f"column_{i}" for i in range(900)) + " FROM ds.t")
    assert len(parsed.name) <= 90 and "\n" not in parsed.name and parsed.name.startswith("bq://SELECT column_0")


# snapshots


def test_a_table_is_read_once(bq, tmp_path):
    path = snapshot(f"bq://{TABLE}", tmp_path / "new" / "folder")
    assert sorted(ids(path)) == list(range(ROWS))
    assert path.name.startswith(f"{TABLE}-") and path.suffix == ".parquet"
    told = json.loads(pq.read_schema(path).metadata[b"gemma_mlx.source"])
    assert told["source"] == f"bq://{TABLE}" and told["state"][0][0] == TABLE
    assert bq.sessions[0].parent == "projects/p" and not bq.ran()
    bq.forget()
    bytes_before = path.read_bytes()
    assert snapshot(f"bq://{TABLE}", path.parent) == path and path.read_bytes() == bytes_before
    assert not bq.sessions and not bq.reads
    assert snapshot(f"bq://payer/{TABLE}", path.parent) == path  # who pays changes no row


def test_a_changed_table_is_read_anew_and_the_old_snapshot_stays(bq, tmp_path):
    old = snapshot(f"bq://{TABLE}", tmp_path)
    bq.tables[TABLE] = Table(clips(20), etag="2")
    new = snapshot(f"bq://{TABLE}", tmp_path)
    assert (len(ids(old)), len(ids(new))) == (ROWS, 20) and old != new


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_streams_are_joined_in_their_order(bq, tmp_path, streams):
    got = ids(snapshot(f"bq://{TABLE}", tmp_path, streams=streams))
    assert len({name for name, _ in bq.reads}) == streams
    start = got[0]
    assert got == [(start + i) % ROWS for i in range(ROWS)]  # the server's order in this session


def test_a_query_is_run_once_and_noticed_when_its_tables_change(bq, tmp_path):
    text = "SELECT id FROM ds.clips WHERE id < 9"
    bq.tables["p.anon.r1"] = Table(clips(9))
    bq.queries[text] = Query("p.anon.r1", (TABLE,))
    path = snapshot(f"bq://payer/{text}", tmp_path)
    assert sorted(ids(path)) == list(range(9)) and bq.ran() == 1
    assert bq.sessions[0].parent == "projects/payer"
    assert snapshot(f"bq://payer/{text}", tmp_path) == path and bq.ran() == 1 and len(bq.sessions) == 1
    bq.tables[TABLE].etag = "2"
    assert snapshot(f"bq://payer/{text}", tmp_path) != path and bq.ran() == 2


def test_a_query_whose_tables_may_not_be_looked_at_is_found_again(bq, tmp_path):
    bq.tables["p.secret.t"] = Table(clips(), error=(403, "accessDenied", "Access Denied: Table p:secret.t"))
    bq.queries["SELECT 1"] = Query(TABLE, ("p.secret.t",))
    path = snapshot("bq://p/SELECT 1", tmp_path)
    assert snapshot("bq://p/SELECT 1", tmp_path) == path and bq.ran() == 1


def test_an_ordered_query_is_one_stream(bq, tmp_path):
    text = "SELECT id FROM ds.clips\norder  BY id"
    bq.queries[text] = Query(TABLE)
    assert ids(snapshot(f"bq://p/{text}", tmp_path)) == list(range(ROWS))
    assert [session.max_stream_count for session in bq.sessions] == [1]


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED_VIEW", "EXTERNAL"])
def test_a_view_is_read_by_a_query(bq, tmp_path, kind):
    bq.tables["p.ds.v"] = Table(clips(0), kind=kind)
    bq.queries["SELECT * FROM `p.ds.v`"] = Query(TABLE, (TABLE,))
    path = snapshot("bq://p.ds.v", tmp_path)
    assert sorted(ids(path)) == list(range(ROWS)) and bq.ran() == 1
    assert snapshot("bq://p.ds.v", tmp_path) == path and bq.ran() == 1
    bq.tables["p.ds.v"].etag = "2"  # another definition
    assert snapshot("bq://p.ds.v", tmp_path) != path


def test_a_wildcard_is_read_by_a_query(bq, tmp_path):
    bq.queries["SELECT * FROM `p.ds.clips_*`"] = Query(TABLE, (TABLE,))
    assert sorted(ids(snapshot("bq://p.ds.clips_*", tmp_path))) == list(range(ROWS))
    assert f"table {TABLE}" in bq.asked and "table p.ds.clips_*" not in bq.asked


def test_values_that_parquet_or_rows_lack_are_text(bq, tmp_path):
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678900, tzinfo=datetime.UTC)
    exact, exact_type = decimal.Decimal, pa.decimal128(38, 9)
    record = pa.struct([("at", pa.list_(pa.timestamp("us", "UTC"))), ("cost", exact_type), ("raw", pa.binary())])
    bq.tables[TABLE].rows = pa.table(
        {
            "ts": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "dt": pa.array([moment.replace(tzinfo=None), None], pa.timestamp("us")),
            "day": pa.array([moment.date(), None]),
            "time": pa.array([moment.time(), None], pa.time64("us")),
            "num": pa.array([exact("0.000000001"), exact("120")], exact_type),
            "big": pa.array([exact("-1e-38"), exact("12.50")], pa.decimal256(76, 38)),
            "tags": pa.array([["a", "b"], []], pa.list_(pa.string())),
            "raw": pa.array([b"\x00\xff", None], pa.binary()),
            "rec": pa.array([{"at": [moment], "cost": exact("1.5"), "raw": b"\xfe"}, None], record),
            "prices": pa.array([[exact("3"), exact("0.25")], []], pa.list_(exact_type)),
            "n": pa.array([2**62, None], pa.int64()),
            "x": pa.array([0.1, None], pa.float64()),
            "yes": pa.array([True, None], pa.bool_()),
        }
    )
    first, second = pq.read_table(snapshot(f"bq://{TABLE}", tmp_path, streams=1)).to_pylist()
    assert first == {
        "ts": "2024-01-02 03:04:05.678900Z", "dt": "2024-01-02 03:04:05.678900", "day": "2024-01-02",
        "time": "03:04:05.678900", "num": "0.000000001", "big": "-0." + "0" * 37 + "1", "tags": ["a", "b"],
        "raw": b"\x00\xff", "rec": {"at": ["2024-01-02 03:04:05.678900Z"], "cost": "1.5", "raw": b"\xfe"},
        "prices": ["3", "0.25"], "n": 2**62, "x": 0.1, "yes": True,
    }  # fmt: skip
    empty = {"num": "120", "big": "12.5", "tags": [], "prices": []}
    assert second == {name: empty.get(name) for name in first}


def test_a_column_without_a_text_form_is_named(bq, tmp_path):
    bq.tables[TABLE].rows = pa.table({"gap": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    assert "column 'gap'" in (told := refused(f"bq://{TABLE}", tmp_path)) and "CAST(gap AS STRING)" in told


def test_row_groups_are_bounded_by_rows_and_by_bytes(bq, tmp_path, monkeypatch):
    monkeypatch.setattr(bigquery_read, "GROUP_ROWS", 30)
    groups = pq.ParquetFile(snapshot(f"bq://{TABLE}", tmp_path, streams=1)).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [30, 30, 30, 5]
    monkeypatch.setattr(bigquery_read, "GROUP_BYTES", 200)  # a batch has 10 x (8 + 4 + 5) bytes and some
    groups = pq.ParquetFile(snapshot(f"bq://{TABLE}", tmp_path / "2", streams=1)).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [20, 20, 20, 20, 15]


def test_progress_counts_rows_up_to_the_expected_number(bq, tmp_path):
    seen = []
    snapshot(f"bq://{TABLE}", tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [ROWS] * len(seen) and seen[-1][0] == ROWS
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_come_through_the_tables_door(bq, tmp_path, monkeypatch):
    from gemma_mlx.data.sources.opening import open_table

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    bq.queries["SELECT 1 ORDER BY 1"] = Query(TABLE)
    table = open_table("bq://p/SELECT 1 ORDER BY 1")
    assert len(table) == ROWS and [table[i].values["text"] for i in (0, 94)] == ["row 0", "row 94"]
    assert open_table("bq://p/SELECT 1 ORDER BY 1").fingerprint() == table.fingerprint() and bq.ran() == 1


# faults


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED"])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_broken_stream_goes_on_from_its_row(bq, tmp_path, code, streams):
    bq.faults = Faults(break_after=2, broken=1, code=grpc.StatusCode[code])
    got = ids(snapshot(f"bq://{TABLE}", tmp_path, streams=streams))
    assert got == [(got[0] + i) % ROWS for i in range(ROWS)]
    assert len(bq.sessions) == 1 and {offset for _, offset in bq.reads} >= {0, 20}


def test_a_stream_that_breaks_often_but_goes_on_is_read_to_its_end(bq, tmp_path, monkeypatch):
    monkeypatch.setattr(bigquery_read, "PATIENCE_S", 0.25)
    bq.faults = Faults(break_after=1)
    assert ids(snapshot(f"bq://{TABLE}", tmp_path, streams=1)) == list(range(ROWS))
    assert [offset for _, offset in bq.reads] == list(range(0, ROWS, 10))


def test_a_stalled_stream_is_asked_again(bq, tmp_path, monkeypatch):
    monkeypatch.setattr(bigquery_read, "STALL_S", 0.3)
    bq.faults = Faults(stalls=1)
    assert ids(snapshot(f"bq://{TABLE}", tmp_path, streams=1)) == list(range(ROWS))
    assert [offset for _, offset in bq.reads] == [0, 10]


@pytest.mark.parametrize("streams", [1, 3])
def test_an_expired_session_begins_anew_with_no_row_twice(bq, tmp_path, streams):
    bq.faults = Faults(expired=2)
    got = ids(snapshot(f"bq://{TABLE}", tmp_path, streams=streams))
    assert got == [(got[0] + i) % ROWS for i in range(ROWS)] and len(bq.sessions) == 3


def test_sessions_that_always_expire_are_a_failed_source(bq, tmp_path):
    bq.faults = Faults(expired=99)
    assert "expired 3 times" in refused(f"bq://{TABLE}", tmp_path, SourceError)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_stream_that_stays_broken_is_a_failed_source(bq, tmp_path, monkeypatch, streams):
    monkeypatch.setattr(bigquery_read, "PATIENCE_S", 0.2)
    bq.faults = Faults(broken=-1)
    with pytest.raises(SourceError, match=r"stops answering after row 0 of a stream \(503 connection torn\)|torn"):
        snapshot(f"bq://{TABLE}", tmp_path, streams=streams)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_a_session_that_is_refused_for_a_moment_is_asked_for_again(bq, tmp_path):
    bq.faults = Faults(session=(grpc.StatusCode.UNAVAILABLE, "busy"), sessions=1)
    assert len(ids(snapshot(f"bq://{TABLE}", tmp_path))) == ROWS and len(bq.sessions) == 2


def test_rest_calls_are_retried_and_then_given_up(bq, tmp_path, monkeypatch):
    bq.faults = Faults(rest=1)
    assert len(ids(snapshot(f"bq://{TABLE}", tmp_path / "a"))) == ROWS
    monkeypatch.setattr(bigquery_read, "PATIENCE_S", 0.1)
    bq.faults = Faults(rest=1 << 30)
    assert "does not answer (Service unavailable)" in refused(f"bq://{TABLE}", tmp_path / "b", SourceError)


def test_missing_rows_of_a_result_are_noticed(bq, tmp_path):
    bq.queries["SELECT 1"] = Query(TABLE, total=ROWS + 1)
    assert f"{ROWS} rows came of {ROWS + 1}" in refused("bq://p/SELECT 1", tmp_path, SourceError)


def test_a_server_that_is_not_there(bq, tmp_path, monkeypatch):
    monkeypatch.setattr(bigquery_read, "PATIENCE_S", 0.1)
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", "127.0.0.1:9")
    assert "does not answer" in refused(f"bq://{TABLE}", tmp_path, SourceError)


# refusals


@pytest.mark.parametrize(
    "status, reason, message, told, error",
    [
        (404, "notFound", "Not found: Dataset p:ds", "Not found: Dataset p:ds; check the names", InputError),
        (
            403,
            "accessDenied",
            "Access Denied: Table p:ds.clips: ...",
            "needs the roles bigquery.dataViewer",
            InputError,
        ),
        (403, "quotaExceeded", "Quota exceeded: too many reads", "does not answer (Quota exceeded", SourceError),
        (401, "authError", "Request had invalid credentials", "gcloud auth application-default login", InputError),
        (400, "invalid", "Invalid table ID", "refuses it: Invalid table ID", InputError),
    ],
)
def test_a_refused_table(bq, tmp_path, status, reason, message, told, error):
    bq.tables[TABLE].error = (status, reason, f"{message}\n\nLocation: US\nJob ID: 1")
    assert told in refused(f"bq://{TABLE}", tmp_path, error)


def test_refused_queries(bq, tmp_path):
    bq.queries |= {
        "SELECT nope": Query(error=(400, "invalidQuery", "Unrecognized name: nope at [1:8]")),
        "SELECT 1; DROP TABLE ds.t": Query(statement="SCRIPT"),
        "SELECT big": Query(TABLE, job_error=("responseTooLarge", "Response too large to return.")),
        "SELECT denied": Query(TABLE, job_error=("accessDenied", "Access Denied: Table p:ds.clips")),
    }
    assert "Unrecognized name: nope at [1:8]" in refused("bq://p/SELECT nope", tmp_path)
    assert "the query is a SCRIPT" in refused("bq://p/SELECT 1; DROP TABLE ds.t", tmp_path)
    assert not bq.ran()
    assert "write the result to a table" in refused("bq://p/SELECT big", tmp_path)
    assert "needs the roles" in refused("bq://p/SELECT denied", tmp_path)


def test_a_refused_session(bq, tmp_path):
    why = "request failed: the user does not have 'bigquery.readsessions.create' permission for 'projects/p'"
    bq.faults = Faults(session=(grpc.StatusCode.PERMISSION_DENIED, why))
    assert "bigquery.readSessionUser" in (told := refused(f"bq://{TABLE}", tmp_path)) and why in told


def test_no_rows(bq, tmp_path):
    bq.tables[TABLE].rows = clips(0)
    assert "no rows" in refused(f"bq://{TABLE}", tmp_path)
    bq.queries["SELECT 1 WHERE FALSE"] = Query(TABLE)
    assert "no rows" in refused("bq://p/SELECT 1 WHERE FALSE", tmp_path)


def test_no_project_to_bill(bq, tmp_path, monkeypatch):
    assert "no project to bill" in refused("bq://SELECT 1", tmp_path)
    bq.queries["SELECT 1"] = Query(TABLE)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "mine")
    snapshot("bq://SELECT 1", tmp_path)
    assert bq.sessions[0].parent == "projects/mine"


def test_half_an_emulator_is_refused_before_anything_leaves_the_machine(bq, tmp_path, monkeypatch):
    monkeypatch.delenv("BIGQUERY_STORAGE_EMULATOR_HOST")
    assert "set BIGQUERY_STORAGE_EMULATOR_HOST" in refused(f"bq://{TABLE}", tmp_path)
    assert not bq.asked


def test_no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    told = refused(f"bq://{TABLE}", tmp_path)
    assert "no Google credentials (File" in told and "none.json" in told and "gcloud auth application-default" in told


def test_the_channel_to_the_service_can_be_made(monkeypatch):
    """Without a connection: that the client library takes the channel's options."""
    from types import SimpleNamespace

    from google.oauth2.credentials import Credentials

    monkeypatch.delenv("BIGQUERY_STORAGE_EMULATOR_HOST", raising=False)
    transport = bigquery_read._storage(SimpleNamespace(_credentials=Credentials("token")))
    assert "read_rows" in dir(transport)
    transport.close()


def test_the_extra_is_named_where_the_client_is_missing(monkeypatch, tmp_path):
    monkeypatch.delattr("google.cloud.bigquery_storage_v1")
    monkeypatch.setitem(sys.modules, "google.cloud.bigquery_storage_v1", None)
    assert "pip install 'gemma-mlx[bigquery]'" in refused(f"bq://{TABLE}", tmp_path)


def test_a_folder_that_cannot_be(bq, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"snapshot cannot be written to .*file.sub \(Not a directory\)"):
        snapshot(f"bq://{TABLE}", tmp_path / "file" / "sub")


def test_a_full_disk_is_no_bad_row(bq, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert "cannot be written ([Errno 28] No space left" in refused(f"bq://{TABLE}", tmp_path, SourceError)


def test_threads_that_ask_at_once_read_once(bq, tmp_path):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(snapshot(f"bq://{TABLE}", tmp_path))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(paths)) == 1 and len(paths) == 4 and len(bq.sessions) == 1
    assert sorted(ids(paths[0])) == list(range(ROWS))


_MEASURED = """
import sys, threading, time
from pathlib import Path
import psutil
from google.cloud import bigquery, bigquery_storage_v1
import pyarrow.parquet
from gemma_mlx.data.sources.bigquery import snapshot
process = psutil.Process()
before = peak = process.memory_info().rss
def watch():  # a child's ru_maxrss begins with its parent's
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
path = snapshot(sys.argv[1], Path(sys.argv[2]), streams=int(sys.argv[3]))
print(peak - before, path)
"""


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4])
def test_memory_does_not_grow_with_the_table(bq, tmp_path, streams):
    rows = 600_000
    bq.batch_rows = 4000
    text = pa.array([f"{i:0>1000}" for i in range(rows)])
    bq.tables[TABLE].rows = pa.table({"id": pa.array(range(rows)), "text": text})
    command = [sys.executable, "-c", _MEASURED, f"bq://{TABLE}", str(tmp_path), str(streams)]
    out = subprocess.run(command, env=os.environ | bq.environment, capture_output=True, text=True, check=True).stdout
    grown, path = out.split()
    print(f"{streams} streams: {text.nbytes >> 20} MB of rows, {int(grown) >> 20} MB more memory at most")
    assert 16 < int(grown) >> 20 < 300 < text.nbytes >> 20
    assert sorted(ids(path)) == list(range(rows))


# an emulator with its own SQL, types and errors


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator with a few tables; its environment."""
    if not local_bigquery.READY.exists():
        pytest.skip("local-bigquery is not installed: python tests/data/tables/local_bigquery.py")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery

    with local_bigquery.running(tmp_path_factory.mktemp("bigquery")) as environment:
        options = {"api_endpoint": environment["BIGQUERY_EMULATOR_HOST"]}
        client = bigquery.Client("local", AnonymousCredentials(), client_options=options)
        for statement in _STATEMENTS:
            client.query_and_wait(statement)
        yield environment, client
        client.close()


_STATEMENTS = (
    "CREATE SCHEMA ds",
    "CREATE TABLE ds.clips AS SELECT n AS id, CONCAT('row ', CAST(n AS STRING)) AS text "
    "FROM UNNEST(GENERATE_ARRAY(0, 249999)) AS n",
    "CREATE VIEW ds.few AS SELECT * FROM ds.clips WHERE id < 10",
    "CREATE TABLE ds.day_1 AS SELECT 1 AS id",
    "CREATE TABLE ds.day_2 AS SELECT 2 AS id",
    "CREATE TABLE ds.empty (id INT64)",
    "CREATE TABLE ds.kinds AS SELECT TIMESTAMP '2024-01-02 03:04:05.5+00' AS ts, DATETIME '2024-01-02 03:04:05' AS dt, "
    "DATE '2024-01-02' AS day, TIME '03:04:05' AS time, NUMERIC '1.50' AS num, FROM_BASE64('AP8=') AS raw, "
    "['a', 'b'] AS tags, STRUCT(1 AS a, [TIMESTAMP '2024-01-02 03:04:05+00'] AS at) AS rec, TRUE AS yes, 0.5 AS x, "
    """JSON '{"a": [1]}' AS j, INTERVAL 1 DAY AS gap, CAST(NULL AS STRING) AS nothing""",
)


@pytest.fixture
def emulated(emulator, monkeypatch):
    environment, client = emulator
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "local")
    return client


def test_emulated_table_view_wildcard_and_query(emulated, tmp_path):
    table = snapshot("bq://local.ds.clips", tmp_path)
    assert sorted(ids(table)) == list(range(250_000)) and pq.ParquetFile(table).num_row_groups >= 5
    assert pq.read_table(table)["text"][7].as_py() == f"row {ids(table)[7]}"
    assert snapshot("bq://local.ds.clips", tmp_path) == table
    assert sorted(ids(snapshot("bq://local.ds.few", tmp_path))) == list(range(10))
    assert sorted(ids(snapshot("bq://local.ds.day_*", tmp_path))) == [1, 2]
    ordered = ids(snapshot("bq://SELECT id FROM ds.clips WHERE MOD(id, 2) = 0 ORDER BY id DESC", tmp_path))
    assert ordered == list(range(249_998, -1, -2))


def test_emulated_changes_are_noticed(emulated, tmp_path):
    emulated.query_and_wait("CREATE OR REPLACE TABLE ds.grows AS SELECT 1 AS id")
    sources = ("bq://local.ds.grows", "bq://SELECT id FROM ds.grows")
    old = [snapshot(source, tmp_path) for source in sources]
    emulated.query_and_wait("INSERT INTO ds.grows VALUES (2)")
    new = [snapshot(source, tmp_path) for source in sources]
    assert [ids(path) for path in old] == [[1], [1]] and [sorted(ids(path)) for path in new] == [[1, 2], [1, 2]]


def test_emulated_values(emulated, tmp_path):
    (row,) = pq.read_table(snapshot("bq://local.ds.kinds", tmp_path)).to_pylist()
    assert row == {
        "ts": "2024-01-02 03:04:05.500000Z", "dt": "2024-01-02 03:04:05.000000", "day": "2024-01-02",
        "time": "03:04:05.000000", "num": "1.5", "raw": b"\x00\xff", "tags": ["a", "b"],
        "rec": {"a": 1, "at": ["2024-01-02 03:04:05.000000Z"]}, "yes": True, "x": 0.5, "j": '{"a":[1]}',
        "gap": row["gap"], "nothing": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "source, told",
    [
        ("bq://local.ds.nope", "Not found: Table local:ds.nope"),
        ("bq://local.none.t", "Not found: Table local:none.t"),
        ("bq://local.ds.empty", "no rows"),
        ("bq://SELECT * FROM ds.clips WHERE id < 0", "no rows"),
        ("bq://SELECT * FROM ds.nope", "Not found: Table local:ds.nope"),
        ("bq://SELECT nope FROM ds.clips", "Unrecognized name: nope"),
        ("bq://SELECT (1", "Syntax error"),
        ("bq://SELECT 1; DROP TABLE ds.clips", "the query is a SCRIPT"),
    ],
)
def test_emulated_refusals(emulated, tmp_path, source, told):
    assert told in refused(source, tmp_path)
    assert emulated.get_table("local.ds.clips").num_rows == 250_000
