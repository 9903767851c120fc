"""A local server with BigQuery's two protocols, for the faults that no emulator gives.

What is simulated: the REST calls that the client library makes for a table and for a query (tables.get, jobs.insert,
jobs.get, jobs.getQueryResults) over HTTP, and the Storage Read API's CreateReadSession and ReadRows over gRPC, with
rows from pyarrow tables as serialized Arrow batches. SQL is not understood: a query is answered from a list. Error
bodies and statuses are written after BigQuery's documented ones and after its users' reports ("session expired at …"
with FAILED_PRECONDITION); no real BigQuery was reached or recorded. The client libraries are the real ones, end to end.

Rows of an unordered read come in another order in every session, as they may from the service, so that rows of two
sessions cannot be mixed without being noticed.
"""

import contextlib
import datetime
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pyarrow as pa
from google.cloud.bigquery_storage_v1 import types

SERVICE = "google.cloud.bigquery.storage.v1.BigQueryRead"


@dataclass
class Table:
    """Rows under a name ``project.dataset.table``; `etag` is to be changed with them."""

    rows: pa.Table
    etag: str = "1"
    kind: str = "TABLE"
    error: tuple[int, str, str] | None = None


@dataclass
class Query:
    """The answer to one text: the table that holds its rows, the tables that it reads, or (status, reason, message)."""

    result: str = ""
    reads: tuple[str, ...] = ()
    statement: str = "SELECT"
    error: tuple[int, str, str] | None = None
    job_error: tuple[str, str] | None = None
    total: int | None = None


@dataclass
class Faults:
    """What goes wrong; zeros and None for nothing.

    Attributes:
        rest: how many REST calls are answered with 503.
        session: what CreateReadSession fails with.
        sessions: how many times it fails so.
        break_after: batches after which each ReadRows call breaks.
        broken: how many ReadRows calls break before their first batch; -1 for all.
        code: what a broken stream fails with.
        expired: how many sessions expire, after their second batch.
        stalls: how many ReadRows calls stop talking after one batch.
    """

    rest: int = 0
    session: tuple[grpc.StatusCode, str] | None = None
    sessions: int = 1 << 30
    break_after: int = 0
    broken: int = 0
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    expired: int = 0
    stalls: int = 0


