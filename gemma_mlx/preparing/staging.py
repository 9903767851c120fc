"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gemma_mlx.errors import InputError

REPORTS = frozenset({"report.json", "bad_rows.csv", "duplicates.csv", "token_lengths.png", "durations.png"})
"""Files that tell about data. A folder with nothing else in it may be replaced, so that mistakes can be mended and the
same command given again."""
DOWNLOADS = "downloads"
_LOCK = "lock"
_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Staging:
    """The folder beside `out` in which everything is made.

    Attributes:
        path: where to write.
        downloads: files fetched from elsewhere; they outlive an interruption and are gone when `out` appears.
    """

    def __init__(self, out: Path):
        self.out = out
        self.path = out.parent / f".{out.name}.partial"
        self.downloads = self.path / DOWNLOADS

    def publish(self, finished: bool) -> None:
        """Make `path` the folder `out`, all at once.

        Args:
            finished: the downloads have served; else they stay for the next run.
        """
        whole = self.out.parent / f".{self.out.name}.whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        for item in self.path.iterdir():
            if item.name not in (DOWNLOADS, _LOCK):
                item.rename(whole / item.name)
        if self.out.exists():
            old = self.out.parent / f".{self.out.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            whole.rename(self.out)
            shutil.rmtree(old)
        else:
            whole.rename(self.out)
        if finished:
            shutil.rmtree(self.downloads, ignore_errors=True)

    def clear(self) -> None:
        """Remove all but the lock and the downloads."""
        for item in self.path.iterdir():
            if item.name not in (DOWNLOADS, _LOCK):
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def kept(self) -> int:
        """Files downloaded so far."""
        return sum(1 for file in self.downloads.rglob("*") if file.is_file()) if self.downloads.is_dir() else 0


def check_out(out: Path) -> None:
    """Refuse a folder that holds data.

    Raises:
        InputError: `out` is a file, lies in no folder, or is not empty (an earlier report alone does not count).
    """
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder as {out.absolute().parent}; make it first")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} is no folder; give another name")
    names = {item.name for item in out.iterdir()} if out.is_dir() else set()
    if names and not (names <= REPORTS and "report.json" in names):
        other = min(names - REPORTS, default=min(names))
        raise InputError(f"--out {out} is not empty (it holds {other}); give a new folder or empty this one")


@contextmanager
def staging(out: Path) -> Iterator[Staging]:
    """A `Staging` for `out`; what was not published is removed, but for downloads that a next run can use.

    Raises:
        InputError: as `check_out`, or another process is at it.
    """
    out = Path(out).absolute()
    check_out(out)
    made = Staging(out)
    try:
        made.path.mkdir(exist_ok=True)
        with (made.path / _LOCK).open("w") as lock:
            _take(lock, made)
            made.clear()
            try:
                yield made
            finally:
                made.clear()
                if not made.kept():
                    shutil.rmtree(made.path)
    except OSError as e:
        if e.errno not in _THE_DISK:
            raise
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def _take(lock: TextIO, made: Staging) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"--out {made.out}: another process is preparing it ({made.path}); wait for its end") from None
