"""The cache against a model of it, and against a disk that is damaged, full or not to be used."""

import errno
import os
import random
import stat
import threading
import time
from collections import OrderedDict

import pytest
from cached import content, files, filled, get, kept, stored

from gemma_mlx.data.remote import cache as cache_module
from gemma_mlx.data.remote import index
from gemma_mlx.data.remote.cache import PART, Cache, _key
from gemma_mlx.errors import InputError, SourceError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


# What goes and what stays.


@pytest.mark.parametrize("seed", range(3))
def test_least_recently_used_goes_first_as_in_a_model(folder, seed):
    rng, limit = random.Random(seed), 1000
    cache, holder = Cache(folder, limit), None
    sizes = {f"https://h/{i}": rng.randint(0, 320) for i in range(25)} | {"https://h/big": 1001, "https://h/all": 1000}
    model: OrderedDict[str, int] = OrderedDict()
    held, reading = set(), {}
    holder = cache.holder()

    def model_get(url):
        if url in model:
            model.move_to_end(url)
            return 0
        size = sizes[url]
        if size + sum(model[u] for u in held) > limit and sum(model.values()) + size > limit:
            return 1
        for old in list(model):
            if sum(model.values()) + size <= limit:
                break
            if old not in held and old not in reading:
                del model[old]
        if sum(model.values()) + size <= limit:
            model[url] = size
        return 1

    outcomes = set()
    for _ in range(250):
        url, action = rng.choice(list(sizes)), rng.random()
        if action < 0.75:
            calls = []
            assert get(cache, url, sizes[url], calls=calls) == content(url, sizes[url])
            assert len(calls) == model_get(url)
            outcomes.add((len(calls), url in model))
        elif action < 0.85 and len(reading) < 3 and (file := cache.open(url, "1")):
            model.move_to_end(url)
            reading.setdefault(url, []).append(file)
        elif action < 0.93 and reading:
            for file in reading.pop(rng.choice(list(reading))):
                file.close()
        elif action < 0.97 and len(held) < 2:
            assert (holder.hold(url, "1") is not None) == (url in model)
            held |= {url} & set(model)
        elif action > 0.98:
            holder.close()
            holder, held = cache.holder(), set()
        assert {u for u in sizes if kept(cache, u)} == set(model)
        assert stored(folder) == sum(model.values()) == cache.index.total() <= limit
    assert outcomes == {(0, True), (1, True), (1, False)}


def test_uses_are_written_in_batches_and_order_survives_a_new_process(folder, monkeypatch):
    cache = Cache(folder, 1000)
    for i in range(4):
        get(cache, f"https://h/{i}", 250)
    writes = []
    writing = cache.index.writing
    monkeypatch.setattr(cache.index, "writing", lambda: writes.append(1) or writing())
    for _ in range(100):
        cache.open("https://h/0", "1").close()
        cache.open("https://h/2", "1").close()
    assert not writes
    for _ in range(100):
        for i in (0, 2):
            cache.open(f"https://h/{i}", "1").close()
    assert len(writes) <= 2
    cache.close()
    cache = Cache(folder, 1000)
    get(cache, "https://h/4", 500)
    assert [kept(cache, f"https://h/{i}") for i in range(5)] == [True, False, True, False, True]


def test_lower_limit_holds_at_once(folder):
    cache = Cache(folder, 1000)
    for i in range(4):
        get(cache, f"https://h/{i}", 250)
    cache.close()
    cache = Cache(folder, 600)
    assert stored(folder) == cache.index.total() == 500
    assert [kept(cache, f"https://h/{i}") for i in range(4)] == [False, False, True, True]


