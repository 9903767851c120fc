"""The cache against a model of it, against other processes that use, damage and die in it, and against the disk."""

import errno
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from gemma_mlx.data.remote import cache as cache_module
from gemma_mlx.data.remote import index
from gemma_mlx.data.remote.cache import PART, Cache, _key
from gemma_mlx.errors import InputError, SourceError


def content(url, size):
    """Bytes that belong to a URL and nothing else."""
    return hashlib.shake_128(url.encode()).digest(size)


def filled(data, calls=None, chunk=1000):
    def fill(draft):
        if calls is not None:
            calls.append(draft.told)
        for start in range(0, len(data), chunk):
            draft.write(start, data[start : start + chunk])

    return fill


def get(cache, url, size, version="1", calls=None, known=True):
    with cache.get(url, version, size if known else None, filled(content(url, size), calls)) as file:
        return file.read()


def files(folder):
    return [path for path in Path(folder).glob("[0-9a-f][0-9a-f]/*") if path.is_file()]


def stored(folder):
    return sum(path.stat().st_size for path in files(folder))


def kept(cache, url, version="1"):
    """Whether an object is in the index, and its file there; not a use of it."""
    there = cache.index.entry(_key(url, version)) is not None
    assert there == cache._path(_key(url, version)).exists()
    return there


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


# Other processes.

CHILD = """
import hashlib, os, random, sys, time
from pathlib import Path
from gemma_mlx.data.remote.cache import Cache
def content(url, size):
    return hashlib.shake_128(url.encode()).digest(size)
cache = Cache(Path(sys.argv[1]), int(sys.argv[2]))
def fill(data, pause=0.0, log=None):
    def write(draft):
        if log:
            with open(log, "a") as f:
                f.write(draft.told + "\\n")
        for at in range(0, len(data), 1 + len(data) // 3):
            draft.write(at, data[at : at + 1 + len(data) // 3])
            time.sleep(pause)
    return write
"""
HAMMER = (
    CHILD
    + """
rng = random.Random(int(sys.argv[3]))
print("go", flush=True)
for _ in range(int(sys.argv[4])):
    i = rng.randrange(40)
    url, size = f"https://h/{i}", 200 + 37 * i
    with cache.get(url, "1", size if i % 8 else None, fill(content(url, size), 0.0003)) as file:
        assert file.read() == content(url, size), url
"""
)


