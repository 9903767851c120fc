"""Folders of media: rows equal what `datasets` finds in them; what is not in order gets one line."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.folder import FolderTable
from gemma_mlx.data.sources.parquet import ParquetTable
from gemma_mlx.errors import InputError


def lay(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows(table):
    return [table[i].values for i in range(len(table))]


PNG = b"\x89PNG\r\n\x1a\n"


def test_texts_beside_media(tmp_path):
    lay(
        tmp_path,
        {
            "b.wav": b"",
            "b.txt": "\ufeffsecond\r\n",
            "a-b.FLAC": b"",
            "a-b.TXT": "first",
            "sub/é#1.v2.mp3": b"",
            "sub/é#1.v2.txt": "ü",
            "pair.png": PNG,
            "pair.wav": b"",
            "pair.txt": "both\n\n",
            ".hidden/x.wav": b"",
            ".b.wav": b"",
            "README.md": "nothing",
        },
    )
    table = FolderTable(tmp_path)
    assert (table.columns, table.units, table.base) == (("image_path", "audio_path", "text"), None, str(tmp_path))
    assert rows(table) == [
        {"audio_path": "a-b.FLAC", "text": "first"},
        {"audio_path": "b.wav", "text": "second"},
        {"image_path": "pair.png", "audio_path": "pair.wav", "text": "both"},
        {"audio_path": "sub/é#1.v2.mp3", "text": "ü"},
    ]
    assert [table[i].where for i in (0, 3)] == [f"{tmp_path}/a-b.FLAC", f"{tmp_path}/sub/é#1.v2.mp3"]
    found = Folders(table.base).find(table[3].values["audio_path"], "audio_path", table[3].where)
    assert found == tmp_path / "sub" / "é#1.v2.mp3"
    named = FolderTable(tmp_path, "clips/", "https://example.org/")
    assert (named[0].where, named.base) == ("clips/a-b.FLAC", "https://example.org/")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_metadata_in_each_format(tmp_path, form):
    records = [
        {"file_name": "a/1.wav", "text": "one", "extra_file_name": "1.png", "n": "1"},
        {"file_name": "2.mp4", "text": "two", "extra_file_name": "", "n": ""},
    ]
    lay(tmp_path, {"a/1.wav": b"", "1.png": PNG, "2.mp4": b"", "not_listed.wav": b""})
    path = tmp_path / f"metadata.{form}"
    if form == "csv":
        path.write_text("\n".join(",".join(r) for r in [records[0], *(list(r.values()) for r in records)]) + "\n")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    table = FolderTable(tmp_path)
    assert table.columns == ("image_path", "video_path", "audio_path", "text", "n")
    assert rows(table) == [
        {"image_path": "1.png", "audio_path": "a/1.wav", "text": "one", "n": "1"},
        {"video_path": "2.mp4", "text": "two", "n": ""},
    ]
    assert table[1].where == f"{path}:{3 if form == 'csv' else 2}"


def test_metadata_of_several_folders_and_lists_of_files(tmp_path):
    lay(
        tmp_path,
        {
            "x/metadata.jsonl": '{"file_names": ["1.png", "more/2.png"], "text": "a"}\n'
            '{"file_name": "https://example.org/3.png", "text": "b"}\n',
            "x/1.png": PNG,
            "y/metadata.csv": "file_name,text\n4.wav,c\n/elsewhere/5.wav,d\n",
            "y/4.wav": b"",
        },
    )
    assert rows(FolderTable(tmp_path)) == [
        {"image_path": ["x/1.png", "x/more/2.png"], "text": "a"},
        {"image_path": "https://example.org/3.png", "text": "b"},
        {"audio_path": "y/4.wav", "text": "c"},
        {"audio_path": "/elsewhere/5.wav", "text": "d"},
    ]


def test_stretches_of_a_parquet_file_remain(tmp_path):
    lay(tmp_path, {"1.png": PNG})
    columns = {"file_name": ["1.png"] * 10, "raw": [b"\xff"] * 10}
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet", row_group_size=4)
    lay(tmp_path, {"x/metadata.csv": "file_name\n1.png\n", "y/metadata.jsonl": '{"file_name": "a.wav"}\n'})
    table, sizes = FolderTable(tmp_path), ParquetTable(tmp_path / "metadata.parquet").unit_bytes
    assert list(table.units) == [4, 4, 2, 1, 1] and sum(table.units) == len(table)
    assert table.unit_bytes == [*sizes, 512, 512]
    assert not hasattr(FolderTable(lay(tmp_path / "x", {"1.png": PNG})), "unit_bytes")


@pytest.fixture(scope="module")
def datasets():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def test_metadata_as_datasets_reads_it(tmp_path, datasets):
    rng = np.random.default_rng(0)
    folder, lines = tmp_path / "data", ["file_name,caption"]
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
        lines.append(f'{path.relative_to(folder)},"caption, {i}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    table = FolderTable(folder)
    ours = sorted((os.path.realpath(folder / r["image_path"]), r["caption"]) for r in rows(table))
    assert ours == sorted((os.path.realpath(r["image"]["path"]), r["caption"]) for r in theirs)


def test_class_folders_as_datasets_reads_them(tmp_path, datasets):
    folder = tmp_path / "data"
    for i in range(9):
        path = folder / ("cat", "dog", "a b")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    theirs, names = theirs.cast_column("image", datasets.Image(decode=False)), theirs.features["label"].names
    table = FolderTable(folder)
    assert table.columns == ("image_path", "label")
    ours = sorted((os.path.realpath(folder / r["image_path"]), r["label"]) for r in rows(table))
    assert ours == sorted((os.path.realpath(r["image"]["path"]), names[r["label"]]) for r in theirs)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no audio, images or videos"),
        ({"a.txt": "a"}, "no audio, images or videos"),
        ({"a.wav": b"", "b.wav": b"", "c.wav": b"", "c.txt": "c"}, "2 media without a text, such as 'a.wav'; put"),
        ({"a.wav": b"", "a.txt": "", "z/b.txt": ""}, "1 texts without a medium, such as 'z/b.txt'; put"),
        ({"a.wav": b"", "b.txt": ""}, "1 media without a text, such as 'a.wav' and 1 texts without a medium"),
        ({"a.wav": b"", "a.flac": b"", "a.txt": ""}, "a.flac and a.wav belong to the same text"),
        ({"a.wav": b"", "a.txt": "", "a.TXT": ""}, "two texts differ"),
        ({"a.wav": b"", "b.wav": b""}, "2 media and no texts"),
        ({"x/a.png": PNG, "x/b.png": PNG}, "2 media and no texts"),
        ({"x/a.png": PNG, "y/b.png": PNG, "c.png": PNG}, "3 media and no texts"),
        (
            {"a.wav": b"", "metadata.csv": "audio,text\na.wav,hi\n"},
            r"metadata.csv: no column file_name; found audio, text",
        ),
        ({"a.wav": b"", "metadata.csv": ""}, r"metadata.csv:1: the file is empty"),
        (
            {"a.wav": b"", "metadata.csv": "file_name\na.wav\n", "metadata.jsonl": "{}\n"},
            "metadata.csv and metadata.jsonl stand side by side",
        ),
    ],
)
def test_refuses_folders_that_are_not_in_order(tmp_path, files, says):
    lay(tmp_path, files)
    if sum(path.is_file() for path in tmp_path.rglob("*")) < len(files):
        pytest.skip("a file system to which a.txt is a.TXT")
    with pytest.raises(InputError, match=says) as caught:
        FolderTable(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "b.pdf"}', r"metadata.jsonl:2: file_name 'b.pdf' is no known kind"),
        ('{"file_name": {"a": 1}}', r"metadata.jsonl:2: file_name holds no name"),
        ('{"file_name": "a.wav", "audio_path": "b.wav"}', r"metadata.jsonl:2: audio_path and a file name both"),
    ],
)
def test_refuses_a_bad_row_alone(tmp_path, line, says):
    table = FolderTable(lay(tmp_path, {"a.wav": b"", "metadata.jsonl": f'{{"file_name": "a.wav"}}\n{line}\n'}))
    assert table[0].values == {"audio_path": "a.wav"}
    with pytest.raises(InputError, match=says):
        table[1]


def test_refuses_bad_texts_alone(tmp_path, monkeypatch):
    folder = lay(tmp_path / "in", {f"{n}.wav": b"" for n in "abcd"} | {"a.txt": b"caf\xe9", "b.txt": "x" * 101})
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder / "c.txt").symlink_to(secret)
    (folder / "d.txt").symlink_to(folder / "ok.text")
    (folder / "ok.text").write_text("fine")
    table = FolderTable(folder)
    monkeypatch.setattr("gemma_mlx.data.sources.cells.MAX_TEXT_BYTES", 100)
    for index, says in enumerate((r"a.txt: not UTF-8", r"b.txt: 101 bytes of text", r"c.txt: a link to outside")):
        with pytest.raises(InputError, match=says):
            table[index]
    assert table[3].values["text"] == "fine"
    (folder / "ok.text").unlink()
    with pytest.raises(InputError, match=r"d.txt: cannot be read"):
        table[3]


def test_refuses_linked_folders_and_other_names(tmp_path):
    folder = lay(tmp_path / "in", {"a.wav": b"", "a.txt": ""})
    with pytest.raises(InputError, match="not a folder"):
        FolderTable(folder / "a.wav")
    with pytest.raises(InputError, match="cannot be read"):
        FolderTable(tmp_path / "absent")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    with pytest.raises(InputError, match=r"in/loop: a link to a folder"):
        FolderTable(folder)
    (folder / "loop").unlink()
    try:
        (folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"")
    except OSError:  # a file system that takes UTF-8 alone
        return
    with pytest.raises(InputError, match="is not UTF-8; rename"):
        FolderTable(folder)


def test_threads_and_fingerprint(tmp_path):
    files = {f"{i % 7}/{i}.{'wav' if e else 'txt'}": f"text {i}" for i in range(200) for e in (0, 1)}
    one, two = (FolderTable(lay(tmp_path / n, files)) for n in "ab")
    alone = rows(one)
    assert one.fingerprint() == two.fingerprint()

    def read(seed):
        return all(one[i].values == alone[i] for i in random.Random(seed).sample(range(200), 200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    (tmp_path / "b" / "0" / "0.txt").write_text("another length")
    assert one.fingerprint() != FolderTable(tmp_path / "b").fingerprint()
    lay(tmp_path / "b", {"0/0.txt": "text 0", "new.wav": b"", "new.txt": ""})
    assert one.fingerprint() != FolderTable(tmp_path / "b").fingerprint()