def test_open_file_survives_and_what_is_read_is_not_let_go(folder):
    cache = Cache(folder, 1000)
    for i in range(3):
        get(cache, f"https://h/{i}", 300)
    oldest = cache.open("https://h/0", "1")
    for i in range(1, 3):
        cache.open(f"https://h/{i}", "1").close()  # so that 0 is the oldest again
    get(cache, "https://h/3", 300)
    assert kept(cache, "https://h/0") and not kept(cache, "https://h/1")
    cache._path(_key("https://h/0", "1")).unlink()
    assert oldest.read() == content("https://h/0", 300)
    oldest.close()


def test_held_entries_stay_and_the_rest_goes_past_them(folder):
    cache = Cache(folder, 1000)
    holder = cache.holder()
    for i in range(2):
        get(cache, f"https://h/held{i}", 300)
        assert holder.hold(f"https://h/held{i}", "1").read_bytes() == content(f"https://h/held{i}", 300)
    assert holder.hold("https://h/none", "1") is None
    get(cache, "https://h/a", 400)
    assert get(cache, "https://h/no-room", 401) == content("https://h/no-room", 401)
    assert kept(cache, "https://h/a") and not kept(cache, "https://h/no-room")  # nothing went in vain
    other = Cache(folder, 1000)  # as another process sees it
    get(other, "https://h/b", 400)
    assert kept(other, "https://h/held0") and not kept(other, "https://h/a")
    holder.close()
    get(other, "https://h/c", 900)
    assert not kept(other, "https://h/held0") and list((folder / "holders").iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("limit", [0, 10, 99_999])
def test_object_over_the_limit_is_read_and_not_kept(folder, limit, known):
    cache = Cache(folder, limit)
    assert get(cache, "https://h/a", 100_000, known=known) == content("https://h/a", 100_000)
    assert files(folder) == [] and cache.index.total() == 0
    calls = []
    if known:
        assert cache.get("https://h/a", "1", 100_000, filled(b"", calls), only_kept=True) is None and not calls


def test_object_of_unknown_size_takes_its_size_alone(folder):
    cache = Cache(folder, 1_000_000)
    assert get(cache, "https://h/a", 700_000, known=False) == content("https://h/a", 700_000)
    assert cache.index.total() == stored(folder) == 700_000
    get(cache, "https://h/b", 1_000_000, known=False)
    assert kept(cache, "https://h/b") and cache.index.total() == stored(folder) == 1_000_000


def test_versions_and_urls_are_kept_apart(folder):
    cache = Cache(folder, 1000)
    names = [("https://h/a", "1"), ("https://h/a", "2"), ("https://h/a 1", ""), ("https://h/", "a 1")]
    for url, version in names:
        data = f"{url}|{version}".encode()
        cache.get(url, version, len(data), filled(data)).close()
    assert [cache.open(*name).read().decode() for name in names] == [f"{url}|{version}" for url, version in names]


# Damage.


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flip": damage_flip,
    "cut": lambda path: os.truncate(path, 4999),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "gone": os.unlink,
    "other": lambda path: path.write_bytes(content("https://h/other", 5000)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_downloaded_again(folder, damage):
    cache = Cache(folder, 20_000)
    get(cache, "https://h/a", 5000)
    get(cache, "https://h/b", 5000)
    cache.close()
    DAMAGES[damage](cache._path(_key("https://h/a", "1")))
    cache, calls = Cache(folder, 20_000), []
    assert get(cache, "https://h/b", 5000, calls=calls) == content("https://h/b", 5000) and not calls
    assert get(cache, "https://h/a", 5000, calls=calls) == content("https://h/a", 5000) and len(calls) == 1
    assert get(cache, "https://h/a", 5000, calls=calls) == content("https://h/a", 5000) and len(calls) == 1
    assert cache.index.total() == stored(folder) == 10_000


@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "gone"])
def test_size_is_checked_at_every_read(folder, damage):
    cache, calls = Cache(folder, 20_000), []
    get(cache, "https://h/a", 5000)
    DAMAGES[damage](cache._path(_key("https://h/a", "1")))
    assert get(cache, "https://h/a", 5000, calls=calls) == content("https://h/a", 5000) and len(calls) == 1


