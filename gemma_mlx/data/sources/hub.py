"""Dataset repositories on the Hugging Face Hub, by name, without `datasets`.

``hf://datasets/owner/name[@revision][/path]``: the data files of a split, by `gemma_mlx.data.sources.hub_layout`'s
conventions, or the file, pattern, folder or configuration that the path names. A branch or tag is pinned to its commit
when the source is opened; a full commit hash never asks the Hub twice. Files come through `huggingface_hub` into its
own cache (``HF_HOME``), with its token (``HF_TOKEN`` or ``hf auth login``), endpoint (``HF_ENDPOINT``) and
``HF_HUB_OFFLINE``. Media beside the rows come one by one, when they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from gemma_mlx.data.sources.cells import MEDIA_KINDS, kind_of
from gemma_mlx.data.sources.hub_layout import Listing, choose, suffix
from gemma_mlx.data.sources.table import Row, Table
from gemma_mlx.errors import InputError, SourceError
from gemma_mlx.files import cache_folder, write_whole

SYNTAX = "hf://datasets/owner/name[@revision][/path]"

_SOURCE = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DOWNLOADS = 4
"""Files that are downloaded at once."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A dataset repository at one commit.

    Attributes:
        repo: ``owner/name``.
        listing: its files.
        name: the source as the user gave it, for messages.
        cache: the hub cache's folder; None for the user's.
        endpoint: the Hub's address; None for the user's.
    """

    repo: str
    listing: Listing
    name: str
    cache: Path | None = None
    endpoint: str | None = None

    def file(self, path: str) -> Path:
        """A file of the repository, downloaded if it is not in the cache.

        Raises:
            InputError: no such file, or no access to it.
            SourceError: the Hub does not answer.
        """
        from huggingface_hub import hf_hub_download

        where = {"revision": self.listing.sha, "cache_dir": self.cache, "endpoint": self.endpoint}
        with _errors_told(self.name, path):
            return Path(hf_hub_download(self.repo, path, repo_type="dataset", **where))


@dataclass(frozen=True, slots=True)
class HubBlob:
    """A file of a repository, downloaded when it is first opened or measured."""

    repository: Repository
    path: str

    @property
    def name(self) -> str:
        return f"hf://datasets/{self.repository.repo}@{self.repository.listing.sha[:12]}/{self.path}"

    @property
    def suffix(self) -> str:
        return suffix(self.path)

    def size(self) -> int:
        return self.repository.file(self.path).stat().st_size

    def open(self) -> BinaryIO:
        return self.repository.file(self.path).open("rb")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files with a split's rows.

    Attributes:
        repository: where they come from, at its commit.
        names: their paths in it, in order.
        paths: the same files on this machine.
    """

    repository: Repository
    names: tuple[str, ...]
    paths: tuple[Path, ...]

    @property
    def sha(self) -> str:
        return self.repository.listing.sha


def hub_files(
    repo: str,
    revision: str | None = None,
    split: str = "train",
    path: str = "",
    *,
    cache: Path | None = None,
    endpoint: str | None = None,
    name: str = "",
) -> HubFiles:
    """Find and download the files with a split's rows.

    Args:
        repo: ``owner/name``.
        revision: a branch, tag or commit; None for ``main``.
        split: ``train``, ``validation``, ``test`` or another that the repository has.
        path: a file, pattern, folder or configuration; "" for the whole repository.
        cache: the hub cache's folder; None for the user's.
        endpoint: the Hub's address; None for the user's.
        name: the source, for messages.

    Raises:
        InputError: no such repository, revision, file or split, no access, or files of several kinds.
        SourceError: the Hub does not answer.
    """
    name = name or f"hf://datasets/{repo}{f'@{revision}' if revision else ''}{f'/{path}' if path else ''}"
    repository = Repository(repo, _listing(repo, revision, name, endpoint), name, cache, endpoint)
    names = choose(repository.listing, path, split, name)
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return HubFiles(repository, tuple(names), tuple(pool.map(repository.file, names)))


def hub_tables(source: str, split: str, opener: Callable[..., Table]) -> tuple[Table, ...]:
    """The tables of ``hf://datasets/…``.

    Args:
        source: see the top of this file.
        split: as for `hub_files`.
        opener: (path, name, base) -> the table in a file.

    Raises:
        InputError: it is no such source; else as `hub_files` and the opener.
    """
    found = _SOURCE.fullmatch(source)
    path = unquote(found["path"] or "").strip("/") if found else ""
    if not found or ".." in path.split("/") or "\\" in path:
        raise InputError(f"{source}: not a dataset of the Hub; write {SYNTAX}")
    files = hub_files(found["repo"], found["revision"] and unquote(found["revision"]), split, path, name=source)
    at = f"hf://datasets/{files.repository.repo}@{files.sha[:12]}"
    tables = []
    for inside, local in zip(files.names, files.paths, strict=True):
        table = opener(local, f"{at}/{inside}", str(local.parent))
        tables.append(HubTable(table, files.repository, inside))
    return tuple(tables)


