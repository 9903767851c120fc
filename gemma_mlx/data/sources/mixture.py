"""Mixtures: a YAML file that names several sources of rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gemma_mlx.errors import InputError

KEYS = {"data", "weight", "columns", "media_root", "split"}


def read_mixture(path: str, open_parts: Callable[..., list[Any]], split: str) -> list[Any]:
    """The parts of a mixture, each with its weight and its own ``columns`` and ``media_root``.

    ``[{data: clinic.csv, weight: 2}, {data: hf://datasets/owner/name, weight: 0.1, columns: {text: sentence}}]``:
    an epoch sees each row of the first twice, and a tenth of the second. Paths start from the YAML file's folder.

    Raises:
        InputError: naming the file and the entry: no list, an unknown key, a weight that is not a positive number.
    """
    from dataclasses import replace

    found = []
    for i, entry in enumerate(_entries(path)):
        told = f"{path}: entry {i + 1}"
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
            raise InputError(f"{told}: expected `data: NAME` and perhaps `weight: 2`, found {str(entry)[:60]}")
        if unknown := set(map(str, entry)) - KEYS:
            raise InputError(f"{told}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(KEYS))}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
            raise InputError(f"{told}: weight is {weight!r}; expected a number above 0, the times an epoch sees it")
        source = _from_here(path, entry["data"])
        if source.lower().endswith((".yaml", ".yml")):
            raise InputError(f"{told}: a mixture of mixtures; name its sources here")
        options = {key: entry[key] for key in ("columns", "media_root") if entry.get(key)}
        if not isinstance(options.get("columns", {}), dict):
            raise InputError(f"{told}: columns is {entry['columns']!r}; expected `columns: {{text: sentence}}`")
        if roots := options.get("media_root"):
            options["media_root"] = [_from_here(path, str(r)) for r in (roots if isinstance(roots, list) else [roots])]
        for part in open_parts(source, split=str(entry.get("split", split))):
            found.append(replace(part, weight=float(weight), options=options))
    return found


def _entries(path: str) -> list[Any]:
    if "://" in path:
        raise InputError(
            f"{path}: a mixture is read from this machine alone; copy the file here, its sources may be URLs"
        )
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}: not YAML ({' '.join(str(e).split())[:200]})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of `- data: NAME`, a mixture's sources")
    return entries


def _from_here(path: str, name: str) -> str:
    return name if "://" in name else os.path.join(os.path.dirname(path), name)
