"""What the self-test found on this machine: the ops whose kernels are right here, and faster than plain MLX.

A file in the user's cache folder, for each device, version of MLX and state of the kernels. Without it no kernel is
trusted: what never ran on a machine is not what trains on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import mlx.core as mx

from gemma_mlx.files import cache_folder, write_whole
from gemma_mlx.ops.sources import kernels_folder


@cache
def _identity() -> str:
    """Of the device, MLX, and every kernel's text."""
    info = mx.device_info()
    device = info.get("device_name") or info.get("architecture") or "unknown"
    digest = hashlib.sha256(f"{device}\n{mx.__version__}\n".encode())
    for file in sorted(kernels_folder().glob("*.*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def path() -> Path:
    """The file for this machine as it is now."""
    return cache_folder() / "kernels" / f"{_identity()}.json"


@cache
def trusted() -> frozenset[str]:
    """Names of the ops; none where no self-test has run, or its file cannot be read."""
    try:
        return frozenset(map(str, json.loads(path().read_text(encoding="utf-8"))["ops"]))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def tested() -> bool:
    """Whether a self-test has run."""
    return path().exists()


def trust(names: Iterable[str]) -> Path:
    """Remembers the ops, from now on in this process too; returns the file."""
    where = path()
    where.parent.mkdir(parents=True, exist_ok=True)
    write_whole(where, (json.dumps({"ops": sorted(names)}) + "\n").encode())
    trusted.cache_clear()
    return where