class HubTable:
    """A table of a repository whose media may be files of the repository.

    Where a cell, or a text inside it, is the path of a medium among the repository's files, relative to the table's
    own folder or to the repository, a `HubBlob` takes its place. A column ``file_name`` (or ``…_file_name``) becomes
    ``audio_path``, ``image_path`` or ``video_path`` by what it names.
    """

    def __init__(self, table: Table, repository: Repository, path: str):
        self._table, self._repository, self._folder = table, repository, posixpath.dirname(path)
        self._files = frozenset(repository.listing.files)
        self.name, self.base, self.units = table.name, table.base, table.units
        self.columns: tuple[str, ...] = tuple(table.columns)
        if any(map(_is_reference, table.columns)):
            there = {kind_of(suffix(file)) for file in repository.listing.files}
            kinds = [f"{kind}_path" for kind in MEDIA_KINDS if kind in there]
            rest = [column for column in table.columns if not _is_reference(column)]
            self.columns = tuple(dict.fromkeys([*kinds, *rest]))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        row = self._table[index]
        values = {key: self._resolved(cell) for key, cell in row.values.items() if not _is_reference(key)}
        for column in filter(_is_reference, row.values):
            for kind, media in self._named(row.values[column], column, row.where).items():
                if values.get(kind):
                    raise InputError(f"{row.where}: {column} and another column both give {kind}; keep one")
                values[kind] = media[0] if len(media) == 1 else media
        return Row(values, row.where)

    def fingerprint(self) -> str:
        """The table's own, and the repository's commit: media are pinned by it."""
        return hashlib.sha256(f"{self._repository.listing.sha} {self._table.fingerprint()}".encode()).hexdigest()

    def _resolved(self, cell: Any) -> Any:
        if isinstance(cell, str):
            return self._blob(cell) or cell if kind_of(suffix(cell)) else cell
        if isinstance(cell, list):
            return [self._resolved(item) for item in cell]
        if isinstance(cell, dict):
            return {key: self._resolved(item) for key, item in cell.items()}
        return cell

    def _blob(self, cell: str) -> HubBlob | None:
        for start in (self._folder, ""):
            path = posixpath.normpath(posixpath.join(start, cell.strip()))
            if path in self._files:
                return HubBlob(self._repository, path)
        return None

    def _named(self, cell: Any, column: str, where: str) -> dict[str, list[HubBlob]]:
        """``audio_path`` and the like -> the media that a file name, or a list of them, stands for."""
        media: dict[str, list[HubBlob]] = {}
        for file in cell if isinstance(cell, list) else [cell] if cell else []:
            found = self._resolved(file)
            if not isinstance(found, HubBlob):
                told = repr(file)[:100]
                raise InputError(f"{where}: {column} {told}: no such audio, image or video in {self._repository.repo}")
            media.setdefault(f"{kind_of(found.suffix)}_path", []).append(found)
        return media


def _is_reference(column: str) -> bool:
    return column in ("file_name", "file_names") or column.endswith(("_file_name", "_file_names"))


def _listing(repo: str, revision: str | None, name: str, endpoint: str | None) -> Listing:
    """The repository's files; of a commit, or offline, as the Hub last told."""
    from huggingface_hub import HfApi, constants

    where = endpoint or constants.ENDPOINT
    digest = hashlib.sha256(f"{where} {repo} {revision}".encode()).hexdigest()[:16]
    kept = cache_folder() / "hub" / f"{repo.replace('/', '--')}-{digest}.json"
    if kept.is_file() and (constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(revision or "")):
        told = json.loads(kept.read_bytes())
        return Listing(told["sha"], tuple(told["files"]), tuple(told["configs"]))
    with _errors_told(name):
        info = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision)
    card = info.card_data.to_dict() if info.card_data else {}
    configs = [config for config in card.get("configs") or [] if isinstance(config, dict)]
    told = {"sha": info.sha, "files": sorted(file.rfilename for file in info.siblings or []), "configs": configs}
    with contextlib.suppress(OSError):  # a home that cannot be written is no reason to fail
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(told).encode())
    return Listing(told["sha"], tuple(told["files"]), tuple(configs))


@contextlib.contextmanager
def _errors_told(name: str, path: str = "") -> Iterator[None]:
    """Turn what `huggingface_hub` raises into an `InputError` or, where the Hub failed, a `SourceError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        told = _told(e, name, path)
        if told is None:
            raise
        raise told from None


def _told(e: Exception, name: str, path: str) -> InputError | None:
    from huggingface_hub import constants, errors

    what = f"{name}: {path}" if path and not name.endswith(path) else name
    status = getattr(getattr(e, "response", None), "status_code", None)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(e, errors.GatedRepoError):
        return InputError(f"{name}: a gated dataset; accept its conditions on its page on the Hub, and {login}")
    if isinstance(e, errors.RepositoryNotFoundError):
        return InputError(f"{name}: no such dataset on the Hub, or a private one: check the name, or {login}")
    if isinstance(e, errors.RevisionNotFoundError):
        return InputError(f"{name}: no such revision; give a branch, a tag or a commit that the dataset has")
    if isinstance(e, errors.RemoteEntryNotFoundError):
        return InputError(f"{what}: no such file in the dataset")
    if isinstance(e, errors.HFValidationError):
        return InputError(f"{name}: not a name of a dataset; write {SYNTAX}")
    if isinstance(e, errors.DisabledRepoError) or status in (401, 403):
        return InputError(f"{what}: the Hub gives no access (HTTP {status}); {login}, with a token that may read it")
    if constants.HF_HUB_OFFLINE and isinstance(e, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return InputError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set; unset it once to download")
    if isinstance(e, OSError) and e.errno is not None and not isinstance(e, ConnectionError):
        return SourceError(f"{what}: cannot be written to the Hub's cache ({e.strerror}); free space or set HF_HOME")
    cause = e.__cause__ if isinstance(e, errors.LocalEntryNotFoundError) and e.__cause__ else e
    client = type(cause).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
    if client or isinstance(e, errors.HfHubHTTPError | OSError):
        why = f"HTTP {status}" if status else (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        return SourceError(f"{what}: the Hub does not answer ({why}); try again later")
    return None
