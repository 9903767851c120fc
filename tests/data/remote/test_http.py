"""Objects over HTTP, against servers of this machine that are as poor and as broken as servers are."""

import contextlib
import hashlib
import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest
from servers import Fault, FaultProxy, FileServer

from gemma_mlx.data.remote.http import HttpStore
from gemma_mlx.data.remote.retry import RetryPolicy
from gemma_mlx.data.remote.stores import Stat, Store, store_of
from gemma_mlx.errors import InputError, SourceError

SIZE = 1_500_007
POOR = {
    "good": {},
    "no ranges": {"no_ranges": True},
    "no HEAD 403": {"no_head": 403},
    "no HEAD 405": {"no_head": 405},
    "no HEAD 501": {"no_head": 501},
    "weak ETags": {"weak_etags": True},
    "dates only": {"no_etag": True},
    "no versions": {"no_etag": True, "no_dates": True},
    "no lengths": {"no_lengths": True},
    "no lengths, dates only": {"no_lengths": True, "no_etag": True},
    "no lengths, ranges or HEAD": {"no_lengths": True, "no_ranges": True, "no_head": 405},
    "no preconditions": {"no_preconditions": True},
    "nothing": {"no_ranges": True, "no_head": 403, "no_etag": True, "no_dates": True, "no_lengths": True},
}


def breaks():
    return [Fault("reset", after=400_000, method="GET"), Fault("truncate", after=300_000, method="GET")]


@pytest.fixture
def data(folder):
    data = random.Random(3).randbytes(SIZE)
    (folder / "clip.bin").write_bytes(data)
    return data


@pytest.fixture
def store(broken_web, web, quick):
    return HttpStore([broken_web.address, web.address], quick)


def joined(chunks):
    return b"".join(chunks)


def refusal(call, kind=InputError):
    with pytest.raises(InputError) as caught:
        call()
    assert issubclass(caught.type, kind) and issubclass(kind, SourceError) == issubclass(caught.type, SourceError)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_store_keeps_the_contract(store, broken_web, data):
    url = broken_web.url + "/clip.bin"
    stat = store.stat(url)
    assert stat.size == SIZE and stat.version.startswith("ETag ")
    chunks = list(store.read(url, stat))
    assert joined(chunks) == data and max(map(len, chunks)) <= 1 << 20
    protocol: Store = store_of(url, [broken_web.address])
    assert protocol is store_of(broken_web.url + "/other", (broken_web.address,))
    assert protocol.stat(url) == stat
    assert "cannot be listed" in refusal(lambda: list(store.list(broken_web.url + "/")))


@pytest.mark.parametrize("poor", POOR.values(), ids=POOR)
def test_any_server_and_any_break_give_the_same_bytes(poor, folder, data, quick):
    """Each broken body is asked for again from where it broke, where the server can do that."""
    with FileServer(folder, **poor) as server, FaultProxy(server.address) as proxy:
        store, url = HttpStore([proxy.address], quick), proxy.url + "/clip.bin"
        stat = store.stat(url)
        assert stat.size == (SIZE if stat.size is not None else None)
        for pinned in (stat, None):
            proxy.forget()
            proxy.inject(*breaks(), Fault("status", method="GET"))
            assert joined(store.read(url, pinned)) == data
            assert not proxy.pending()
            if not poor.get("no_ranges"):
                assert proxy.media_bytes() <= SIZE + 2 * (1 << 16)
        proxy.inject(*breaks())
        assert joined(store.read(url, stat, 17, SIZE - 3)) == data[17 : SIZE - 3]


@pytest.mark.parametrize("poor", [{}, {"no_ranges": True}, {"no_lengths": True}], ids=str)
def test_stretches(poor, folder, data, quick):
    short = data[:1000]
    (folder / "short").write_bytes(short)
    (folder / "empty").write_bytes(b"")
    with FileServer(folder, **poor) as server:
        store, url = HttpStore([server.address], quick), server.url + "/short"
        stat = store.stat(url)
        draw = random.Random(5)
        for _ in range(40):
            start, end = draw.randrange(1100), draw.choice([None, draw.randrange(1100)])
            assert joined(store.read(url, draw.choice([stat, None]), start, end)) == short[start:end]
        assert joined(store.read(server.url + "/empty")) == joined(store.read(server.url + "/empty", None, 0, 9)) == b""
        assert store.stat(server.url + "/empty").size == 0


