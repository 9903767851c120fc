"""A run's state on disk: written whole or not at all, verified before it is used.

A checkpoint is a folder ``checkpoints/step-000100`` with the adapter's and the optimizer's arrays, ``state.json``
(everything else, JSON) and ``manifest.json`` with the sha256 of each file. It is written under a temporary name,
flushed to the disk and renamed, so a folder of that name is complete; the manifest finds later damage.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.errors import InputError
from gemma_mlx.files import file_digest, flush
from gemma_mlx.optim import Weights

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"step-(\d+)")


@dataclass
class Snapshot:
    """What a run needs to go on as if it had never stopped.

    ``weights``: the adapter's tensors by name; ``moments``: the optimizer's arrays, by kind ("m", "v", …) and name;
    ``state``: JSON values (step, data position, random seed, early stopping, length of metrics.jsonl, ...).
    """

    step: int
    weights: Weights
    moments: dict[str, Weights]
    state: dict[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete or whose bytes changed; the message says which file."""


def checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    folder = Path(run) / FOLDER
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))] if folder.is_dir() else []
    return [path for _, path in sorted(found)]


def save(run: str | Path, snapshot: Snapshot, keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the ``keep`` newest; returns its folder.

    A checkpoint of the same step is replaced. Leftovers of writes that were cut off are removed.
    """
    parent = Path(run) / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        mx.save_safetensors(str(part / ADAPTER), snapshot.weights)
        flat = {f"{kind}.{name}": a for kind, group in snapshot.moments.items() for name, a in group.items()}
        mx.save_safetensors(str(part / OPTIMIZER), flat)
        content = {"format": FORMAT, "step": snapshot.step, **snapshot.state}
        (part / STATE).write_text(json.dumps(content, indent=1))
        files = {name: file_digest(part / name) for name in (ADAPTER, OPTIMIZER, STATE)}
        (part / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": files}, indent=1))
        for name in (*files, MANIFEST):
            flush(part / name)
        part.chmod(0o755)
        flush(part)
        final = parent / f"step-{snapshot.step:06d}"
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        flush(parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path) -> Snapshot:
    """Read one checkpoint after checking every byte. Raises DamagedCheckpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["sha256"]
        if manifest["format"] != FORMAT or set(files) != {ADAPTER, OPTIMIZER, STATE}:
            raise DamagedCheckpoint(f"{folder / MANIFEST}: expected format {FORMAT}, found {manifest['format']}")
        for name, digest in files.items():
            if file_digest(folder / name) != digest:
                raise DamagedCheckpoint(f"{folder / name}: its bytes changed since it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder}: incomplete ({type(error).__name__}: {error})") from None
    state = json.loads((folder / STATE).read_text())
    moments: dict[str, Weights] = {}
    for name, value in mx.load(str(folder / OPTIMIZER)).items():
        kind, _, rest = name.partition(".")
        moments.setdefault(kind, {})[rest] = value
    weights = mx.load(str(folder / ADAPTER))
    mx.eval(weights, moments)  # reads are lazy, and the folder may be removed as newer ones come
    state.pop("format")
    return Snapshot(state.pop("step"), dict(weights), moments, state)


def newest(run: str | Path) -> tuple[Snapshot | None, list[str]]:
    """(the newest whole checkpoint or None, one line for each newer one that is damaged).

    Raises InputError if there are checkpoints and all are damaged.
    """
    warnings: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            return load(folder), warnings
        except DamagedCheckpoint as damage:
            warnings.append(f"skipped a damaged checkpoint: {damage}")
    if warnings:
        raise InputError(f"{run}: every checkpoint is damaged; the newest: {warnings[0]}; start another run folder")
    return None, warnings
