"""Where a row's media are: inside the data's place and the media roots, and nowhere else unless a row gives a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from gemma_mlx.data.blob import Medium
from gemma_mlx.errors import InputError, SourceError

SCHEMES = ("https", "http", "gs")
"""URLs that a fetcher reads; what it refuses of them (hosts, redirects) is its own affair."""
_RESERVED = "%/:=&?~#+!$,;'@()*[]"
_UNPRINTABLE = re.compile(r"[\0-\x1f\x7f]")


class Folders:
    """Finds a row's media and keeps them inside the data's place and the media roots.

    A place is a folder of this machine or a URL up to a slash. A relative path is looked up in each folder in order;
    where none has it, it is taken to be below the first place that is a URL.

    Args:
        data: where the rows come from: the CSV's folder, or its URL up to the last slash.
        media_roots: further places. An absolute path is accepted inside any folder among them.
        fetcher: its ``blob(url)`` gives the `Blob` of a URL; None where only files can be read.

    Raises:
        InputError: a media root that is not there, or is a URL without a fetcher.
    """

    def __init__(self, data: str | Path, media_roots: Iterable[str | Path] = (), fetcher: Any = None):
        places = [data, *media_roots]
        for place in places[1:]:
            if scheme_of(str(place)):
                _check_scheme(str(place), f"--media-root {place}", fetcher)
            elif not Path(place).is_dir():
                raise InputError(f"--media-root {place}: no such folder; give an existing one")
        self.roots: list[str | Path] = [_url_root(p) if scheme_of(str(p)) else Path(p) for p in places]
        self._fetcher = fetcher
        self._urls = [root for root in self.roots if isinstance(root, str)]
        local = [root for root in self.roots if isinstance(root, Path)]
        self._inside = [(os.path.abspath(root), os.path.realpath(root)) for root in local]
        self._real_folders: dict[str, str] = {}

    def find(self, cell: str, column: str, where: str) -> Medium:
        """The medium that a cell names.

        Args:
            cell: a path, relative to the places or absolute inside a folder among them, or a URL.
            column: the cell's name, for messages.
            where: ``train.csv:8``, for messages.

        Raises:
            InputError: no such file, not a file, one outside the places (``..``, an absolute path, a link), or a URL
                of a kind that is not read.
        """
        told = f"{where}: {column} {shown(cell)}"
        if "\0" in cell:
            raise InputError(f"{told} contains a NUL character; give the path of a file")
        if scheme_of(cell):
            return self._fetched(cell, told)
        found = self._local(cell, told)
        return found if found is not None else self._fetched(_below(self._urls[0], cell, told), told)

    def _fetched(self, url: str, told: str) -> Medium:
        _check_scheme(url, told, self._fetcher)
        try:
            return self._fetcher.blob(_quoted(url, told))
        except SourceError:
            raise
        except InputError as e:
            raise InputError(f"{told}: {e}") from None

    def _local(self, cell: str, told: str) -> Path | None:
        """The file of this machine; None where there is none, but a place that is a URL may have it."""
        # Lexically first, so that a path outside is never even looked at.
        tries = (
            [os.path.abspath(cell)]
            if os.path.isabs(cell)
            else [os.path.normpath(os.path.join(lexical, cell)) for lexical, _ in self._inside]
        )
        # A root may itself be reached through a link (as /tmp is on a Mac), so both of its names count.
        inside = [path for path in tries if any(_within(path, root) for names in self._inside for root in names)]
        found = next((path for path in inside if os.path.exists(path)), None)
        if found is None and self._urls and not os.path.isabs(cell):
            return None
        if not inside or (found and not any(_within(self._real(found), real) for _, real in self._inside)):
            raise self._outside(told, " (through a symbolic link)" if found else "")
        if found is None:
            hint = "; write / between folders" if "\\" in cell else ""
            raise InputError(f"{told}: no such file in {self}{hint}; correct the path or add --media-root FOLDER")
        if not os.path.isfile(found):
            raise InputError(f"{told} is a folder; give the path of a file")
        return Path(found)

    def _outside(self, told: str, link: str = "") -> InputError:
        return InputError(
            f"{told} lies outside the data folder and media roots{link} ({self}); move the file there, or name "
            "its folder with --media-root"
        )

    def _real(self, path: str) -> str:
        """`path` without symbolic links; a folder is resolved once, since rows share folders."""
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def __str__(self) -> str:
        return ", ".join(str(root) for root in self.roots)


def scheme_of(name: str) -> str:
    """``https`` of ``https://host/a.wav``; "" of a path."""
    return name.split("://", 1)[0].lower() if "://" in name else ""


def shown(cell: str) -> str:
    """A cell in quotes, for messages; only the beginning of a long one."""
    return repr(cell if len(cell) <= 200 else f"{cell[:100]}…")


def _check_scheme(url: str, told: str, fetcher: Any) -> None:
    if fetcher is None:
        raise InputError(f"{told} is a URL; only files can be read: download it and give its path")
    if scheme_of(url) not in SCHEMES:
        raise InputError(f"{told}: {scheme_of(url)[:20]}:// is not read; give a path or an https:// or gs:// URL")


def _url_root(place: str | Path) -> str:
    return str(place) if str(place).endswith("/") else f"{place}/"


def _quoted(url: str, told: str) -> str:
    """A URL as a row gives it, with what may not stand in one percent-encoded; names of gs:// objects stay."""
    if _UNPRINTABLE.search(url) or "\\" in url:
        raise InputError(f"{told}: a URL holds no backslash and no control characters; correct it")
    return url if scheme_of(url) == "gs" else quote(url, safe=_RESERVED)


def _below(root: str, cell: str, told: str) -> str:
    """The URL of a relative path below a root.

    The path is a file's name, as on this machine: ``%``, ``#`` and ``?`` are characters of it. Servers may decode a
    path more than once, so none of its decoded forms may leave the root either.
    """
    for form in (cell, unquote(cell), unquote(unquote(cell))):
        if "\\" in form:
            raise InputError(f"{told}: no backslash may stand in a path below {root}; write / between folders")
        outside = posixpath.normpath(form).split("/")[0] == ".." or form.startswith("/")
        if outside or _UNPRINTABLE.search(form):
            raise InputError(f"{told} lies outside {root}; give a path below it, or its root with --media-root")
    path = posixpath.normpath(cell)
    if path == "." or cell.endswith("/"):
        raise InputError(f"{told} is a folder; give the path of a file")
    return root + (path if scheme_of(root) == "gs" else quote(path))


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
