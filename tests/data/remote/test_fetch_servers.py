"""The fetcher over real servers of this machine, which count what they are asked."""

import subprocess
import sys

import numpy as np
import pytest
from cached import content, evict, fetchers, opened
from servers import Fault, FileServer

from gemma_mlx.data.remote import fetch, stores
from gemma_mlx.data.remote.cache import PART
from gemma_mlx.data.remote.fetch import host_of
from gemma_mlx.data.remote.retry import RetryPolicy
from gemma_mlx.errors import InputError, SourceError


@pytest.fixture
def fetcher_of(tmp_path):
    with fetchers(tmp_path / "cache") as make:
        yield make


def impatient(url, allowed_hosts):
    return stores.store_of(url, allowed_hosts, RetryPolicy(first_wait=0.01, total=20))


def test_epochs_over_cloud_storage(gcs_server, gcs, fetcher_of):
    data = {f"gs://epochs/m/{i}.bin": content(str(i), 20_000 + i) for i in range(12)}
    for url, item in data.items():
        gcs_server.upload("epochs", url.removeprefix("gs://epochs/"), item)
    fetcher = fetcher_of(impatient, run="r")
    urls = fetcher.list("gs://epochs/m/*.bin")
    assert urls == sorted(data)
    gcs.inject(Fault("status", media=True, times=2), Fault("reset", media=True, after=5000), Fault("status", times=1))
    for url in urls:
        fetcher.prefetch(fetcher.blob(url))
    assert {url: opened(fetcher, url) for url in urls} == data and not gcs.pending()
    assert gcs.media_bytes() >= sum(map(len, data.values()))
    gcs.forget()
    again = fetcher_of(impatient, run="r")
    assert {url: opened(again, url) for url in urls} == data == {url: opened(fetcher, url) for url in urls}
    assert gcs.asked == []
    gcs_server.upload("epochs", "m/3.bin", b"another")
    new = fetcher_of(impatient, run="new")
    assert opened(new, "gs://epochs/m/3.bin") == b"another"
    assert opened(new, "gs://epochs/m/4.bin") == data["gs://epochs/m/4.bin"]
    assert gcs.media_bytes() == 7
    evict(fetcher, "gs://epochs/m/3.bin")
    with pytest.raises(SourceError, match=r"gs://epochs/m/3\.bin"):
        opened(fetcher, "gs://epochs/m/3.bin")


def test_large_object_of_cloud_storage(gcs_server, gcs, fetcher_of, monkeypatch):
    monkeypatch.setattr(fetch, "RANGED_BYTES", PART)
    data = np.random.default_rng(1).bytes(2 * PART + 99)
    gcs_server.upload("large", "x.tar", data)
    gcs.inject(Fault("reset", "x.tar", media=True, after=3_000_000))
    path = fetcher_of(impatient, limit=1 << 26).file("gs://large/x.tar")
    assert path.read_bytes() == data and not gcs.pending()


@pytest.mark.parametrize("options", [{}, {"no_etag": True}, {"no_lengths": True}, {"no_etag": True, "no_dates": True}])
def test_epochs_over_http(tmp_path, fetcher_of, options):
    served = tmp_path / "served"
    served.mkdir()
    for i in range(5):
        (served / f"{i}.bin").write_bytes(content(str(i), 3000 + i))
    with FileServer(served, **options) as server:
        urls = [f"{server.url}/{i}.bin" for i in range(5)]
        fetcher = fetcher_of(impatient, run="r", allowed_hosts=[host_of(server.url)])
        assert [opened(fetcher, url) for url in urls] == [content(str(i), 3000 + i) for i in range(5)]
        server.forget()
        again = fetcher_of(impatient, run="r", allowed_hosts=[host_of(server.url)])
        assert [opened(again, url) for url in urls] == [content(str(i), 3000 + i) for i in range(5)]
        assert server.asked == []
        with pytest.raises(InputError, match="private"):
            opened(fetcher_of(impatient), urls[0])
        with pytest.raises(InputError, match="no such object"):
            opened(fetcher, f"{server.url}/none.bin")


def test_two_processes_ask_the_server_for_each_object_once(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    for i in range(30):
        (served / f"{i}.bin").write_bytes(content(str(i), 30_000))
    code = (
        "import hashlib, os, sys, time\nfrom pathlib import Path\n"
        "from gemma_mlx.data.remote.cache import Cache\nfrom gemma_mlx.data.remote.fetch import Fetcher, host_of\n"
        "fetcher = Fetcher(Cache(Path(sys.argv[1])), run='r', allowed_hosts=[host_of(sys.argv[2])], workers=2)\n"
        "print('go', flush=True)\n"
        "while not os.path.exists(sys.argv[3]): time.sleep(0.001)\n"
        "blobs = [fetcher.blob(f'{sys.argv[2]}/{i}.bin') for i in range(30)]\n"
        "for blob in blobs: fetcher.prefetch(blob)\n"
        "for i, blob in enumerate(blobs):\n"
        " with blob.open() as file: assert file.read() == hashlib.shake_128(str(i).encode()).digest(30_000)\n"
        "fetcher.close()\n"
    )
    with FileServer(served) as server:
        command = [sys.executable, "-c", code, str(tmp_path / "cache"), server.url, str(tmp_path / "gate")]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "go\n"
        (tmp_path / "gate").touch()
        assert [process.wait(30) for process in processes] == [0, 0]
        assert server.media_bytes() == 30 * 30_000 and len(server.requests(media=True)) == 30
