"""Parquet: rows equal what pyarrow and `datasets` wrote, from any thread; damaged files are told in one line."""

import datetime
import decimal
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from gemma_mlx.data.blob import Embedded
from gemma_mlx.data.sources import parquet
from gemma_mlx.data.sources.cells import sniffed
from gemma_mlx.data.sources.jsonl import JsonlTable
from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.sources.parquet import ParquetTable
from gemma_mlx.errors import InputError, SourceError

FLAC = b"fLaC" + bytes(range(200))


def write(path, columns, **options):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """1,000 rows in groups of 64, with bytes as `datasets` stores them; some stand alone as paths, some are absent."""
    rng, rows = random.Random(3), []
    for i in range(1_000):
        media = {"bytes": b"fLaC" + rng.randbytes(rng.randrange(2_000)), "path": f"{i}.flac"}
        if i % 7 == 1:
            media = {"bytes": None, "path": f"clips/{i}.wav"}
        rows.append({"id": i, "audio": media if i % 11 else None, "text": f"text {i} é" if i % 5 else None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows, pa.schema([("id", pa.int64()), ("audio", kind), ("text", pa.string())]))
    path = write(tmp_path_factory.mktemp("parquet") / "clips.parquet", table, row_group_size=64)
    return path, rows


def expected(path, i, row):
    """What the table should give, from what was written."""
    where, audio = f"{path}:{i + 1}", row["audio"]
    medium = audio and {"path": audio["path"]}
    if audio and audio["bytes"] is not None:
        medium = Embedded(f"{where} audio", audio["bytes"], ".flac")
    return {"id": str(i), "audio": medium or "", "text": row["text"] or ""}, where


def test_rows_with_media_equal_what_was_written(clips):
    path, rows = clips
    table = ParquetTable(path)
    assert table.columns == ("id", "audio", "text") and len(table) == 1_000
    assert list(table.units) == [64] * 15 + [40] and len(table.unit_bytes) == 16
    for i in random.Random(1).sample(range(1_000), 1_000):
        assert (table[i].values, table[i].where) == expected(path, i, rows[i])
    assert (table.name, table.base) == (str(path), str(path.parent))
    other = ParquetTable(path, "hub/clips", "https://example.org/a/")
    assert (other[5].where, other.base) == ("hub/clips:6", "https://example.org/a/")
    with pytest.raises(IndexError):
        table[1_000]


def test_eight_threads_read_what_one_reads(clips, monkeypatch):
    """Whatever order they ask in; and with room for all groups each is decoded once."""
    path, rows = clips
    decoded, read = [], ParquetTable._read

    def counted(self, numbers):
        decoded.extend(numbers)
        time.sleep(0.01)  # so that threads meet
        return read(self, numbers)

    monkeypatch.setattr(ParquetTable, "_read", counted)
    for cache_bytes, groups in ((1 << 30, 16), (0, None)):
        decoded.clear()
        table, barrier = ParquetTable(path, cache_bytes=cache_bytes), threading.Barrier(8)

        def read_all(seed, table=table, barrier=barrier, few=cache_bytes == 0):
            barrier.wait()
            order = random.Random(seed).sample(range(1_000), 30 if few else 1_000)
            return [(i, table[i].values) for i in order]

        with ThreadPoolExecutor(8) as pool:
            for got in pool.map(read_all, range(8)):
                assert all(values == expected(path, i, rows[i])[0] for i, values in got)
        assert groups is None or sorted(decoded) == list(range(groups))


def test_kept_groups_stay_within_their_bytes(clips):
    path, _ = clips
    table = ParquetTable(path, cache_bytes=150_000)
    for i in range(1_000):
        table[i]
    kept = table._shared._sizes
    assert sum(kept.values()) <= 150_000 and 1 < len(kept) < 16 and (table._key, 15) in kept


def test_numbers_and_the_rest_are_text_as_in_a_csv(tmp_path):
    moment = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "whole": pa.array([12, None], pa.int32()),
        "real": pa.array([0.1, float("nan")], pa.float32()),
        "half": pa.array([np.float16(1.5), None], pa.float16()),
        "long": pa.array([1 / 3, 2.0]),
        "flag": [True, False],
        "price": pa.array([decimal.Decimal("12.50"), None]),
        "day": pa.array([moment.date(), None]),
        "at": pa.array([moment, None], pa.timestamp("ns", "Europe/Berlin")),
        "clock": pa.array([datetime.time(1, 2, 3), None], pa.time64("ns")),
        "word": pa.array(["a", "b"]).dictionary_encode(),
        "view": pa.array(["c", "d"], pa.string_view()),
        "raw": [b"plain text", b"\xff\x00\x13"],
        "nothing": pa.nulls(2),
    }
    first, second = ParquetTable(write(tmp_path / "a.parquet", columns))
    assert first.values == {
        "whole": "12",
        "real": "0.1",
        "half": "1.5",
        "long": "0.3333333333333333",
        "flag": "true",
        "price": "12.50",
        "day": "2024-05-01",
        "at": "2024-05-01 12:30:00+00:00",
        "clock": "01:02:03",
        "word": "a",
        "view": "c",
        "raw": "plain text",
        "nothing": "",
    }
    assert second.values | {"raw": ""} == dict.fromkeys(columns, "") | {
        "long": "2.0",
        "flag": "false",
        "word": "b",
        "view": "d",
    }
    assert second.values["raw"].data == b"\xff\x00\x13"  # neither text nor a known medium