def test_the_read_goes_on_from_the_broken_byte(store, broken_web, data):
    url = broken_web.url + "/clip.bin"
    broken_web.inject(Fault("truncate", after=1_000_000), Fault("status", status=503), Fault("status", status=429))
    assert joined(store.read(url)) == data
    ranges = [asked.headers.get("range") for asked in broken_web.requests(method="GET")]
    start = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert ranges[0] is None and 1_000_000 - (1 << 16) <= start <= 1_000_000
    assert ranges[2] == ranges[3] == ranges[1]
    assert [asked.headers.get("if-match") is None for asked in broken_web.requests()] == [True, False, False, False]


def test_a_slow_and_a_silent_server(store, broken_web, folder, quick):
    (folder / "a").write_bytes(bytes(range(256)) * 200)
    broken_web.inject(Fault("hang", seconds=1), Fault("slow", rate=100_000))
    assert joined(store.read(broken_web.url + "/a")) == bytes(range(256)) * 200
    assert [asked.status for asked in broken_web.requests()] == [0, 200]


@pytest.mark.parametrize("poor", ["good", "weak ETags", "dates only", "no versions", "no preconditions", "no lengths"])
@pytest.mark.parametrize("midway", [False, True])
def test_a_changed_object_is_noticed(poor, midway, folder, data, quick):
    with FileServer(folder, **POOR[poor]) as server, FaultProxy(server.address) as proxy:
        store, url, file = HttpStore([proxy.address], quick), proxy.url + "/clip.bin", folder / "clip.bin"
        stat = store.stat(url)
        chunks = store.read(url, stat)
        if midway:
            proxy.inject(Fault("truncate", after=500_000))
            next(chunks)
        other = data + b"x" if poor == "no versions" else data[::-1]
        file.write_bytes(other)
        os.utime(file, (1e9, 1e9))
        message = refusal(lambda: joined(chunks), SourceError)
        assert message.startswith(f"{url} changed during the run (") and "before, now" in message
        assert stat.version in message and "now gone" not in message
        if poor != "no versions":
            assert store.stat(url).version in message


def test_an_object_that_vanishes_is_the_sources_fault(store, web, data, folder):
    stat = store.stat(web.url + "/clip.bin")
    (folder / "clip.bin").unlink()
    message = refusal(lambda: joined(store.read(web.url + "/clip.bin", stat)), SourceError)
    assert message.startswith(web.url + "/clip.bin") and "404" in message


def test_missing_and_forbidden_objects(store, web, broken_web):
    url = web.url + "/nothing.flac"
    for call in (lambda: store.stat(url), lambda: joined(store.read(url))):
        assert refusal(call) == f"{url}: no such object (HTTP 404); check the URL"
    web.statuses |= {"/secret": 403, "/odd": 418, "/own": 501}
    assert "no permission (HTTP 403)" in refusal(lambda: store.stat(web.url + "/secret"))
    assert "HTTP 418" in refusal(lambda: store.stat(web.url + "/odd"))
    assert "HTTP 501" in refusal(lambda: joined(store.read(web.url + "/own")), SourceError)
    assert len(web.requests("/own")) == len(web.requests("/odd")) == 1


def test_a_server_that_is_down_is_given_up(folder, quick):
    with FileServer(folder) as server:
        url, address = server.url + "/clip.bin", server.address
    start = time.monotonic()
    message = refusal(lambda: HttpStore([address], quick).stat(url), SourceError)
    assert message.startswith(url) and "Connection refused" in message and "tried 4 times" in message
    assert time.monotonic() - start < quick.total + 1


def test_a_server_that_keeps_failing_is_given_up(store, broken_web, data, quick):
    url = broken_web.url + "/clip.bin"
    stat = store.stat(url)
    reasons = {"status": "HTTP 502", "truncate": "the connection broke", "hang": "nothing arrived within 0.3 s"}
    for kind, reason in reasons.items():
        broken_web.heal()
        broken_web.inject(Fault(kind, times=99, status=502, seconds=1))
        start = time.monotonic()
        message = refusal(lambda: joined(store.read(url, stat)), SourceError)
        assert message.startswith(url) and reason in message and "tried 6 times" in message
        assert time.monotonic() - start < quick.attempts * quick.read_timeout + 1


def test_a_server_that_breaks_at_every_step_does_not_hold_us(store, broken_web, data):
    """Progress of less than 1 MiB does not buy new attempts."""
    broken_web.inject(Fault("truncate", times=99, after=100_000))
    assert "tried 6 times" in refusal(lambda: joined(store.read(broken_web.url + "/clip.bin")), SourceError)


