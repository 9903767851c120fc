"""Media that rows give as URLs -> files, a second time only where the first was not finished."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_mlx.data.blob import suffix_of
from gemma_mlx.data.examples import MEDIA
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError, SourceError


class Downloader:
    """Fetches a row's media before the row is read; may be called from several threads.

    ``audio_url``, ``image_url`` and ``video_url`` give way to ``audio_path`` and so on. A row that has a path keeps it.

    Args:
        folder: where files go; those of the right size there are kept.
        fetcher: its ``blob(url)`` gives the `Blob` of a URL.
        columns: standard name -> column, as the rows are read; a column that is read as it is stays as it is.
    """

    def __init__(self, folder: Path, fetcher: Any, columns: Mapping[str, str] | None = None):
        self.folder, self.fetcher = folder, fetcher
        columns = columns or {}
        paths = {f"{kind}_url": columns.get(f"{kind}_path") or f"{kind}_path" for kind in MEDIA}
        self._paths = {url: path for url, path in paths.items() if url not in columns.values()}
        folder.mkdir(exist_ok=True)

    def __call__(self, row: Row) -> Row:
        """The row with paths in the place of URLs.

        Raises:
            InputError: a URL cannot be fetched; prepare lists its row.
        """
        values = dict(row.values)
        for url_column, path_column in self._paths.items():
            url = values.get(url_column)
            if isinstance(url, str) and url.strip():
                del values[url_column]
                if not values.get(path_column):
                    values[path_column] = str(self._fetched(url.strip(), url_column, row.where))
        return Row(values, row.where)

    def _fetched(self, url: str, column: str, where: str) -> Path:
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(url.split("?")[0]).stem)[:60]
        name = f"{stem}-{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}{suffix_of(url)}"
        target = self.folder / name[-2 - len(suffix_of(url)) :][:2] / name
        try:
            blob = self.fetcher.blob(url)
            if not (target.is_file() and target.stat().st_size == blob.size()):
                target.parent.mkdir(exist_ok=True)
                self._copy(blob, target)
        except (SourceError, InputError) as e:
            reason = str(e).removeprefix(f"{where}: ")
            raise InputError(f"{where}: {column} cannot be fetched: {reason}") from None
        return target

    def _copy(self, blob: Any, target: Path) -> None:
        handle, part = tempfile.mkstemp(prefix=".", dir=target.parent)
        try:
            with blob.open() as source, os.fdopen(handle, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            os.replace(part, target)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