def test_rows_equal_those_of_the_csv_and_jsonl_that_pyarrow_and_json_write(tmp_path):
    rng = random.Random(4)
    columns = {
        "id": [rng.randrange(-(1 << 40), 1 << 40) for _ in range(50)],
        "seconds": [rng.randrange(1_000) + rng.choice((0.5, 1 / 3, 0.1)) for _ in range(50)],
        "flag": [rng.random() < 0.5 for _ in range(50)],
        "text": [rng.choice(('a, "b"', "two\nlines", "é 日本", "plain")) for _ in range(50)],
    }
    table = pa.table(columns)
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    from_parquet = [row.values for row in ParquetTable(write(tmp_path / "a.parquet", table))]
    assert [row.values for row in CsvTable(tmp_path / "a.csv")] == from_parquet
    from_json = JsonlTable(tmp_path / "a.jsonl")
    assert [from_json[i].values for i in range(50)] == from_parquet


def test_lists_and_structs_stay(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "extra": None}, {"role": "model", "content": "b", "extra": 2}]},
        {"messages": []},
    ]
    columns = pa.Table.from_pylist(rows).append_column(
        "images", pa.array([[{"bytes": FLAC, "path": None}, {"bytes": None, "path": "b.png"}], None])
    )
    columns = columns.append_column("tags", pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())))
    columns = columns.append_column("pair", pa.array([{"x": 0.1}, None], pa.struct([("x", pa.float32())])))
    path = write(tmp_path / "a.parquet", columns)
    first, second = ParquetTable(path)
    assert first.values == {
        "messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b", "extra": 2}],
        "images": [Embedded(f"{path}:1 images", FLAC, ".flac"), {"path": "b.png"}],
        "tags": {"k": 1},
        "pair": {"x": 0.1},
    }
    assert second.values == {"messages": [], "images": "", "tags": {}, "pair": ""}


