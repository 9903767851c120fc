"""What tests of the cache and the fetcher share: objects whose bytes follow from their URLs, and looks at what is
stored."""

import hashlib
from contextlib import contextmanager
from pathlib import Path

from gemma_mlx.data.remote.cache import Cache, _key
from gemma_mlx.data.remote.fetch import Fetcher


def content(url, size=5000):
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


def check_books(cache):
    """Files against the index, while nobody can publish or evict: (bytes in files, bytes in the index)."""
    with cache.index.writing():
        total = cache.index._all("SELECT bytes FROM total")[0][0]
        summed = cache.index._all("SELECT coalesce(sum(size), 0) FROM entries")[0][0]
        assert total == summed
        return stored(cache.folder), total


@contextmanager
def fetchers(folder):
    """Makes fetchers on one folder, each with a `Cache` of its own as in a new process."""
    made = []

    def make(store, limit=1_000_000, **options):
        made.append(Fetcher(Cache(folder, limit), store_of=store, **options))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher.close()


def opened(fetcher, url):
    with fetcher.blob(url).open() as file:
        return file.read()


def evict(fetcher, url):
    """As if the entry had been let go."""
    pin = fetcher.cache.pinned(fetcher._run, url)
    fetcher.cache._path(_key(url, pin.version)).unlink()
