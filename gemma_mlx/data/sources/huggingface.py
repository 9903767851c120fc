"""Rows of a Hugging Face dataset: what ``save_to_disk`` wrote, or a name that ``load_dataset`` knows."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gemma_mlx.data.sources.arrow_cells import ArrowCells, microseconds
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError, SourceError

if TYPE_CHECKING:
    import datasets

_SAVED = ("state.json", "dataset_dict.json")


class HuggingFaceTable:
    """One split of a dataset, by the extra ``datasets``; its Arrow files are mapped, not read.

    Cells are as those of a Parquet file with the same columns: media as their bytes or paths, undecoded, and classes as
    their names. No code of a dataset is run. ``load_dataset`` keeps what it downloads and converts in its own cache.

    Args:
        path: a folder, or a name such as ``google/fleurs``.
        split: which one, where there are several; of a name also a slice, such as ``train[:1%]``.
        revision: of a name: a branch, tag or commit.
        config: of a name: which of its configurations, such as ``de_de``.
        name: what messages call it; the path if None.
        base: where relative media paths start; the folder, or for a name the working directory, if None.

    Raises:
        InputError: ``datasets`` is not installed; no such dataset, split, configuration or revision; damaged files; no
            rows; from a row, what `ArrowCells.values` refuses.
        SourceError: the Hub does not answer.
    """

    units = None

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        revision: str | None = None,
        *,
        config: str | None = None,
        name: str | None = None,
        base: str | None = None,
    ):
        folder = Path(path) if Path(path).is_dir() else None
        self.name = name if name is not None else str(path)
        self.base = base if base is not None else str(folder or ".")
        saved = folder is not None and any((folder / file).is_file() for file in _SAVED)
        found = _saved(folder, self.name) if saved else _loaded(str(path), split, revision, config, self.name)
        data, self._told = _one_split(found, split, self.name)
        if not data.column_names or not len(data):
            raise InputError(f"{self._told}: no rows; choose another split, or add at least one")
        self._fingerprint = str(data._fingerprint)
        self._data = data.with_format("arrow")
        schema = data.data.schema
        self._cells = ArrowCells(schema, data.features.to_dict())
        self._fine_times = microseconds(schema.empty_table()).schema != schema
        self.columns: tuple[str, ...] = self._cells.columns

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self._told}:{index + 1}"
        try:
            table = self._data[index]
            table = microseconds(table) if self._fine_times else table
        except Exception as e:  # readers raise anything on damaged files
            raise InputError(f"{where}: cannot be read ({_short(e)}); load the dataset again") from None
        return Row(self._cells.values(table.columns, 0, where), where)

    def fingerprint(self) -> str:
        """What `datasets` itself tells versions of a dataset apart by."""
        return self._fingerprint


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "Hugging Face datasets need the library datasets: pip install 'gemma-mlx[datasets]', or give Parquet files"
        ) from None
    return datasets


def _saved(folder: Path, name: str) -> Any:
    """What ``save_to_disk`` wrote."""
    library = _library()
    _check_files(folder, name)
    try:
        return library.load_from_disk(str(folder))
    except Exception as e:  # see `__getitem__`
        raise InputError(f"{name}: not a whole dataset of save_to_disk ({_short(e)}); save it again") from None


def _check_files(folder: Path, name: str) -> None:
    """Data files are named in ``state.json``; none may lie elsewhere."""
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if not state.is_file():
            continue
        try:
            files = json.loads(state.read_bytes())["_data_files"]
            paths = [PurePosixPath(file["filename"]) for file in files]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{name}: {state.name} is damaged; save the dataset again") from None
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            raise InputError(f"{name}: {state.name} names files outside the folder; save the dataset again")


def _loaded(path: str, split: str, revision: str | None, config: str | None, name: str) -> Any:
    """What ``load_dataset`` finds."""
    library = _library()
    try:
        return library.load_dataset(path, config, split=split, revision=revision)
    except ConnectionError as e:
        raise SourceError(f"{name}: the Hugging Face Hub does not answer ({_short(e)}); try again") from None
    except Exception as e:  # builders raise anything
        raise InputError(f"{name}: cannot be loaded by datasets ({_short(e)}); correct the name or the split") from None


def _one_split(found: Any, split: str, name: str) -> tuple[datasets.Dataset, str]:
    """(a split, what messages call it)."""
    if not isinstance(found, dict):
        return found, name
    if split not in found:
        raise InputError(
            f"{name}: no split {split!r}; found {', '.join(found)}: choose one of them (--train-split, --valid-split)"
        )
    return found[split], f"{name}/{split}"


def _short(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