def test_waits_grow_vary_and_end(monkeypatch, broken_web, data):
    waits, now = [], [1000.0]
    monkeypatch.setattr("gemma_mlx.data.remote.retry.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "gemma_mlx.data.remote.retry.time.sleep", lambda s: (waits.append(s), now.__setitem__(0, now[0] + s))
    )
    url, policy = broken_web.url + "/clip.bin", RetryPolicy(attempts=40, first_wait=1, longest_wait=16, total=200)
    store = HttpStore([broken_web.address], policy)
    stat = store.stat(url)
    broken_web.inject(Fault("status", times=99))
    refusal(lambda: joined(store.read(url, stat)), SourceError)
    for wait, most in zip(waits, [1, 2, 4, 8, *itertools.repeat(16, len(waits) - 4)], strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits)) == len(waits) and sum(waits) <= 200 and len(waits) < 39
    broken_web.heal()
    waits.clear()
    broken_web.inject(Fault("status", status=503, headers={"Retry-After": "7"}))
    broken_web.inject(Fault("status", status=429, headers={"Retry-After": "999"}))
    assert joined(store.read(url, stat)) == data
    assert waits == [7, 16]


def test_a_machine_that_stood_still_tries_again(monkeypatch, broken_web, data):
    now = itertools.count(0, 10_000)
    monkeypatch.setattr("gemma_mlx.data.remote.retry.time.monotonic", lambda: float(next(now)))
    broken_web.inject(Fault("status", times=3, method="GET"))
    store = HttpStore([broken_web.address], RetryPolicy(first_wait=0.001, longest_wait=0.001))
    assert joined(store.read(broken_web.url + "/clip.bin")) == data
    broken_web.inject(Fault("status", times=4, method="GET"))
    assert "tried 4 times" in refusal(lambda: joined(store.read(broken_web.url + "/clip.bin")), SourceError)


def test_redirects(store, web, data):
    web.redirects |= {
        "/a": "clip.bin",
        "/b": web.url + "/a",
        "/loop": "/loop",
        "/file": "file:///etc/passwd",
        "/no": "",
    }
    stat = store.stat(web.url + "/b")
    assert joined(store.read(web.url + "/b", stat)) == data
    assert "more than 5 redirects" in refusal(lambda: store.stat(web.url + "/loop"))
    assert len(web.requests("/loop")) == 6
    assert "redirected to file:///etc/passwd" in refusal(lambda: store.stat(web.url + "/file"))
    assert "redirected to nowhere" in refusal(lambda: store.stat(web.url + "/no"))


def test_names_beyond_ascii(store, web, folder, data):
    (folder / "ü 1%2.bin").write_bytes(b"u")
    web.redirects["/to"] = "/ü 1%252.bin".encode().decode("latin-1")  # as many servers write it
    for path in ("/ü 1%252.bin", "/%C3%BC%201%252.bin", "/to"):
        assert joined(store.read(web.url + path)) == b"u"


ANSWERS = {
    "nothing": b"",
    "no HTTP": b"\x16\x03\x01\x00\x02" * 20,
    "no end": b"HTTP/1.1 200 OK\r\nContent-Le",
    "odd length": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nabc",
    "other length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 9\r\n\r\nabc",
    "huge length": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabc",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    "long header": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "cut chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "other bytes": b"HTTP/1.1 206 OK\r\nContent-Length: 3\r\nContent-Range: bytes 2-4/4\r\n\r\nabc",
    "odd range": b"HTTP/1.1 206 OK\r\nContent-Length: 3\r\nContent-Range: bytes x-\xb2/" + b"9" * 5000 + b"\r\n\r\nabc",
    "refused range": b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n",
    "odd redirect": b"HTTP/1.1 302 Go\r\nContent-Length: 0\r\nLocation: http://[::1\x1b[31m\r\n\r\n",
    "odd status": b"HTTP/1.1 204 Gone\r\nContent-Length: 0\r\n\r\n",
    "odd version": b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: "\x1b[31m\xe9"\r\n\r\nabc',
}


