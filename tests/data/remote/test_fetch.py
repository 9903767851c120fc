"""The fetcher over a store in memory that counts what it is asked."""

import io
import os
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
from cached import content, evict, fetchers, opened

from gemma_mlx.data.blob import Blob, Embedded
from gemma_mlx.data.remote import fetch
from gemma_mlx.data.remote.cache import PART
from gemma_mlx.data.remote.fetch import host_of, is_remote
from gemma_mlx.data.remote.stores import Stat
from gemma_mlx.errors import InputError, SourceError

CHUNK = 1000


class Memory:
    """A store whose objects are (version, bytes); it notes every request and how much was being read at a time."""

    def __init__(self, sizes=True, pause=0.0):
        self.objects, self.asked, self.sizes, self.pause = {}, [], sizes, pause
        self.lock, self.active, self.most, self.most_bytes = threading.Lock(), {}, 0, 0
        self.gate, self.fail_after = threading.Event(), None
        self.gate.set()

    def __call__(self, url, allowed_hosts=()):
        return self

    def put(self, url, data, version="1"):
        self.objects[url] = (version, data)
        return url

    def stat(self, url):
        self.asked.append(("stat", url))
        if url not in self.objects:
            raise InputError(f"{url}: no such object")
        version, data = self.objects[url]
        return Stat(len(data) if self.sizes else None, version)

    @contextmanager
    def counted(self, url, size):
        with self.lock:
            me = object()
            self.active[me] = size
            self.most = max(self.most, len(self.active))
            self.most_bytes = max(self.most_bytes, sum(self.active.values()))
        try:
            yield
        finally:
            with self.lock:
                del self.active[me]

    def read(self, url, stat=None, start=0, end=None):
        self.asked.append(("read", url, start, end))
        if url not in self.objects:
            raise InputError(f"{url}: no such object")
        version, data = self.objects[url]
        if stat is not None and stat.version and stat.version != version:
            raise SourceError(f"{url}: has version {version}, this run began with {stat.version}")
        stop = len(data) if end is None else end
        with self.counted(url, stop - start):
            for count, at in enumerate(range(start, stop, max(CHUNK, (stop - start) // 5))):
                assert self.gate.wait(20)
                if self.fail_after is not None and at - start >= self.fail_after:
                    raise SourceError(f"{url}: the server failed")
                time.sleep(self.pause if count < 3 else 0)
                yield data[at : min(at + max(CHUNK, (stop - start) // 5), stop)]

    def list(self, pattern):
        self.asked.append(("list", pattern))
        prefix = pattern.rstrip("*")
        yield from ((url, self.stat(url)) for url in sorted(self.objects) if url.startswith(prefix))

    def reads(self):
        return [asked[1] for asked in self.asked if asked[0] == "read"]

    def drained(self):
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def store():
    return Memory()


@pytest.fixture
def fetcher_of(tmp_path):
    with fetchers(tmp_path / "cache") as make:
        yield make


def waited(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


# One object.


def test_blob_asks_nothing_before_it_is_used(store, fetcher_of):
    fetcher = fetcher_of(store)
    blob = fetcher.blob(store.put("gs://b/f/A.FLAC", b"x" * 4000))
    assert isinstance(blob, Blob) and (blob.name, blob.suffix, str(blob)) == ("gs://b/f/A.FLAC", ".flac", blob.name)
    assert store.asked == []
    assert blob.size() == 4000 and store.drained() == [("stat", "gs://b/f/A.FLAC")]
    with blob.open() as file:
        assert file.read() == b"x" * 4000 and os.fstat(file.fileno()).st_size == 4000 and file.seek(3) == 3
    assert store.drained() == [("read", "gs://b/f/A.FLAC", 0, None)]
    for _ in range(3):
        assert opened(fetcher, "gs://b/f/A.FLAC") == b"x" * 4000 and blob.size() == 4000
    assert store.asked == []
    assert (fetcher.stats.objects, fetcher.stats.bytes, fetcher.stats.hits) == (1, 4000, 3)


def test_names_show_no_secrets(store, fetcher_of):
    blob = fetcher_of(store).blob("HTTPS://user:pass@h.example/a/b.wav?signature=abc.mp3")
    assert (blob.name, blob.suffix) == ("HTTPS://h.example/a/b.wav?…".replace("HTTPS", "https"), ".wav")
    with pytest.raises(InputError) as told:
        blob.open()
    assert blob.url.startswith("https://user:pass@")  # the store gets it whole
    del told


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/a", "a.wav", "", "gs://", "gs://b", "gs://b/", "https:///a", "gs://b/a\nb"]
)
def test_other_urls_are_refused_before_any_request(store, fetcher_of, url):
    fetcher = fetcher_of(store)
    for use in (fetcher.blob, fetcher.file, fetcher.list):
        with pytest.raises(InputError) as told:
            use(url)
        assert "\n" not in str(told.value)
    assert store.asked == []


def test_what_is_remote():
    assert all(map(is_remote, ["https://h/a", "http://h", "gs://b/x", "HTTPS://h/a"]))
    assert not any(map(is_remote, ["a.wav", "/a/b", "file:///a", "C:\\a", "bq://p.d.t", "https:a", ""]))
    assert host_of("https://Data.Example/a?b") == "data.example:443" and host_of("http://h:81/") == "h:81"


def test_libsndfile_reads_the_open_file(store, fetcher_of):
    wave, out = np.linspace(-0.5, 0.5, 1600, dtype=np.float32), io.BytesIO()
    soundfile.write(out, wave, 16000, format="WAV", subtype="FLOAT")
    fetcher = fetcher_of(store)
    for _ in range(2):  # just downloaded, and from the cache
        with fetcher.blob(store.put("gs://b/a.wav", out.getvalue())).open() as file:
            assert np.array_equal(soundfile.read(file.fileno(), dtype="float32", closefd=False)[0], wave)


def test_open_file_outlives_its_entry(store, fetcher_of):
    fetcher = fetcher_of(store, limit=6000)
    file = fetcher.blob(store.put("gs://b/a", content("gs://b/a"))).open()
    evict(fetcher, "gs://b/a")
    assert opened(fetcher, store.put("gs://b/c", content("gs://b/c"))) == content("gs://b/c")
    assert file.read() == content("gs://b/a")
    file.close()
    assert opened(fetcher, "gs://b/a") == content("gs://b/a") and store.reads() == ["gs://b/a", "gs://b/c", "gs://b/a"]


@pytest.mark.parametrize("sizes", [True, False])
def test_object_over_the_limit_for_one(fetcher_of, sizes):
    store = Memory(sizes)
    fetcher = fetcher_of(store, max_object_bytes=3000)
    store.put("gs://b/a", b"x" * 3000)
    store.put("gs://b/big", b"x" * 300_000)
    assert len(opened(fetcher, "gs://b/a")) == 3000
    with pytest.raises(InputError, match=r"gs://b/big: has \S+ bytes .*limit for one object is 3,000") as told:
        opened(fetcher, "gs://b/big")
    assert not isinstance(told.value, SourceError)  # that row may be skipped
    assert fetcher.stats.bytes <= 3000 and fetcher.cache.index.total() == 3000


def test_missing_object_is_the_row_s_fault(store, fetcher_of):
    fetcher = fetcher_of(store)
    for use in (lambda: opened(fetcher, "gs://b/none"), fetcher.blob("gs://b/none").size):
        with pytest.raises(InputError, match="gs://b/none: no such object") as told:
            use()
        assert not isinstance(told.value, SourceError)


@pytest.mark.parametrize("sizes", [True, False])
def test_size_of_an_object_whose_server_does_not_say(fetcher_of, sizes):
    store = Memory(sizes)
    blob = fetcher_of(store).blob(store.put("https://h/a", b"x" * 1234))
    assert blob.size() == 1234 and len(store.reads()) == (not sizes)


# One version in a run.


def fill(store, count=20):
    return [store.put(f"gs://b/{i}", content(f"gs://b/{i}", 100 + i)) for i in range(count)]


def test_second_epoch_and_resumed_run_ask_nothing(store, fetcher_of):
    urls, fetcher = fill(store), fetcher_of(store, run="r")
    for url in urls:
        assert opened(fetcher, url) == store.objects[url][1]
    assert len(store.drained()) == 2 * len(urls)
    for again in (fetcher, fetcher_of(store, run="r")):
        for url in reversed(urls):
            again.prefetch(again.blob(url))
        for url in urls:
            assert opened(again, url) == store.objects[url][1]
        assert again.blob(urls[0]).size() == 100
    assert store.drained() == []


def test_new_run_asks_for_versions_alone(store, fetcher_of):
    urls = fill(store)
    for url in urls:
        opened(fetcher_of(store, run="r"), url)
    store.drained()
    for again in (fetcher_of(store, run="other"), fetcher_of(store), fetcher_of(store)):
        for url in urls:
            assert opened(again, url) == store.objects[url][1]
        assert store.drained() == [("stat", url) for url in urls]


def test_object_that_changes_is_new_in_a_new_run_and_noticed_in_the_old_one(store, fetcher_of):
    url = store.put("gs://b/a", b"old")
    fetcher = fetcher_of(store, run="r")
    assert opened(fetcher, url) == b"old"
    store.put(url, b"new!", "2")
    assert opened(fetcher, url) == b"old" and fetcher.blob(url).size() == 3
    assert opened(fetcher_of(store, run="r"), url) == b"old"  # resumed
    new = fetcher_of(store, run="new")
    assert opened(new, url) == b"new!" and new.blob(url).size() == 4
    assert opened(fetcher, url) == b"old"
    evict(fetcher, url)
    with pytest.raises(SourceError, match="gs://b/a: has version 2, this run began with 1"):
        opened(fetcher, url)
    fetcher.cache.forget("r")
    assert opened(fetcher_of(store, run="r"), url) == b"new!"


def test_object_that_is_gone_during_a_run_is_no_row_s_fault(store, fetcher_of):
    url = store.put("gs://b/a", b"old")
    fetcher = fetcher_of(store, run="r")
    opened(fetcher, url)
    del store.objects[url]
    evict(fetcher, url)
    with pytest.raises(SourceError, match=r"gs://b/a: no such object \(it was there"):
        opened(fetcher, url)


def test_object_without_a_version_serves_its_run_alone(store, fetcher_of):
    url = store.put("https://h/a", b"one", "")
    fetcher = fetcher_of(store, run="r")
    assert opened(fetcher, url) == b"one" and opened(fetcher_of(store, run="r"), url) == b"one"
    assert store.reads() == [url]
    evict(fetcher, url)
    assert opened(fetcher, url) == b"one" and len(store.reads()) == 2
    store.put(url, b"two", "")
    assert opened(fetcher_of(store, run="new"), url) == b"two"
    assert opened(fetcher, url) == b"one"
    evict(fetcher, url)
    with pytest.raises(SourceError, match="https://h/a: has changed since this run first read it"):
        opened(fetcher, url)
    assert fetcher.cache.pinned("r", url).checksum
    fetcher.cache.forget("r")
    assert opened(fetcher_of(store, run="r"), url) == b"two"


def test_run_without_a_name_leaves_no_pins(store, fetcher_of):
    fetcher = fetcher_of(store)
    opened(fetcher, store.put("gs://b/a", b"x"))
    assert fetcher.cache.index._all("SELECT count(*) FROM pins") == [(1,)]
    fetcher.close()
    assert fetcher.cache.index._all("SELECT count(*) FROM pins") == [(0,)]


# In the background.


def test_prefetched_object_is_downloaded_once(fetcher_of):
    store = Memory(pause=0.01)
    urls, fetcher = fill(store, 40), fetcher_of(store, workers=4)
    blobs = [fetcher.blob(url) for url in urls]
    for blob in blobs + blobs:
        fetcher.prefetch(blob)
    fetcher.prefetch(Embedded("a", b"x"))  # has nothing to fetch
    other = fetcher_of(store)
    other.prefetch(blobs[0])  # is its own fetcher's
    assert not other._ahead
    got = {}

    def work(some):
        for blob in some:
            with blob.open() as file:
                got.setdefault(blob.url, set()).add(file.read())

    threads = [threading.Thread(target=work, args=(some,)) for some in (blobs, blobs[::-1], blobs[10:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {url: {store.objects[url][1]} for url in urls}
    assert sorted(store.reads()) == sorted(urls)
    assert sorted(asked[1] for asked in store.asked if asked[0] == "stat") == sorted(urls)


def test_prefetch_fills_the_cache_within_its_bounds(fetcher_of):
    store = Memory(pause=0.003)
    urls = [store.put(f"gs://b/{i}", content(f"gs://b/{i}", 2000 + 300 * (i % 5))) for i in range(40)]
    fetcher = fetcher_of(store, workers=6, ahead_bytes=9000)
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: fetcher.stats.objects == 40 and not fetcher._ahead)
    assert 2 <= store.most <= 4 and store.most_bytes <= 9000
    store.drained()
    assert all(opened(fetcher, url) == store.objects[url][1] for url in urls)
    assert store.asked == [] and fetcher.stats.hits == 40


def test_object_over_the_bytes_ahead_goes_alone(fetcher_of):
    store = Memory(pause=0.003)
    urls = [store.put(f"gs://b/{i}", content(f"gs://b/{i}", 5000 if i == 3 else 500)) for i in range(8)]
    fetcher = fetcher_of(store, workers=6, ahead_bytes=1000)
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: fetcher.stats.objects == 8)
    assert store.most_bytes == 5000


def test_as_many_workers_as_asked_for(fetcher_of):
    store = Memory(pause=0.005)
    fetcher = fetcher_of(store, workers=3)
    for url in fill(store):
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: fetcher.stats.objects == 20)
    assert store.most == 3


def test_prefetch_never_waits_and_forgets_what_is_too_much(store, fetcher_of, monkeypatch):
    monkeypatch.setattr(fetch, "AHEAD_OBJECTS", 10)
    urls, fetcher = fill(store, 40), fetcher_of(store, workers=2)
    store.gate.clear()
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    assert list(fetcher._ahead) == urls[:10]
    store.gate.set()
    assert opened(fetcher, urls[30]) == store.objects[urls[30]][1]
    waited(lambda: not fetcher._ahead)
    assert sorted(store.reads()) == sorted([*urls[:10], urls[30]])


def test_open_does_not_wait_for_a_turn(store, fetcher_of):
    urls, fetcher = fill(store, 10), fetcher_of(store, workers=1)
    store.gate.clear()
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: store.reads() == urls[:1])
    threading.Timer(0.05, store.gate.set).start()
    assert opened(fetcher, urls[9]) == store.objects[urls[9]][1]
    waited(lambda: not fetcher._ahead)
    assert store.reads()[:2] == [urls[0], urls[9]] and sorted(store.reads()) == urls


def test_error_waits_for_whoever_opens(store, fetcher_of):
    fetcher = fetcher_of(store)
    url = store.put("gs://b/a", content("gs://b/a"))
    store.fail_after = 2000
    for missing in ("gs://b/none", url):
        fetcher.prefetch(fetcher.blob(missing))
    waited(lambda: all(future.done() for future in fetcher._ahead.values()))
    asked = len(store.asked)
    with pytest.raises(InputError, match="gs://b/none: no such object"):
        opened(fetcher, "gs://b/none")
    with pytest.raises(SourceError, match="gs://b/a: the server failed"):
        opened(fetcher, url)
    assert len(store.asked) == asked
    store.fail_after = None  # told once; then it is tried again
    assert opened(fetcher, url) == content(url) and fetcher.cache.index.total() == 5000


def test_errors_that_nobody_opens_do_not_pile_up(store, fetcher_of, monkeypatch):
    monkeypatch.setattr(fetch, "AHEAD_OBJECTS", 5)
    fetcher = fetcher_of(store)
    for i in range(30):
        fetcher.prefetch(fetcher.blob(f"gs://b/none{i}"))
        waited(lambda: all(future.done() for future in fetcher._ahead.values()))
    assert list(fetcher._ahead) == [f"gs://b/none{i}" for i in range(25, 30)]


def test_object_let_go_before_it_is_opened_is_fetched_again(store, fetcher_of):
    urls, fetcher = fill(store, 10), fetcher_of(store, limit=500, workers=1)
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: fetcher.stats.objects == 10)
    assert [opened(fetcher, url) for url in urls] == [store.objects[url][1] for url in urls]


def test_prefetch_leaves_alone_what_cannot_be_kept(store, fetcher_of):
    fetcher = fetcher_of(store, limit=1000)
    fetcher.prefetch(fetcher.blob(store.put("gs://b/a", content("gs://b/a"))))
    waited(lambda: not fetcher._ahead)
    assert store.reads() == []
    assert opened(fetcher, "gs://b/a") == content("gs://b/a") and store.reads() == ["gs://b/a"]


def test_close_does_not_wait_for_a_server_that_hangs(store, fetcher_of, monkeypatch):
    monkeypatch.setattr(fetch, "_CLOSE_S", 0.1)
    urls, fetcher = fill(store, 10), fetcher_of(store, workers=2)
    store.gate.clear()
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    waited(lambda: len(store.reads()) == 2)
    began = time.monotonic()
    fetcher.close()
    assert time.monotonic() - began < 1
    fetcher.prefetch(fetcher.blob(urls[5]))
    store.gate.set()
    waited(lambda: not store.active)
    assert len(store.reads()) == 2 and fetcher.stats.objects == 0


def test_downloads_end_when_the_fetcher_is_closed(fetcher_of):
    store = Memory(pause=0.02)
    fetcher = fetcher_of(store)
    url = store.put("gs://b/a", content("gs://b/a", 50_000))
    fetcher.prefetch(fetcher.blob(url))
    waited(lambda: store.active)
    fetcher.close()
    assert not store.active and fetcher.cache.index.total() == 0 and fetcher.stats.bytes < 50_000


# Large objects.


def test_ranges_at_a_time_give_the_same_bytes(store, fetcher_of, monkeypatch):
    monkeypatch.setattr(fetch, "RANGED_BYTES", 2 * PART)
    data = np.random.default_rng(0).bytes(5 * PART + 4321)
    fetcher, store.pause = fetcher_of(store, limit=1 << 27), 0.002
    assert opened(fetcher, store.put("gs://b/large", data)) == data
    ranges = [asked[2:] for asked in store.asked if asked[0] == "read"]
    assert sorted(ranges) == [(i * PART, min((i + 1) * PART, len(data))) for i in range(6)]
    assert store.most == fetch.LANES and fetcher.stats.bytes == len(data)
    checked = fetcher_of(store, limit=1 << 27)
    store.drained()
    assert opened(checked, "gs://b/large") == data and not store.reads()  # its checksum is that of a whole read
    assert opened(fetcher, store.put("https://h/large", data)) == data
    assert [asked for asked in store.asked if asked[0] == "read"] == [("read", "https://h/large", 0, None)]


@pytest.mark.parametrize("fault", ["fails", "short"])
def test_failed_range_fails_the_object(store, fetcher_of, monkeypatch, fault):
    monkeypatch.setattr(fetch, "RANGED_BYTES", PART)
    fetcher = fetcher_of(store, limit=1 << 27)
    data = bytes(3 * PART)
    store.put("gs://b/large", data)
    read, store.pause = store.read, 0.02

    def faulty(url, stat=None, start=0, end=None):
        if start == 0:
            yield b"x" * 1000
            waited(lambda: len(store.active) == 2)
            if fault == "fails":
                raise SourceError("gs://b/large: the server failed")
        else:
            yield from read(url, stat, start, end)

    monkeypatch.setattr(store, "read", faulty)
    with pytest.raises(SourceError, match="server failed" if fault == "fails" else "gives 1000 bytes"):
        opened(fetcher, "gs://b/large")
    assert fetcher.cache.index.total() == 0 and not store.active
    monkeypatch.setattr(store, "read", read)
    assert opened(fetcher, "gs://b/large") == data


# Files and lists.


def test_file_stays_until_close(store, fetcher_of):
    fetcher = fetcher_of(store, limit=6000)
    path = fetcher.file(store.put("gs://b/shard.tar", content("gs://b/shard.tar")))
    assert path.read_bytes() == content("gs://b/shard.tar")
    store.drained()
    assert fetcher.file("gs://b/shard.tar") == path and store.asked == []
    other = fetcher_of(store, limit=6000)
    for i in range(5):
        assert opened(other, store.put(f"gs://b/{i}", content(f"gs://b/{i}"))) == content(f"gs://b/{i}")
    assert path.exists()
    fetcher.close()
    opened(other, "gs://b/1")
    assert not path.exists()


def test_released_file_may_go(store, fetcher_of):
    fetcher = fetcher_of(store, limit=6000)
    shards = [store.put(f"gs://b/{i}.tar", content(f"gs://b/{i}.tar")) for i in range(4)]
    for url in shards:  # as many as there are, with room for one
        assert fetcher.file(url).read_bytes() == store.objects[url][1]
        fetcher.release(url)
    fetcher.file(shards[0])
    with pytest.raises(InputError, match="no room"):
        fetcher.file(shards[1])


@pytest.mark.parametrize("sizes", [True, False])
def test_file_that_finds_no_room(fetcher_of, sizes):
    store = Memory(sizes)
    fetcher = fetcher_of(store, limit=100_000)
    fetcher.file(store.put("gs://b/1", bytes(30_000)))
    with pytest.raises(
        InputError, match=r"gs://b/2: .* no room in the cache .* may take 100,000 bytes.*raise its limit"
    ):
        fetcher.file(store.put("gs://b/2", bytes(80_000)))
    assert store.reads().count("gs://b/2") == (not sizes)
    assert len(opened(fetcher, "gs://b/2")) == 80_000  # though not as a file that stays


def test_list_expands_braces_then_asks_cloud_storage(store, fetcher_of):
    fetcher = fetcher_of(store, run="r")
    urls = [store.put(f"gs://b/s/{i:02}.tar", bytes(i)) for i in range(3)]
    store.put("gs://b/s/", b"")
    assert fetcher.list("https://h/{a,b}-{08..10}.tar?x=1*") == [
        f"https://h/{c}-{n}.tar?x=1*" for c in "ab" for n in ("08", "09", "10")
    ]
    assert fetcher.list("gs://b/s/{00..02}.tar") == urls and store.asked == []
    assert fetcher.list("gs://b/s/") == fetcher.list("gs://b/s/*") == urls
    store.drained()
    assert opened(fetcher, urls[2]) == bytes(2)
    assert store.asked == [("read", urls[2], 0, None)]  # the listing has told its version
    with pytest.raises(InputError, match=r"gs://b/none\*: no object matches"):
        fetcher.list("gs://b/{s/,none*}")
