"""Which files of a dataset repository are the rows of a split, by the Hugging Face Hub's conventions.

- What the repository's card declares (``configs:`` with ``data_files:``) counts first.
- Else a file belongs to the split that its name or a folder's says: ``test.csv``, ``train/…``,
  ``data/train-00000-of-00002.parquet``. The words are those of `WORDS`; ``data/NAME-00000-of-00002.parquet`` makes a
  split of any other NAME.
- Where no file names a split, all of them are ``train``.
- All files of a split are of one kind; several kinds are an error, never a mixture.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_mlx.data.sources.cells import kind_of
from gemma_mlx.errors import InputError

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".tar", ".txt")
"""Suffixes of files of rows."""
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)data/([\w.]+)-\d{5}-of-\d{5}[^/]*$")
_NO_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}
WILD = re.compile(r"[*?\[{]")
"""What makes a name a pattern."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit.

    Attributes:
        sha: the commit.
        files: paths of all files.
        configs: what the card declares, as written there.
    """

    sha: str
    files: tuple[str, ...]
    configs: tuple[Mapping[str, Any], ...] = ()


def choose(listing: Listing, path: str, split: str, name: str) -> list[str]:
    """The files with a split's rows, in the order of their paths.

    Args:
        listing: the repository.
        path: "" for all of it, a file, a pattern (``*``, ``?``, ``**``, ``{a,b}``), a folder, or a configuration of the
            card. A file and a pattern stand for themselves, whatever their split.
        split: ``train``, ``validation`` (also ``valid``, ``val``, ``dev``), ``test`` or another name.
        name: the source, for messages.

    Raises:
        InputError: nothing at this path, no data files, no such split, several configurations or several kinds.
    """
    if path in listing.files:
        return _one_kind([path], name)
    if WILD.search(path):
        found = [file for file in listing.files if _pattern(path).fullmatch(file)]
        if not found:
            raise InputError(f"{name}: no file matches {path}; the repository has {_some(listing.files)}")
        return _one_kind(_rows(found) or found, name)
    split = next((standard for standard, words in WORDS.items() if split in words), split)
    declared = _declared(listing, path, name)
    if declared is not None:
        return _one_kind(_of_split(declared, split, name), name)
    below = [file for file in listing.files if not path or file.startswith(f"{path.rstrip('/')}/")]
    if not below:
        raise InputError(f"{name}: no {path or 'file'} in the repository; it has {_some(listing.files)}")
    rows = _rows(below)
    if not rows:
        raise InputError(
            f"{name}: no data files ({', '.join(KINDS)}), only {_some(below)}; download the repository "
            "(hf download --repo-type dataset --local-dir FOLDER ...) and give FOLDER"
        )
    return _one_kind(_of_split(_by_split(rows), split, name), name)


def _rows(files: Iterable[str]) -> list[str]:
    """The files that may hold rows. Texts do only where nothing else does: they are notes, or stand beside media."""
    seen = [file for file in files if not any(part.startswith((".", "__")) for part in file.split("/"))]
    data = [f for f in seen if suffix(f) in KINDS and posixpath.basename(f) not in _NO_ROWS]
    tables = [file for file in data if suffix(file) != ".txt"]
    if tables or any(kind_of(suffix(file)) for file in seen):
        return sorted(tables)
    return sorted(
        f for f in data if not re.match(r"(readme|licen[cs]e|requirements|notice)", posixpath.basename(f), re.I)
    )


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files: by shards' names, else by file names, else by folders; all are ``train`` if none says."""
    found: dict[str, list[str]] = {}
    for file in files:
        shard = _SHARD.search(file)
        split = shard[1] if shard else _split_of(posixpath.basename(file)) or _split_of(posixpath.dirname(file))
        split = next((standard for standard, words in WORDS.items() if split in words), split)
        found.setdefault(split, []).append(file)
    if set(found) == {""}:
        return {"train": list(files)}
    found.pop("", None)
    return found