def test_content_is_checked_once_in_a_process(folder, monkeypatch):
    cache = Cache(folder, 20_000)
    get(cache, "https://h/a", 5000)
    cache.close()
    cache, reads = Cache(folder, 20_000), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(1) or pread(*a))
    get(cache, "https://h/a", 5000)
    once = len(reads)
    get(cache, "https://h/a", 5000)
    assert once and len(reads) == once


def test_memory_of_checks_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "_REMEMBERED", 3)
    cache = Cache(folder, 20_000)
    for i in range(10):
        get(cache, f"https://h/{i}", 50)
        assert len(cache._checked) <= 3
    assert all(get(cache, f"https://h/{i}", 50) == content(f"https://h/{i}", 50) for i in range(10))


@pytest.mark.parametrize("garbage", [b"", b"not a database, but longer than its header " * 50])
def test_lost_index_begins_anew(folder, garbage):
    cache = Cache(folder, 20_000)
    get(cache, "https://h/a", 5000)
    cache.close()
    (folder / "index.sqlite").write_bytes(garbage)
    cache, calls = Cache(folder, 20_000), []
    assert files(folder) == []
    assert get(cache, "https://h/a", 5000, calls=calls) == content("https://h/a", 5000) and calls


def test_parts_may_come_in_any_order(folder):
    data = random.Random(0).randbytes(2 * PART + 12345)
    cache = Cache(folder, 1 << 30)

    def backwards(draft):
        draft.write(2 * PART, data[2 * PART :])
        writers = [threading.Thread(target=lambda i=i: piecewise(draft, i)) for i in range(2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()

    def piecewise(draft, part):
        for at in range(part * PART, (part + 1) * PART, 777_777):
            draft.write(at, data[at : min(at + 777_777, (part + 1) * PART)])

    cache.get("https://h/1", "1", len(data), backwards).close()
    cache.get("https://h/2", "1", len(data), filled(data, chunk=3_000_000)).close()
    checksums = {cache.index.entry(_key(f"https://h/{i}", "1")).checksum for i in (1, 2)}
    assert len(checksums) == 1
    cache.close()
    assert Cache(folder, 1 << 30).open("https://h/1", "1").read() == data


# Failures while writing.


def test_failed_download_leaves_nothing(folder):
    cache = Cache(folder, 10_000)

    def broken(draft):
        draft.write(0, b"half")
        raise SourceError("https://h/a: the server failed")

    with pytest.raises(SourceError, match="server failed"):
        cache.get("https://h/a", "1", 8, broken)
    with pytest.raises(SourceError, match="ends after 4 of 8 bytes"):
        cache.get("https://h/a", "1", 8, filled(b"half"))
    with pytest.raises(SourceError, match="more than the 8 bytes"):
        cache.get("https://h/a?sig=secret", "1", 8, filled(b"too much."))
    assert files(folder) == [] and cache.index.total() == 0
    assert get(cache, "https://h/a", 8) == content("https://h/a", 8)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_is_told_in_one_line(folder, monkeypatch, code):
    cache = Cache(folder, 10_000_000)
    get(cache, "https://h/old", 10)
    pwrite, written = os.pwrite, []

    def failing(handle, data, offset):
        if sum(written) > 3000:
            raise OSError(code, os.strerror(code))
        written.append(pwrite(handle, data[:700], offset))  # a short write is no failure
        return written[-1]

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(SourceError) as told:
        get(cache, "https://h/a", 100_000)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)
    assert ("disk is full" in str(told.value)) == (code != errno.EIO)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert stored(folder) == cache.index.total() == 10
    assert get(cache, "https://h/a", 100_000) == content("https://h/a", 100_000)


def test_full_disk_under_the_index_is_told_too(folder):
    cache = Cache(folder, 10_000_000)
    pages = cache.index._db.execute("PRAGMA page_count").fetchone()[0]
    cache.index._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SourceError, match="disk is full"):
        for i in range(2000):
            get(cache, f"https://h/{i}", 10)
    assert len(files(folder)) * 10 == cache.index.total() > 0


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match=r"cache folder .*file/below: cannot be used \(Not a directory\)"):
        Cache(tmp_path / "file" / "below", 1000)
    with pytest.raises(InputError, match="limit is -1 bytes"):
        Cache(tmp_path / "new", -1)