def test_what_datasets_writes(tmp_path):
    """Features' storage, class names and JSON columns, written by `datasets` itself."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "tags": datasets.List(datasets.ClassLabel(names=["x", "y"])),
            "mixed": datasets.Json(),
        }
    )
    media = {"bytes": FLAC, "path": "a.flac"}
    rows = {
        "audio": [media, None],
        "image": [None, {"bytes": b"\x89PNG\r\n\x1a\n123", "path": None}],
        "label": [1, -1],
        "tags": [[0, 1], []],
        "mixed": [{"content": "a"}, ["b", 1]],
    }
    schema = features.arrow_schema
    arrays = rows | {"mixed": [json.dumps(value) for value in rows["mixed"]]}
    path = write(tmp_path / "a.parquet", pa.table(arrays, schema))
    assert b"huggingface" in pq.read_schema(path).metadata
    first, second = ParquetTable(path)
    assert first.values == {
        "audio": Embedded(f"{path}:1 audio", FLAC, ".flac"),
        "image": "",
        "label": "dog",
        "tags": ["x", "y"],
        "mixed": {"content": "a"},
    }
    assert (second.values["label"], second.values["tags"], second.values["mixed"]) == ("", [], ["b", 1])
    assert second.values["image"] == Embedded(f"{path}:2 image", b"\x89PNG\r\n\x1a\n123", ".png")
    table = ParquetTable(write(tmp_path / "b.parquet", pa.table(arrays | {"label": [1, 2]}, schema)))
    with pytest.raises(InputError, match=r"b.parquet:2: 'label' is class 2; the file names 2 classes"):
        table[1]


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", ".wav"),
        (b"fLaC\x00", ".flac"),
        (b"OggS\x00", ".ogg"),
        (b"ID3\x04", ".mp3"),
        (b"\xff\xfb\x90\x00", ".mp3"),
        (b"\x00\x00\x00\x20ftypM4A ", ".m4a"),
        (b"\x00\x00\x00\x20ftypisom", ".mp4"),
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", ".webp"),
        (b"GIF89a", ".gif"),
        (b"\xff\xfe\x41\x00", ""),
        (b"12345678WAVE", ""),
        (b"", ""),
    ],
)
def test_suffix_by_first_bytes(head, suffix):
    assert sniffed(head) == suffix


def test_real_encoders_are_recognised(tmp_path):
    """Against libsndfile's and Pillow's own output."""
    import soundfile
    from PIL import Image

    for suffix, kind in ((".wav", "WAV"), (".flac", "FLAC"), (".ogg", "OGG"), (".mp3", "MP3")):
        soundfile.write(tmp_path / f"a{suffix}", np.zeros(4_000, np.float32), 16_000, format=kind)
        assert sniffed((tmp_path / f"a{suffix}").read_bytes()) == suffix
    for suffix in (".png", ".jpg", ".webp", ".gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}")
        assert sniffed((tmp_path / f"a{suffix}").read_bytes()) == suffix


def damaged(path, tmp_path, change):
    other = tmp_path / "bad.parquet"
    other.write_bytes(change(path.read_bytes()))
    return other


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b"", "not a Parquet file"),
        (lambda b: b"audio_path,text\na.wav,hi\n", "not a Parquet file"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b"PAR1", "truncated"),
        (lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1", "footer is damaged"),
        (lambda b: b[:-300] + bytes(292) + b[-8:], "footer is damaged"),
        (lambda b: b[:-4] + b"PARE", "encrypted"),
    ],
)
def test_refuses_what_is_no_whole_parquet_file(clips, tmp_path, change, says):
    bad = damaged(clips[0], tmp_path, change)
    with pytest.raises(InputError, match=says) as caught:
        ParquetTable(bad)
    assert str(caught.value).startswith(f"{bad}: ") and "\n" not in str(caught.value)


def test_refuses_files_without_use(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        ParquetTable(tmp_path / "absent.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        ParquetTable(tmp_path)
    with pytest.raises(InputError, match="no rows"):
        ParquetTable(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())}))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(InputError, match="column 'text' stands twice"):
        ParquetTable(write(tmp_path / "b.parquet", twice))
    with pytest.raises(InputError, match="column without a name"):
        ParquetTable(write(tmp_path / "c.parquet", {"": ["a"]}))


def test_random_damage_never_gives_anything_but_rows_or_one_line(clips, tmp_path):
    """200 files with a stretch of random bytes: what is read is checked or refused, and nothing else is raised."""
    rng, refused = random.Random(8), 0
    whole = clips[0].read_bytes()
    for _ in range(200):
        at, length = rng.randrange(len(whole)), rng.choice((1, 4, 300))
        bad = damaged(clips[0], tmp_path, lambda b, at=at, n=length: b[:at] + rng.randbytes(n) + b[at + n :])
        try:
            table = ParquetTable(bad)
            for i in range(0, min(len(table), 1_000), 64):
                table[i]
        except InputError as e:
            refused += 1
            assert str(e).startswith(str(bad)) and "\n" not in str(e)
    assert refused > 20


def test_checksums_are_heeded(tmp_path):
    values = [f"{i:020d}" for i in range(1_000)]
    path = write(tmp_path / "a.parquet", {"text": values}, write_page_checksum=True, compression="NONE")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"00000000000000000500", b"00000000000000000501", 1))
    with pytest.raises(InputError, match=r"rows are damaged \(.*(CRC|crc|checksum)"):
        ParquetTable(path)[0]


def test_a_file_that_changes_is_noticed(clips, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(clips[0].read_bytes())
    table = ParquetTable(path, cache_bytes=0)
    table[0]
    write(path, {"text": ["another"]})
    with pytest.raises(SourceError, match="changed while it was in use"):
        table[999]
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read any more"):
        table[500]


def test_text_that_is_not_utf8_names_its_row(tmp_path):
    bad = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    table = ParquetTable(write(tmp_path / "a.parquet", {"text": bad}))
    assert table[0].values == {"text": "fine"}
    with pytest.raises(InputError, match=r"a.parquet:2: 'text' is not UTF-8"):
        table[1]


def test_large_files_are_read_by_row_group(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["x" * 100] * 1_000}, row_group_size=500, use_dictionary=False)
    assert ParquetTable(path).units is None
    assert list(ParquetTable(path, whole_bytes=50_000).units) == [500, 500]


def test_all_tables_share_one_cache(clips, monkeypatch):
    monkeypatch.setattr(parquet, "_SHARED", parquet.ByteLru(150_000, parquet._bytes_of))
    tables = [ParquetTable(clips[0]) for _ in range(5)]
    for i in range(1_000):
        for table in tables:
            assert table[i].values == expected(*(clips[0], i, clips[1][i]))[0]
    assert 0 < sum(parquet._SHARED._sizes.values()) <= 150_000


def test_row_groups_too_large_for_memory_go_to_the_disk(clips, tmp_path, monkeypatch):
    """Each is decoded once, into a file that no folder shows; rows are the same, from any thread."""
    path, rows = clips
    repeated = write(tmp_path / "a.parquet", pq.read_table(path), row_group_size=500)
    monkeypatch.setattr(parquet, "SPILLED_BYTES", 100_000)
    monkeypatch.setattr(parquet, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr("gemma_mlx.data.sources.spill.cache_folder", lambda: tmp_path / "cache")
    made, real = [], parquet.spilled
    monkeypatch.setattr(parquet, "spilled", lambda *args: made.append(real(*args)) or made[-1])
    table = ParquetTable(repeated, cache_bytes=0)

    def read(seed):
        order = random.Random(seed).sample(range(1_000), 300)
        return all(table[i].values == expected(repeated, i, rows[i])[0] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(made) == 2 and made[0].column(0).num_chunks > 10 and not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_told(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SPILLED_BYTES", 1_000)
    monkeypatch.setattr("gemma_mlx.data.sources.spill.cache_folder", lambda: tmp_path)

    class Full:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def flush(self):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(SourceError, match=r"cannot be unpacked into .* \(No space left on device\); make room"):
        ParquetTable(clips[0])[0]
    monkeypatch.setattr("gemma_mlx.data.sources.spill.cache_folder", lambda: clips[0] / "below a file")
    with pytest.raises(SourceError, match="make it writable"):
        ParquetTable(clips[0])[0]


def test_fingerprint_survives_copying_and_notices_changes(clips, tmp_path):
    path = tmp_path / "copy.parquet"
    path.write_bytes(clips[0].read_bytes())
    assert ParquetTable(path).fingerprint() == ParquetTable(clips[0]).fingerprint()
    one = write(tmp_path / "one.parquet", {"text": ["a", "b"]})
    two = write(tmp_path / "two.parquet", {"text": ["a", "c"]})
    assert ParquetTable(one).fingerprint() != ParquetTable(two).fingerprint()


MILLION = """
import random, sys, time
from pathlib import Path
import pyarrow.parquet
from gemma_mlx.data.sources.jsonl import JsonlTable
from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.sources.parquet import ParquetTable
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
before, start = resident(), time.perf_counter()
table = ParquetTable(Path(sys.argv[1]))
opened = time.perf_counter() - start
assert table[999_999].values["text"].startswith("this is clip 999999"), table[999_999]
first = time.perf_counter() - start
order = random.Random(1).sample(range(len(table)), 100_000)
start = time.perf_counter()
for i in order:
    table[i]
print(opened, first, 100_000 / (time.perf_counter() - start), resident() - before, table.units is None)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rows_a_group", [1_000, 1 << 20])
def test_a_million_rows_open_at_once_in_little_memory(tmp_path, rows_a_group):
    n = 1_000_000
    numbers = pa.array(np.arange(n)).cast(pa.string())
    table = pa.table(
        {
            "audio_path": pc.binary_join_element_wise("clips/", numbers, ".flac", ""),
            "text": pc.binary_join_element_wise("this is clip ", numbers, " and what is said in it, twice.", ""),
            "language": pa.array(np.where(np.arange(n) % 3, "German", "English")),
        }
    )
    path = write(tmp_path / "a.parquet", table, row_group_size=rows_a_group)
    out = subprocess.run([sys.executable, "-c", MILLION, str(path)], capture_output=True, text=True, check=True).stdout
    opened, first, rate, added, whole = out.split()
    assert float(opened) < 0.3 and float(first) < 1.5 and float(rate) > 50_000 and float(added) < 150, out
    assert whole == "True"