def _split_of(text: str) -> str:
    """The split that a file's or folder's name says, "" if none: a word of `WORDS` between anything but letters."""
    for split, words in WORDS.items():
        if re.search(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?:[^a-z]|$)", text.lower()):
            return split
    return ""


def _of_split(splits: Mapping[str, list[str]], split: str, name: str) -> list[str]:
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}; the repository has {', '.join(sorted(splits))}")
    return splits[split]


def _declared(listing: Listing, path: str, name: str) -> dict[str, list[str]] | None:
    """Split -> files of the card's configuration; None where the card declares none or `path` is a folder."""
    configs = {str(c.get("config_name", "default")): c for c in listing.configs if c.get("data_files")}
    if path and path not in configs:
        return None
    default = [key for key, config in configs.items() if config.get("default") or key == "default"]
    chosen = path or (default[0] if default else next(iter(configs), ""))
    if not chosen:
        return None
    if not path and not default and len(configs) > 1:
        raise InputError(f"{name}: has several configurations; name one after a slash: {', '.join(sorted(configs))}")
    splits: dict[str, list[str]] = {}
    for split, patterns in _patterns(configs[chosen]["data_files"]):
        folder = str(configs[chosen].get("data_dir") or "")
        wanted = [_pattern(posixpath.normpath(posixpath.join(folder, pattern))) for pattern in patterns]
        files = [file for file in listing.files if any(p.fullmatch(file) for p in wanted)]
        if not files:
            raise InputError(f"{name}: the card's {', '.join(patterns)} matches no file; name the files after a slash")
        splits[next((s for s, words in WORDS.items() if split in words), split)] = sorted(_rows(files) or files)
    return splits


def _patterns(data_files: Any) -> Iterable[tuple[str, list[str]]]:
    """(split, patterns) of a card's ``data_files``: a pattern, patterns, or a list of splits with theirs."""
    listed = [data_files] if isinstance(data_files, str | Mapping) else list(data_files)
    if all(isinstance(entry, str) for entry in listed):
        return [("train", listed)]
    entries = [entry for entry in listed if isinstance(entry, Mapping) and entry.get("path")]
    return [
        (str(e.get("split", "train")), [e["path"]] if isinstance(e["path"], str) else [*e["path"]]) for e in entries
    ]


def _one_kind(files: list[str], name: str) -> list[str]:
    kinds = sorted({suffix(file) or posixpath.basename(file) for file in files})
    if len(kinds) > 1:
        raise InputError(f"{name}: has files of several kinds ({', '.join(kinds)}); name one kind: …/**{kinds[0]}")
    if kinds[0] not in KINDS:
        raise InputError(f"{name}: {kinds[0]} is no known kind of data; expected {', '.join(KINDS)}")
    return sorted(files)


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob over paths: ``*`` and ``?`` stay within a folder, ``**/`` crosses folders, ``{a,b}`` is either."""
    text, depth = "", 0
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[{},]|[^*?\[{},]+|\[", glob):
        if piece in ("{", "}"):
            depth += 1 if piece == "{" else -1
            text += "(?:" if piece == "{" else ")"
        elif piece == ",":
            text += "|" if depth else ","
        elif piece.startswith("[") and len(piece) > 1:
            negated = piece[1] == "!"
            text += f"[{'^' * negated}{re.escape(piece[1 + negated : -1]).replace(chr(92) + '-', '-')}]"
        else:
            text += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
    try:
        return re.compile(text)
    except re.error:
        raise InputError(f"{glob}: not a pattern; close every bracket") from None


def _some(files: Sequence[str]) -> str:
    """A few names, for messages."""
    shown = [file for file in files if not file.startswith(".")]
    return f"{', '.join(shown[:4]) or 'no files'}{f' and {len(shown) - 4} more' if len(shown) > 4 else ''}"


def suffix(file: str) -> str:
    """``.wav`` of ``clips/A#1.WAV``."""
    return posixpath.splitext(file)[1].lower()
