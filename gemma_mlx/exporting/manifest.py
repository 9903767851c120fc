"""What an export consists of, so that a later reader can tell whether it is whole: ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_mlx import __version__
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import Source
from gemma_mlx.files import file_digest, write_whole

MANIFEST = "manifest.json"
FORMAT = 1


def files_of(folder: Path) -> dict[str, Path]:
    """Path within the folder, with slashes -> file, of all but the manifest and what Git and the Hub keep there."""
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file() or p.is_symlink()}
    return {
        name.as_posix(): p
        for name, p in found.items()
        if name.as_posix() != MANIFEST and name.parts[0] not in (".cache", ".git", ".gitattributes")
    }


def bytes_of(folder: str | Path) -> int:
    """Bytes of all files of an export."""
    return sum(path.stat().st_size for path in files_of(Path(folder)).values() if path.exists())


def base_fingerprint(base: Path) -> str:
    """A digest of which weights and settings a base has, without reading the weights.

    Of a folder: its config.json, and the headers and sizes of its safetensors files (names, dtypes, shapes, places).
    Of a GGUF file: all its bytes.
    """
    if base.is_file():
        return "sha256:" + file_digest(base)
    digest = hashlib.sha256()
    for path in [base / "config.json", *sorted(base.glob("*.safetensors"))]:
        if not path.is_file():
            continue
        with path.open("rb") as f:
            head = f.read() if path.suffix == ".json" else _header(f.read(8), f)
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + head)
    return "headers:" + digest.hexdigest()


def _header(length: bytes, f: Any) -> bytes:
    return length + f.read(int.from_bytes(length, "little"))


def adapter_digest(adapter: Path | None) -> str | None:
    """A digest of an adapter's files, config and weights; None without one."""
    if adapter is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in adapter.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors")):
        digest.update(f"{path.name}\0{file_digest(path)}\0".encode())
    return "sha256:" + digest.hexdigest()


def write_manifest(folder: Path, source: Source, form: str, told: Callable[[int], None] | None = None) -> None:
    """Write manifest.json over every file that the folder holds now."""
    files = {
        name: {"sha256": file_digest(path, told), "bytes": path.stat().st_size}
        for name, path in files_of(folder).items()
    }
    content = {
        "format": FORMAT,
        "export": form,
        "gemma_mlx": __version__,
        "base": {
            "name": source.shown_name,
            "revision": source.revision,
            "fingerprint": base_fingerprint(source.base),
        },
        "adapter": adapter_digest(source.adapter),
        "step": source.step,
        "files": files,
    }
    write_whole(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def verify(folder: str | Path, told: Callable[[int], None] | None = None) -> list[str]:
    """A line for each file that is damaged, missing or extra; none where the export is whole.

    Raises:
        InputError: no manifest that can be read.
    """
    folder = Path(folder)
    listed, lines = read_manifest(folder)["files"], []
    found = files_of(folder)
    for name, entry in listed.items():
        path = found.get(name)
        if path is None or not path.exists():
            lines.append(f"{name}: missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            lines.append(f"{name}: damaged, {size} bytes instead of {entry['bytes']}")
        elif file_digest(path, told) != entry["sha256"]:
            lines.append(f"{name}: damaged, its bytes changed")
    return lines + [f"{name}: extra, not in the manifest" for name in found if name not in listed]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of manifest.json.

    Raises:
        InputError: it is not there, not readable, or of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        known = content["format"] == FORMAT and all({"sha256", "bytes"} <= entry.keys() for entry in files.values())
    except FileNotFoundError:
        raise InputError(f"{folder}: no export here ({MANIFEST} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
    if not known:
        raise InputError(f"{path}: format {content['format']!r}; this version reads {FORMAT}")
    return content