def start(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def ended(process):
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out


def check_books(cache):
    """Files against the index, while nobody can publish or evict: (bytes in files, bytes in the index)."""
    with cache.index.writing():
        total = cache.index._all("SELECT bytes FROM total")[0][0]
        summed = cache.index._all("SELECT coalesce(sum(size), 0) FROM entries")[0][0]
        assert total == summed
        return stored(cache.folder), total


def test_two_processes_share_a_small_cache(folder):
    limit = 12_000  # of 36,860 bytes in all
    processes = [start(HAMMER, folder, limit, seed, 400) for seed in (1, 2)]
    for process in processes:
        assert process.stdout.readline() == "go\n"
    cache, seen = Cache(folder, limit), []
    while any(process.poll() is None for process in processes):
        in_files, total = check_books(cache)
        assert in_files <= total <= limit
        seen.append(total)
        time.sleep(0.02)
    for process in processes:
        ended(process)
    assert max(seen) > limit / 2
    in_files, total = check_books(cache)
    assert in_files == total <= limit and not [path for path in files(folder) if path.suffix]


def test_killed_processes_leave_nothing_that_is_read_or_counted(folder):
    limit, rng, read = 12_000, random.Random(0), 0
    for attempt in range(6):
        processes = [start(HAMMER, folder, limit, 10 * attempt + i, 1_000_000) for i in (1, 2)]
        for process in processes:
            assert process.stdout.readline() == "go\n"
        time.sleep(0.1 + 0.2 * rng.random())
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        cache = Cache(folder, limit)
        in_files, total = check_books(cache)
        assert in_files <= total <= limit  # killed while it made room: files are gone that the index still counts
        for i in range(40):
            file = cache.open(f"https://h/{i}", "1")
            assert file is None or file.read() == content(f"https://h/{i}", 200 + 37 * i)
            if file:
                file.close()
        in_files, total = check_books(cache)
        assert in_files == total
        read += total
        cache.close()
    assert read


def test_part_of_a_killed_download_is_not_read(folder):
    halfway = CHILD + (
        "def half(draft):\n draft.write(0, b'x' * 500)\n print('half', flush=True)\n time.sleep(60)\n"
        "holder = cache.holder()\ncache.get('https://h/held', '1', 300, fill(content('https://h/held', 300))).close()\n"
        "assert holder.hold('https://h/held', '1')\n"
        "cache.get('https://h/a', '1', 600, half)"
    )
    process = start(halfway, folder, 1000)
    assert process.stdout.readline() == "half\n"
    cache = Cache(folder, 1000)  # while it lives, its bytes are reserved, and what it holds stays
    assert check_books(cache) == (800, 900)
    get(cache, "https://h/b", 200)
    assert not kept(cache, "https://h/b") and kept(cache, "https://h/held")
    process.kill()
    process.communicate()
    get(cache, "https://h/c", 1000)  # room is needed: what is left of it goes
    assert check_books(cache) == (1000, 1000) and kept(cache, "https://h/c")
    assert get(cache, "https://h/a", 600) == content("https://h/a", 600)


def test_next_one_goes_on_after_a_killed_download(folder):
    halfway = CHILD + (
        "def half(draft):\n draft.write(0, b'x' * 500)\n print('half', flush=True)\n time.sleep(60)\n"
        "cache.get('https://h/a', '1', 600, half)"
    )
    process = start(halfway, folder, 1000)
    assert process.stdout.readline() == "half\n"
    cache, got = Cache(folder, 1000), []
    waiter = threading.Thread(target=lambda: got.append(get(cache, "https://h/a", 600)))
    waiter.start()
    time.sleep(0.1)
    assert not got  # it waits for the other process
    process.kill()
    process.communicate()
    waiter.join(10)
    assert got == [content("https://h/a", 600)] and check_books(cache) == (600, 600)


def test_two_processes_download_each_object_once(folder, tmp_path):
    code = CHILD + (
        "print('go', flush=True)\n"
        "while not os.path.exists(sys.argv[3]): time.sleep(0.001)\n"
        "for i in range(30):\n url = f'https://h/{i}'\n"
        " with cache.get(url, '1', None if i % 2 else 900, fill(content(url, 900), 0.002, sys.argv[4])) as file:\n"
        "  assert file.read() == content(url, 900)\n"
    )
    log, gate = tmp_path / "log", tmp_path / "gate"
    processes = [start(code, folder, 1_000_000, gate, log) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "go\n"
    gate.touch()
    for process in processes:
        ended(process)
    assert sorted(log.read_text().split()) == sorted(f"https://h/{i}" for i in range(30))


def test_download_that_is_just_being_published_is_not_begun_again(folder, monkeypatch):
    cache, other, calls, got = Cache(folder, 10_000), Cache(folder, 10_000), [], []
    waiter = threading.Thread(target=lambda: got.append(get(other, "https://h/a", 600, calls=calls)))
    replace = os.replace

    def paused(part, path):
        replace(part, path)
        waiter.start()  # finds neither an entry nor a part
        time.sleep(0.2)

    monkeypatch.setattr(os, "replace", paused)
    get(cache, "https://h/a", 600)
    waiter.join()
    assert got == [content("https://h/a", 600)] and not calls and check_books(cache) == (600, 600)


@pytest.mark.parametrize("published", [True, False])
def test_part_that_ended_before_its_lock_was_taken_is_left_alone(folder, monkeypatch, published):
    cache, other, calls = Cache(folder, 10_000), Cache(folder, 10_000), []
    locked = cache_module._locked

    def late(handle):
        monkeypatch.setattr(cache_module, "_locked", locked)
        if published:
            get(other, "https://h/a", 600)
        else:
            with pytest.raises(SourceError):
                other.get("https://h/a", "1", 600, filled(b"short"))
        return locked(handle)

    monkeypatch.setattr(cache_module, "_locked", late)
    part = cache._part(_key("https://h/a", "1"))
    assert get(cache, "https://h/a", 600, calls=calls) == content("https://h/a", 600)
    assert len(calls) == (not published) and not part.exists() and check_books(cache) == (600, 600)


def test_readers_do_not_wait_for_each_other(folder):
    cache, other, got = Cache(folder, 10_000), Cache(folder, 10_000), []
    with cache.get("https://h/a", "1", 600, filled(content("https://h/a", 600))):  # whoever has written it reads it
        reader = threading.Thread(target=lambda: got.append(get(other, "https://h/a", 600)), daemon=True)
        reader.start()
        reader.join(5)
        assert got == [content("https://h/a", 600)]


def test_process_killed_while_it_publishes(folder):
    code = CHILD + (
        "replace = os.replace\n"
        "def killed(part, path):\n replace(part, path)\n os.kill(os.getpid(), 9)\n"
        "os.replace = killed\ncache.get('https://h/a', '1', 600, fill(content('https://h/a', 600)))"
    )
    process = start(code, folder, 1000)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and stored(folder) == 600
    cache = Cache(folder, 1000)
    assert cache.open("https://h/a", "1") is None and check_books(cache) == (0, 0)


def test_threads_download_each_object_once(folder):
    cache, calls, wrong = Cache(folder, 1_000_000), [], []

    def slow(url):
        def fill(draft):
            calls.append(url)
            time.sleep(0.005)
            draft.write(0, content(url, 900))

        return fill

    def work():
        for i in range(10):
            url = f"https://h/{i}"
            with cache.get(url, "1", 900, slow(url)) as file:
                if file.read() != content(url, 900):
                    wrong.append(url)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted(f"https://h/{i}" for i in range(10)) and not wrong


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