def test_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(InputError, match=r"holds other files \(thesis.txt\)"):
        Cache(tmp_path, 1000)
    assert os.listdir(tmp_path) == ["thesis.txt"] and stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(folder):
    folder.mkdir()
    get(Cache(folder, 1000), "https://h/a", 10)
    (folder / "index.sqlite").chmod(0o400)
    with pytest.raises(SourceError, match="cache folder"):
        get(Cache(folder, 1000), "https://h/b", 10)


def test_cache_of_another_format_is_refused(folder, monkeypatch):
    Cache(folder, 1000).close()
    monkeypatch.setattr(index, "FORMAT", 2)
    with pytest.raises(SourceError, match=r"another version of this library \(format 1, not 2\)"):
        Cache(folder, 1000)


def test_only_the_owner_may_look(folder):
    before = os.umask(0)
    try:
        cache = Cache(folder, 1000)
        holder = cache.holder()
        get(cache, "https://h/a", 10)
        cache.pin("run", "https://h/a", "1")
        held_open = []

        def fill(draft):
            held_open.extend(folder.rglob("*.part"))
            modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
            assert modes == {0o600}
            draft.write(0, b"x")

        cache.get("https://h/b", "1", 1, fill).close()
        assert held_open
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()} == {0o700}
    assert (folder / "index.sqlite-wal").exists()  # one of the files looked at
    holder.close()


def test_signed_urls_are_not_written_down(folder):
    cache = Cache(folder, 1000)
    get(cache, "https://h/a?token=SECRETSECRET", 10)
    cache.pin("run", "https://h/a?token=SECRETSECRET", "1", 10)
    cache.close()
    assert not any(b"SECRETSECRET" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# Pins.


def test_pins_hold_for_a_run(folder):
    cache = Cache(folder, 1000)
    assert cache.pinned("a", "gs://b/x") is None
    assert cache.pin("a", "gs://b/x", "1", 10) == ("1", 10, None)
    assert cache.pin("a", "gs://b/x", "2", 20) == ("1", 10, None)
    assert cache.pin("b", "gs://b/x", "2") == ("2", None, None)
    cache.close()
    cache = Cache(folder, 1000)
    assert cache.pinned("a", "gs://b/x").version == "1" and cache.pinned("b", "gs://b/x").version == "2"
    cache.forget("a")
    assert cache.pinned("a", "gs://b/x") is None and cache.pinned("b", "gs://b/x").version == "2"
    assert cache.pin("a", "gs://b/x", "3").version == "3"


def test_pins_of_long_unused_runs_go(folder, monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    cache = Cache(folder, 1000)
    cache.pin("old", "gs://b/x", "1")
    cache.pin("resumed", "gs://b/x", "1")
    cache.close()
    now += 80 * 86_400 * 10**9
    cache = Cache(folder, 1000)
    assert cache.pinned("resumed", "gs://b/x").version == "1"  # a use
    cache.close()
    now += 11 * 86_400 * 10**9
    cache = Cache(folder, 1000)
    cache.pin("new", "gs://b/x", "2")
    assert cache.index._all("SELECT name FROM runs ORDER BY name") == [("new",), ("resumed",)]
    assert cache.index._all("SELECT count(*) FROM pins") == [(2,)]
    assert cache.pinned("resumed", "gs://b/x").version == "1" and cache.pinned("old", "gs://b/x") is None
