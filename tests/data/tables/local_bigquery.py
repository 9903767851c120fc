"""A BigQuery emulator (local-bigquery, from PyPI) as a process of its own, where it has been installed.

``python tests/data/tables/local_bigquery.py`` installs it into a folder of the user's cache (``LOCAL_BIGQUERY`` names
another): a virtual environment of Python 3.13, which it needs, with version 0.3.2, DuckDB 1.5.5 and DuckDB's extensions
from PyPI, since DuckDB would download them by itself. Without Python 3.13 it says so and installs nothing; tests that
need the emulator are then skipped.

It runs GoogleSQL on DuckDB behind BigQuery's own REST and gRPC protocols, so tables, views, queries, types and errors
are not ours. What it lacks (permissions, sessions that expire, broken streams) is in fake_bigquery.py.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HOME = Path(os.environ.get("LOCAL_BIGQUERY") or Path.home() / ".cache" / "gemma_mlx_tests" / "local_bigquery")
PYTHON = HOME / "bin" / "python"
EXTENSIONS = ("ducklake", "icu", "spatial")
PACKAGES = ("local-bigquery==0.3.2", "duckdb==1.5.5", *(f"duckdb-extension-{name}==1.5.5" for name in EXTENSIONS))
READY = HOME / "ready"
"""Written last, so that an installation that was cut short does not count."""


def python_3_13():
    """A Python 3.13, or None; pyenv's shims stand for a Python that may not be selected."""
    names = [shutil.which("python3.13")]
    if pyenv := shutil.which("pyenv"):
        roots = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.split()
        names += [path / "bin" / "python3.13" for root in roots for path in Path(root).glob("versions/3.13*")]
    for name in filter(None, names):
        if subprocess.run([name, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(name)
    return None


def install():
    """Install the emulator; whether it is there afterwards."""
    if READY.exists():
        return True
    python = python_3_13()
    if python is None:
        print("local-bigquery needs Python 3.13, which is not here; its tests will be skipped")
        return False
    subprocess.run([python, "-m", "venv", "--clear", HOME], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    # DuckDB looks for extensions in ~/.duckdb of the HOME that the emulator is started with.
    ask = "import duckdb; print(duckdb.sql('PRAGMA platform').fetchone()[0])"
    platform = subprocess.run([PYTHON, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    folder = HOME / ".duckdb" / "extensions" / "v1.5.5" / platform
    folder.mkdir(parents=True)
    for file in HOME.glob("lib/python3.13/site-packages/duckdb_extension_*/extensions/v1.5.5/*.duckdb_extension"):
        shutil.copy(file, folder)
    READY.touch()
    return True


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(data):
    """Start the emulator on the folder `data`; gives the environment that names it, and ends it afterwards."""
    rest, grpc = _free_port(), _free_port()
    command = [HOME / "bin" / "local-bigquery", "--host", "127.0.0.1", "--data-dir", data]
    with (data / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(rest), "--grpc-port", str(grpc)],
            env={"HOME": str(HOME), "PATH": os.environ["PATH"]}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{rest}/bigquery/v2/projects", server, data / "log")
        yield {
            "BIGQUERY_EMULATOR_HOST": f"http://127.0.0.1:{rest}",
            "BIGQUERY_STORAGE_EMULATOR_HOST": f"127.0.0.1:{grpc}",
        }
    finally:
        server.terminate()
        server.wait()


def _wait(url, server, log, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the emulator did not start:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    install()
    sys.exit(0)
