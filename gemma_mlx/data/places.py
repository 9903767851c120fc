"""Where a row's media are: inside the data folder and the media roots, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gemma_mlx.errors import InputError


class Folders:
    """Finds a row's media and keeps them inside the data folder and the media roots.

    Args:
        data: the CSV's folder; relative paths are looked up here first.
        media_roots: further folders, tried in order. An absolute path is accepted inside any of them.
    """

    def __init__(self, data: str | Path, media_roots: Iterable[str | Path] = ()):
        self.roots = [Path(data), *map(Path, media_roots)]
        for root in self.roots[1:]:
            if not root.is_dir():
                raise InputError(f"--media-root {root}: no such folder; give an existing one")
        self._inside = [(os.path.abspath(root), os.path.realpath(root)) for root in self.roots]
        self._real_folders: dict[str, str] = {}

    def _real(self, path: str) -> str:
        """`path` without symbolic links; a folder is resolved once, since rows share folders."""
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def find(self, cell: str, column: str, where: str) -> Path:
        """The file that a media cell names.

        Raises:
            InputError: no such file, not a file, or one outside the folders (``..``, an absolute path, a link).
        """
        told = f"{where}: {column} {cell!r}"
        if "://" in cell:
            raise InputError(f"{told} is a URL; only files can be read: download it and give its path")
        if "\0" in cell:
            raise InputError(f"{told} contains a NUL character; give the path of a file")
        # Lexically first, so that a path outside is never even looked at.
        tries = (
            [os.path.abspath(cell)]
            if os.path.isabs(cell)
            else [os.path.normpath(os.path.join(lexical, cell)) for lexical, _ in self._inside]
        )
        # A root may itself be reached through a link (as /tmp is on a Mac), so both of its names count.
        inside = [path for path in tries if any(_within(path, root) for names in self._inside for root in names)]
        found = next((path for path in inside if os.path.exists(path)), None)
        folders = ", ".join(str(root) for root in self.roots)
        if not inside or (found and not any(_within(self._real(found), real) for _, real in self._inside)):
            link = " (through a symbolic link)" if found else ""
            raise InputError(
                f"{told} lies outside the data folder and media roots{link} ({folders}); move the file there, or name "
                "its folder with --media-root"
            )
        if found is None:
            hint = "; write / between folders" if "\\" in cell else ""
            raise InputError(f"{told}: no such file in {folders}{hint}; correct the path or add --media-root FOLDER")
        if not os.path.isfile(found):
            raise InputError(f"{told} is a folder; give the path of a file")
        return Path(found)


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