SENSIBLE = {  # what can be made of some: the stat, the bytes from 1 on
    "no end": (Stat(None, ""), None),
    "odd length": (Stat(None, ""), None),
    "huge length": (Stat(None, ""), None),
    "other length": (Stat(None, ""), b"bc"),
    "bad chunks": (Stat(None, ""), None),
    "cut chunks": (Stat(None, ""), None),
    "other bytes": (Stat(4, ""), None),
    "odd range": (Stat(None, ""), None),
    "odd version": (Stat(4, "ETag sha256:" + hashlib.sha256('"\x1b[31m\xe9"'.encode()).hexdigest()), None),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_make_no_sense(name):
    """Whatever comes, no bytes are made up, and what is wrong is told in a line."""
    answer = ANSWERS[name]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    while b"\r\n\r\n" not in connection.recv(1 << 16):
                        pass
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    store = HttpStore([address], RetryPolicy(attempts=3, first_wait=0.001, longest_wait=0.001))
    url, expected = f"http://{address}/a", SENSIBLE.get(name, (None, None))
    for call, right in zip((lambda: store.stat(url), lambda: joined(store.read(url, None, 1))), expected, strict=True):
        if right is not None:
            assert call() == right
        else:
            with pytest.raises(InputError) as caught:
                call()
            message = str(caught.value)
            assert url in message and message.isprintable() and len(message) < 400
    listener.close()


def test_compressed_transfer_is_told_and_archives_are_read(folder, data, quick):
    (folder / "rows.jsonl.gz").write_bytes(data)
    with FileServer(folder, headers={"Content-Encoding": "gzip"}) as server:
        store = HttpStore([server.address], quick)
        assert "Content-Encoding: gzip" in refusal(lambda: store.stat(server.url + "/clip.bin"))
        assert "Content-Encoding: gzip" in refusal(lambda: joined(store.read(server.url + "/clip.bin")))
        assert joined(store.read(server.url + "/rows.jsonl.gz")) == data
        assert {asked.headers["accept-encoding"] for asked in server.asked} == {"identity"}


def test_many_threads_and_a_reader_that_leaves(store, broken_web, data):
    url = broken_web.url + "/clip.bin"
    left = store.read(url)
    next(left)
    left.close()
    got = {}
    broken_web.inject(*breaks(), *breaks())

    def work(i):
        got[i] = joined(store.read(url, None, i * 1000))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: data[i * 1000 :] for i in range(12)}


def test_connections_are_used_again(folder, data, quick):
    (folder / "small").write_bytes(b"abc")
    with FileServer(folder) as server:
        opened = []
        accept = server._http.get_request
        server._http.get_request = lambda: (opened.append(1), accept())[1]
        server.redirects["/moved"] = "/small"
        store = HttpStore([server.address], quick)
        for _ in range(5):
            stat = store.stat(server.url + "/moved")
            assert joined(store.read(server.url + "/moved", stat)) == b"abc"
            assert joined(store.read(server.url + "/clip.bin")) == data
    assert len(opened) == 1


def test_a_forked_process_has_its_own_connections(web, data):
    """Parent and child read at once through one store made before the fork."""
    code = f"""
import os, hashlib, sys
from gemma_mlx.data.remote.retry import RetryPolicy
from gemma_mlx.data.remote.stores import store_of
url = {web.url + "/clip.bin"!r}
store = store_of(url, [{web.address!r}], RetryPolicy(attempts=1))
store.stat(url)
child = os.fork()
digests = {{hashlib.sha256(b"".join(store.read(url))).hexdigest() for _ in range(20)}}
assert len(digests) == 1
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(digests.pop())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == hashlib.sha256(data).hexdigest(), done.stderr


def test_only_urls_of_known_schemes_have_a_store():
    for url in (
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://host/a",
        "data:text/plain,hallo",
        "a/b.wav",
        "s3://b/a",
    ):
        message = refusal(lambda url=url: store_of(url))
        assert "only https:// (http://) and gs:// URLs can" in message
    assert "hallo" not in refusal(lambda: store_of("data:text/plain,hallo"))
    assert store_of("HTTPS://host/a") is store_of("http://host/a")


def test_a_stat_may_know_nothing(store, web, data):
    assert joined(store.read(web.url + "/clip.bin", Stat(None, ""))) == data
    assert joined(store.read(web.url + "/clip.bin", Stat(SIZE, ""), SIZE + 5)) == b""


def test_a_body_of_another_length_than_promised(folder, data, quick):
    with FileServer(folder, no_lengths=True) as server:
        store, url = HttpStore([server.address], quick), server.url + "/clip.bin"
        message = refusal(lambda: joined(store.read(url, Stat(SIZE + 5, ""))), SourceError)
        assert message.startswith(url)
        message = refusal(lambda: joined(store.read(url, Stat(SIZE - 5, ""))), SourceError)
        assert message.startswith(f"{url} changed during the run ({SIZE - 5} bytes before, now more)")
