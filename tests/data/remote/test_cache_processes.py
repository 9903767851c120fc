"""The cache between processes (and threads) that use it at once and are killed in the midst of it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from cached import check_books, content, files, filled, get, kept, stored

from gemma_mlx.data.remote import cache as cache_module
from gemma_mlx.data.remote.cache import Cache, _key
from gemma_mlx.errors import SourceError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


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