@dataclass
class FakeBigQuery:
    """Tables, answers to queries, what goes wrong, and what was asked."""

    tables: dict[str, Table] = field(default_factory=dict)
    queries: dict[str, Query] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    batch_rows: int = 10
    sessions: list[types.CreateReadSessionRequest] = field(default_factory=list)
    reads: list[tuple[str, int]] = field(default_factory=list)
    jobs: dict[str, Query] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    streams: dict[str, pa.Table] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self):
        """Count from nothing again."""
        self.sessions.clear(), self.reads.clear(), self.asked.clear()

    def ran(self):
        """Queries that were run, dry ones not counted."""
        return sum(line.startswith("query ") for line in self.asked)

    # REST

    def rest(self, method, path, body):
        """(status, JSON) of one REST call."""
        with self.lock:
            if self.faults.rest:
                self.faults.rest -= 1
                return refusal(503, "backendError", "Service unavailable")
        match method, path.strip("/").split("/")[2:]:
            case "GET", ["projects", project, "datasets", dataset, "tables", table]:
                return self.table(f"{project}.{dataset}.{table}")
            case "POST", ["projects", project, "jobs"]:
                return self.insert(project, body)
            case "GET", ["projects", project, ("jobs" | "queries") as what, job]:
                return self.job(project, job, what)
        return refusal(404, "notFound", f"Not found: {path}")

    def table(self, name):
        self.asked.append(f"table {name}")
        project, dataset, table = name.split(".")
        if name not in self.tables:
            return refusal(404, "notFound", f"Not found: Table {project}:{dataset}.{table}")
        found = self.tables[name]
        if found.error:
            return refusal(*found.error)
        return 200, {
            "kind": "bigquery#table", "id": f"{project}:{dataset}.{table}", "etag": found.etag, "type": found.kind,
            "tableReference": {"projectId": project, "datasetId": dataset, "tableId": table},
            "numRows": str(found.rows.num_rows), "lastModifiedTime": "1700000000000",
        }  # fmt: skip

    def insert(self, project, body):
        text, dry = body["configuration"]["query"]["query"], body["configuration"].get("dryRun", False)
        self.asked.append(f"{'dry' if dry else 'query'} {text}")
        answer = self.queries.get(text, Query(error=(400, "invalidQuery", "Syntax error: Unexpected text at [1:1]")))
        if answer.error:
            return refusal(*answer.error)
        job = body.get("jobReference", {}).get("jobId", f"job-{len(self.jobs)}")
        self.jobs[job] = answer
        return 200, self.resource(project, job, body["configuration"], answer)

    def resource(self, project, job, configuration, answer):
        if answer.result:
            configuration["query"]["destinationTable"] = reference(answer.result)
        statistics = {
            "statementType": answer.statement, "totalBytesProcessed": "0",
            "referencedTables": [reference(name) for name in answer.reads],
        }  # fmt: skip
        status = {"state": "DONE"}
        if answer.job_error and not configuration.get("dryRun"):
            status["errorResult"] = {"reason": answer.job_error[0], "message": answer.job_error[1]}
        return {
            "kind": "bigquery#job", "jobReference": {"projectId": project, "jobId": job, "location": "US"},
            "configuration": configuration, "status": status, "statistics": {"query": statistics},
        }  # fmt: skip

    def job(self, project, job, what):
        answer = self.jobs[job]
        if what == "jobs":
            return 200, self.resource(project, job, {"query": {}}, answer)
        total = self.tables[answer.result].rows.num_rows if answer.total is None else answer.total
        return 200, {
            "kind": "bigquery#getQueryResultsResponse", "jobComplete": True, "totalRows": str(total),
            "jobReference": {"projectId": project, "jobId": job, "location": "US"}, "schema": {"fields": []},
        }  # fmt: skip

    # Storage Read API

    def create_session(self, request, context):
        with self.lock:
            self.sessions.append(request)
            number = len(self.sessions)
            if self.faults.session and self.faults.sessions:
                self.faults.sessions -= 1
                context.abort(*self.faults.session)
        _, project, _, dataset, _, table = request.read_session.table.split("/")
        rows = self.tables[f"{project}.{dataset}.{table}"].rows
        count = min(request.max_stream_count, -(-rows.num_rows // self.batch_rows))
        if request.max_stream_count != 1 and rows.num_rows:
            cut = 7 * number % rows.num_rows
            rows = pa.concat_tables([rows.slice(cut), rows.slice(0, cut)]).combine_chunks()
        name = f"projects/{project}/locations/us/sessions/{number}"
        cuts = [rows.num_rows * i // count for i in range(count)] + [rows.num_rows] if count else []
        streams = {
            f"{name}/streams/{i}": rows.slice(start, end - start)
            for i, (start, end) in enumerate(itertools.pairwise(cuts))
        }
        self.streams.update(streams)
        return types.ReadSession(
            name=name, table=request.read_session.table, data_format=types.DataFormat.ARROW,
            arrow_schema=types.ArrowSchema(serialized_schema=rows.schema.serialize().to_pybytes()),
            streams=[types.ReadStream(name=stream) for stream in streams], estimated_row_count=rows.num_rows,
        )  # fmt: skip

    def read_rows(self, request, context):
        number = int(request.read_stream.split("/")[5])
        with self.lock:
            self.reads.append((request.read_stream, request.offset))
            expires = number <= self.faults.expired
            broken, self.faults.broken = self.faults.broken, max(self.faults.broken - 1, min(self.faults.broken, 0))
            stalls, self.faults.stalls = self.faults.stalls, max(self.faults.stalls - 1, 0)
        if broken:
            context.abort(self.faults.code, "connection torn")
        rows = self.streams[request.read_stream].slice(request.offset).combine_chunks()
        for i, batch in enumerate(rows.to_batches(max_chunksize=self.batch_rows)):
            if expires and i == 2:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"there was an error operating on '{request.read_stream}': session expired at "
                    f"{datetime.datetime.now(datetime.UTC).isoformat()}",
                )
            if self.faults.break_after and i == self.faults.break_after:
                context.abort(self.faults.code, "connection torn")
            if stalls and i == 1:
                time.sleep(2)
            yield types.ReadRowsResponse(
                row_count=batch.num_rows,
                arrow_record_batch=types.ArrowRecordBatch(serialized_record_batch=batch.serialize().to_pybytes()),
            )


def reference(name):
    project, dataset, table = name.split(".")
    return {"projectId": project, "datasetId": dataset, "tableId": table}


def refusal(status, reason, message):
    """An error in the form that BigQuery's REST API gives."""
    error = {"code": status, "message": message, "errors": [{"message": message, "domain": "global", "reason": reason}]}
    return status, {"error": error}


def _handler(fake):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, said = fake.rest(self.command, self.path.split("?")[0], body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

    return Handler


@contextlib.contextmanager
def serving():
    """A running `FakeBigQuery`; its `environment` names it to the client libraries."""
    fake = FakeBigQuery()
    rest = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    rest.daemon_threads = True
    threading.Thread(target=rest.serve_forever, args=(0.05,), daemon=True).start()
    read = grpc.server(ThreadPoolExecutor(16))
    create = grpc.unary_unary_rpc_method_handler(
        fake.create_session, types.CreateReadSessionRequest.deserialize, types.ReadSession.serialize
    )
    rows = grpc.unary_stream_rpc_method_handler(
        fake.read_rows, types.ReadRowsRequest.deserialize, types.ReadRowsResponse.serialize
    )
    handlers = {"CreateReadSession": create, "ReadRows": rows}
    read.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = read.add_insecure_port("127.0.0.1:0")
    read.start()
    fake.environment = {
        "BIGQUERY_EMULATOR_HOST": f"http://127.0.0.1:{rest.server_port}",
        "BIGQUERY_STORAGE_EMULATOR_HOST": f"127.0.0.1:{port}",
    }
    try:
        yield fake
    finally:
        read.stop(None)
        rest.shutdown()
        rest.server_close()
