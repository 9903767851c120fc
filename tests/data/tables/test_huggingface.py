"""Datasets of `datasets`: the rows that its Parquet export has, from folders and by name, from any thread."""

import builtins
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_mlx.data.blob import Embedded
from gemma_mlx.data.sources.huggingface import HuggingFaceTable
from gemma_mlx.data.sources.parquet import ParquetTable
from gemma_mlx.errors import InputError, SourceError

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def made(n=60):
    """A dataset with the features that media datasets have, as `datasets` stores them."""
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "images": datasets.List(datasets.Image()),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "seconds": datasets.Value("float32"),
            "at": datasets.Value("timestamp[ns]"),
            "mixed": datasets.Json(),
        }
    )
    rng = random.Random(2)
    audio = [{"bytes": b"fLaC" + rng.randbytes(50), "path": f"{i}.flac"} for i in range(n)]
    audio[1] = None
    columns = {
        "audio": audio,
        "images": [[{"bytes": b"\xff\xd8\xff" + rng.randbytes(9), "path": None}] * (i % 3) for i in range(n)],
        "text": [f"text {i} é" if i % 5 else None for i in range(n)],
        "label": [i % 2 for i in range(n)],
        "seconds": [i / 10 for i in range(n)],
        "at": [1_700_000_000_000_000_123 + i for i in range(n)],
        "mixed": [json.dumps({"a": i} if i % 2 else [i]) for i in range(n)],
    }
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns, features.arrow_schema)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface")
    whole = made()
    whole.save_to_disk(str(folder / "one"))
    splits = {"train": whole, "validation": whole.select([5, 3, 4])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "two"))
    pq.write_table(whole.data.table, folder / "one.parquet")
    return folder


def test_rows_equal_those_of_its_parquet_file(saved):
    """Row by row against the same table as Parquet, and the first two spelled out."""
    table, other = HuggingFaceTable(saved / "one"), ParquetTable(saved / "one.parquet", str(saved / "one"))
    assert table.columns == other.columns and len(table) == len(other) == 60
    assert [table[i] for i in range(60)] == [other[i] for i in range(60)]
    assert (table.name, table.base, table.units) == (str(saved / "one"), str(saved / "one"), None)
    where, stored = f"{saved / 'one'}:5", made().data.table.slice(4, 1).to_pylist()[0]
    assert table[4].where == where
    assert table[4].values == {
        "audio": Embedded(f"{where} audio", stored["audio"]["bytes"], ".flac"),
        "images": [Embedded(f"{where} images", stored["images"][0]["bytes"], ".jpg")],
        "text": "text 4 é",
        "label": "no",
        "seconds": "0.4",
        "at": "2023-11-14 22:13:20",
        "mixed": [4],
    }
    assert (table[1].values["audio"], table[0].values["text"]) == ("", "")
    with pytest.raises(IndexError):
        table[60]


def test_splits(saved):
    train, valid = HuggingFaceTable(saved / "two"), HuggingFaceTable(str(saved / "two"), "validation")
    assert (len(train), len(valid)) == (60, 3)
    assert [valid[i].values["text"] for i in range(3)] == ["", "text 3 é", "text 4 é"]
    assert valid[0].where == f"{saved / 'two'}/validation:1"
    with pytest.raises(InputError, match=r"found train, validation: choose one of them \(--train-split, "):
        HuggingFaceTable(saved / "two", "test")
    named = HuggingFaceTable(saved / "two", "validation", name="mine", base="/media")
    assert (named.name, named.base, named[1].where) == ("mine", "/media", "mine/validation:2")


def test_eight_threads_read_what_one_reads(saved):
    table = HuggingFaceTable(saved / "one")
    alone = [table[i] for i in range(60)]

    def read(seed):
        order = random.Random(seed).choices(range(60), k=300)
        return all(table[i] == alone[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_fingerprint_is_that_of_datasets(saved, tmp_path):
    shutil.copytree(saved / "one", tmp_path / "copy")
    fingerprint = HuggingFaceTable(tmp_path / "copy").fingerprint()
    assert fingerprint == datasets.load_from_disk(str(saved / "one"))._fingerprint
    assert fingerprint == HuggingFaceTable(saved / "one").fingerprint()
    made(59).save_to_disk(str(tmp_path / "other"))
    assert HuggingFaceTable(tmp_path / "other").fingerprint() != fingerprint


def test_by_name_through_load_dataset(saved, tmp_path, monkeypatch):
    """A folder of Parquet files stands for a repository: the same loader, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    shutil.copy(saved / "one.parquet", tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    table, other = HuggingFaceTable(tmp_path / "repo", name="x"), HuggingFaceTable(saved / "one", name="x")
    assert [table[i] for i in range(60)] == [other[i] for i in range(60)]
    assert len(HuggingFaceTable(tmp_path / "repo", "train[:10]")) == 10
    rows = pa.table(
        {"audio": [{"bytes": None, "path": "clips/2.wav"}]}, datasets.Features({"audio": datasets.Audio()}).arrow_schema
    )
    (tmp_path / "paths").mkdir()
    pq.write_table(rows, tmp_path / "paths" / "train.parquet")
    assert HuggingFaceTable(tmp_path / "paths")[0].values == {"audio": {"path": "clips/2.wav"}}
    with pytest.raises(InputError, match=r"Unknown split .*train"):
        HuggingFaceTable(tmp_path / "repo", "test")


@pytest.mark.parametrize(
    ("error", "kind"), [(ConnectionError("no\nroute"), SourceError), (ValueError("Config name is missing"), InputError)]
)
def test_errors_of_loading_are_one_line(monkeypatch, error, kind):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match=r"^owner/name: ") as caught:
        HuggingFaceTable("owner/name", revision="v1", config="de")
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert asked == [(("owner/name", "de"), {"split": "train", "revision": "v1"})]  # nothing that runs foreign code


def test_refuses_damaged_folders(saved, tmp_path):
    def copy(name, change):
        shutil.copytree(saved / "one", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    (data,) = (saved / "one").glob("*.arrow")
    half = copy("half", lambda f: (f / data.name).write_bytes(data.read_bytes()[:2_000]))
    gone = copy("gone", lambda f: (f / data.name).unlink())
    for folder in (half, gone):
        with pytest.raises(InputError, match="not a whole dataset of save_to_disk") as caught:
            HuggingFaceTable(folder)
        assert "\n" not in str(caught.value)
    state = json.loads((saved / "one" / "state.json").read_text())
    for i, filename in enumerate(("../one/" + data.name, str(data), 3)):
        text = json.dumps(state | {"_data_files": [{"filename": filename}]})
        folder = copy(f"out{i}", lambda f, text=text: (f / "state.json").write_text(text))
        with pytest.raises(InputError, match="names files outside" if i < 2 else "state.json is damaged"):
            HuggingFaceTable(folder)


def test_refuses_splits_without_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made().select([]))
    with pytest.raises(InputError, match=r"^owner/name: no rows; choose another split"):
        HuggingFaceTable("owner/name")


def test_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "datasets":
            raise ImportError
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'gemma-mlx\[datasets\]'"):
        HuggingFaceTable("owner/name")
