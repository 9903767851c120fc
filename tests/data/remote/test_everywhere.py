"""The same rows through every format and from every source: byte-identical batches; far away, each byte once."""

import csv
import json
import shutil
import sys
import tarfile
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from servers import Fault

sys.path.insert(0, str(Path(__file__).parents[1] / "tables"))

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import Grouped, Shuffled
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.data.rows import Rows
from gemma_mlx.errors import InputError, SourceError

COLUMNS = ("id", "audio_path", "image_path", "question", "answer", "text", "language")
N = 26
BUCKET = "clinic"


def records():
    """Transcripts, pictures with questions, both together, texts; some cells empty, some with quotes and commas."""
    found = []
    for i in range(N):
        row = {"id": f"r{i:02d}"}
        if i % 5 in (0, 3):
            row |= {"audio_path": f"media/{i}.wav", "text": f'the "fox", number {i}\nand é'}
            row |= {"language": "French"} if i % 2 else {}
        elif i % 5 == 1:
            row |= {"image_path": f"media/{i}.png", "question": f"What is {i}?", "answer": f"the dog {i}"}
        elif i % 5 == 2:
            row |= {"image_path": f"media/{i}.png", "audio_path": f"media/{i}.wav"}
            row |= {"question": "Both?", "answer": "yes"}
        else:
            row |= {"text": f"once upon {i} times"}
        found.append(row)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with media/, and the rows in every format of one file."""
    folder = tmp_path_factory.mktemp("everywhere")
    (folder / "media").mkdir()
    rng = np.random.default_rng(0)
    for row in records():
        if "audio_path" in row:
            wave = (0.1 * rng.standard_normal(int(rng.integers(1_000, 9_000)))).astype(np.float32)
            soundfile.write(folder / row["audio_path"], wave, 16_000, "PCM_16")
        if "image_path" in row:
            size = (*rng.integers(30, 90, 2), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / row["image_path"])
    write_tables(folder)
    write_tar(folder / "train.tar", folder)
    return folder


def write_tables(folder):
    for name, delimiter in (("train.csv", ","), ("train.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter, restval="")
            writer.writeheader()
            writer.writerows(records())
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(records())]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(records()))
    turns = [json.dumps({"id": row["id"], **conversation(row)}) + "\n" for row in records()]
    (folder / "messages.jsonl").write_text("".join(turns))
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array([row.get(name) for row in records()], pa.string()) for name in COLUMNS})
    pq.write_table(table, folder / "train.parquet")
    embedded = table
    for kind in ("audio", "image"):
        paths = [row.get(f"{kind}_path") for row in records()]
        cells = [path and {"bytes": (folder / path).read_bytes(), "path": Path(path).name} for path in paths]
        kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        embedded = embedded.drop_columns([f"{kind}_path"]).append_column(kind, pa.array(cells, kinds))
    pq.write_table(embedded, folder / "embedded.parquet", row_group_size=4)


def conversation(row):
    """What the columns say, as messages."""
    from gemma_mlx.data.examples import TRANSCRIBE, TRANSCRIBE_IN

    if set(row) == {"id", "text"}:
        return {"text": row["text"]}
    prompt = row.get("question")
    if prompt is None:
        prompt = TRANSCRIBE_IN.replace("{language}", row["language"]) if "language" in row else TRANSCRIBE
    parts = [{"type": "image", "image": row["image_path"]}] if "image_path" in row else []
    parts += [{"type": "text", "text": prompt}]
    parts += [{"type": "audio", "audio": row["audio_path"]}] if "audio_path" in row else []
    answer = row.get("answer", row.get("text"))
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def write_tar(path, folder):
    with tarfile.open(path, "w") as tar:
        for row in records():
            plain = {k: v for k, v in row.items() if not k.endswith("_path")}
            members = {"json": json.dumps(plain).encode()}
            for kind, suffix in (("audio", "wav"), ("image", "png")):
                if f"{kind}_path" in row:
                    members[suffix] = (folder / row[f"{kind}_path"]).read_bytes()
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{row['id']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def batches_of(source, processor, fetcher=None, roots=(), epochs=2, plan="shuffled", check=False, **options):
    """Every array of every batch as bytes, and the row ids."""
    rows = Rows(source, roots, fetcher=fetcher)
    data = Dataset(rows, processor, check=check, cache_bytes=0)
    walk = data.walk(5)
    made = Shuffled(walk, 3) if plan == "shuffled" else Grouped(data.measure, 3, 5, 4, walk)
    with Batches(data, 3, plan=made, seed=5, epochs=epochs, pad_to_multiple=8, **options) as batches:
        return [frozen(batch) for batch in batches]


def frozen(batch):
    found = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        found[f.name] = (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
    return found


@pytest.fixture(scope="module", params=["shuffled", "grouped"])
def expected(request, home, processor):
    """From the CSV, and there is something in it."""
    found = batches_of(home / "train.csv", processor, plan=request.param)
    assert len(found) == 18 and sum(batch["input_features"] is not None for batch in found) > 8
    return request.param, found


def saved_by_datasets(home, folder):
    import datasets

    table = datasets.Dataset.from_parquet(str(home / "embedded.parquet"), cache_dir=str(folder / "cache"))
    table.save_to_disk(str(folder / "saved"))
    return folder / "saved"


LOCAL = ("train.tsv", "train.jsonl", "train.json", "messages.jsonl", "train.parquet", "embedded.parquet", "train.tar")


@pytest.mark.parametrize("name", LOCAL)
def test_formats(home, processor, expected, name):
    plan, wanted = expected
    assert batches_of(home / name, processor, plan=plan) == wanted


def test_saved_by_datasets(home, processor, expected, tmp_path):
    plan, wanted = expected
    assert batches_of(saved_by_datasets(home, tmp_path), processor, plan=plan) == wanted


def test_a_folder_with_metadata(home, processor, tmp_path):
    """One medium a row, as such folders have it: against a CSV of the same rows."""
    rows = [row for row in records() if ("audio_path" in row) != ("image_path" in row)]
    rows.sort(key=lambda row: row["id"])
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copytree(home / "media", folder / "media")
    names = [{"file_name": row.get("audio_path") or row["image_path"], **row} for row in rows]
    keys = ("file_name", "id", "question", "answer", "text", "language")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(names)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    wanted = batches_of(tmp_path / "train.csv", processor, roots=[home])
    assert batches_of(folder, processor) == wanted and len(wanted) > 10


def fetching(tmp_path, *named, **options):
    return LazyFetcher(named, folder=tmp_path / "cache", **options)


REMOTE = ("train.csv", "train.jsonl", "train.parquet", "embedded.parquet", "train.tar")


@pytest.mark.parametrize("name", REMOTE)
def test_over_http(home, processor, expected, tmp_path, name, web, folder):
    plan, wanted = expected
    copy(home, folder)
    url = f"{web.url}/{name}"
    fetcher = fetching(tmp_path, url)
    assert batches_of(url, processor, fetcher, plan=plan) == wanted
    fetcher.close()


def copy(home, folder):
    for file in home.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def bucket(gcs_server, home):
    for file in home.rglob("*"):
        if file.is_file():
            gcs_server.upload(BUCKET, str(file.relative_to(home)), file.read_bytes())
    return gcs_server


@pytest.mark.parametrize("name", REMOTE)
def test_over_gs(processor, expected, tmp_path, name, bucket, gcs):
    """And in the second epoch no byte of any object is sent again, nor is anything asked."""
    plan, wanted = expected
    url = f"gs://{BUCKET}/{name}"
    fetcher = fetching(tmp_path, url, run="run")
    rows = Dataset(Rows(url, fetcher=fetcher), processor, check=False, cache_bytes=0)
    walk, found = rows.walk(5), []
    made = Shuffled(walk, 3) if plan == "shuffled" else Grouped(rows.measure, 3, 5, 4, walk)
    with Batches(rows, 3, plan=made, seed=5, epochs=2, pad_to_multiple=8) as batches:
        for batch in batches:
            found.append(frozen(batch))
            if len(found) == 9:
                first = gcs.media_bytes()
                assert batches.state()["epoch"] == 1
    assert found == wanted
    media = sum(f.stat().st_size for f in (Path(fetcher.cache.folder)).rglob("*") if f.is_file() and f.stat().st_size)
    assert first > 0 and media >= first
    # What was read ahead of the second epoch's beginning had been read in the first.
    assert gcs.media_bytes() == first
    fetcher.close()
    # Another process, the run resumed: still nothing.
    gcs.forget()
    again = fetching(tmp_path, url, run="run", resumed=True)
    assert batches_of(url, processor, again, plan=plan) == wanted
    assert gcs.media_bytes() == 0 and not gcs.requests()
    again.close()


def test_each_object_is_sent_once(home, processor, tmp_path, bucket, gcs):
    url = f"gs://{BUCKET}/train.csv"
    fetcher = fetching(tmp_path, url)
    batches_of(url, processor, fetcher, epochs=3)
    named = {row[k] for row in records() for k in ("audio_path", "image_path") if k in row} | {"train.csv"}
    assert gcs.media_bytes() == sum((home / name).stat().st_size for name in named)
    fetcher.close()


def test_from_bigquery(home, processor, expected, tmp_path, monkeypatch):
    """Rows through Google's own clients from a server of this machine (see fake_bigquery), media from a folder."""
    pytest.importorskip("google.cloud.bigquery_storage_v1")
    import fake_bigquery
    import pyarrow as pa

    plan, wanted = expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    query = "SELECT * FROM ds.rows ORDER BY id"
    rows = pa.table({name: pa.array([row.get(name) for row in records()], pa.string()) for name in COLUMNS})
    with fake_bigquery.serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.tables["p.ds.rows"] = server.tables["p.ds.answer"] = fake_bigquery.Table(rows)
        server.queries[query] = fake_bigquery.Query("p.ds.answer", ("p.ds.rows",))
        assert batches_of(f"bq://p/{query}", processor, roots=[home], plan=plan) == wanted
        reads = len(server.reads)
        assert batches_of(f"bq://p/{query}", processor, roots=[home], plan=plan) == wanted
        assert len(server.reads) == reads  # the snapshot


FAULTS = {
    "503": [Fault("status", status=503, times=2), Fault("status", status=503, times=1, media=True)],
    "reset": [Fault("reset", after=700, media=True, times=3)],
    "truncated": [Fault("truncate", after=500, media=True, times=3)],
    "slow": [Fault("slow", rate=200_000, media=True, times=4)],
}
"""What a bad day brings; see servers.Fault."""


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_day_changes_nothing(home, processor, expected, tmp_path, bucket, gcs, kind):
    plan, wanted = expected
    gcs.inject(*(replace(fault) for fault in FAULTS[kind]))
    url = f"gs://{BUCKET}/train.csv"
    fetcher = fetching(tmp_path, url)
    assert batches_of(url, processor, fetcher, plan=plan, epochs=2) == wanted
    assert not gcs.pending()
    fetcher.close()


def test_an_object_that_changes_in_the_run(home, processor, tmp_path, bucket, gcs):
    """It was evicted, or is read anew after a crash: the run stops and names it; a new run sees the new one."""
    url, name = f"gs://{BUCKET}/train.csv", "media/5.wav"
    bucket.upload(BUCKET, name, (home / name).read_bytes())
    first = fetching(tmp_path, url, run="a")
    wanted = batches_of(url, processor, first, epochs=1)
    other = home / "media/0.wav"
    bucket.upload(BUCKET, name, other.read_bytes())
    assert batches_of(url, processor, first, epochs=1) == wanted  # from the cache
    first.close()
    small = fetching(tmp_path, url, run="a", resumed=True, limit_bytes=1_500)  # the table alone
    with pytest.raises(SourceError, match=rf"gs://{BUCKET}/{name}.*changed"):
        batches_of(url, processor, small, epochs=1)
    with pytest.raises(SourceError, match="changed"):  # nobody's row is bad
        batches_of(url, processor, small, epochs=1, on_bad_row="skip")
    small.close()
    new = fetching(tmp_path, url, run="b")
    assert batches_of(url, processor, new, epochs=1) != wanted
    new.close()
    bucket.upload(BUCKET, name, (home / name).read_bytes())


def test_a_missing_object(home, processor, tmp_path, bucket, gcs):
    url, name = f"gs://{BUCKET}/train.csv", "media/10.wav"
    bucket.delete(BUCKET, name)
    try:
        fetcher = fetching(tmp_path, url)
        with pytest.raises(InputError, match=rf"gs://{BUCKET}/train.csv:\d+.*gs://{BUCKET}/{name}: no such object"):
            batches_of(url, processor, fetcher)
        rows = Dataset(Rows(url, fetcher=fetcher), processor, check=False)
        with Batches(rows, 3, seed=5, epochs=1, on_bad_row="skip") as batches:
            left = [row_id for batch in batches for row_id in batch.row_ids]
        (reason,) = batches.bad.values()
        assert f"gs://{BUCKET}/{name}: no such object" in reason and "r10" not in left and len(left) == N - 1
        whole = Dataset(home / "train.csv", processor)
        with Batches(whole, 3, seed=5, epochs=1) as batches:
            assert [i for batch in batches for i in batch.row_ids if i != "r10"] == left
        fetcher.close()
    finally:
        bucket.upload(BUCKET, name, (home / name).read_bytes())


def test_media_of_a_local_table_by_url(home, processor, expected, tmp_path, bucket, gcs):
    """URLs in cells, and a media root that is one."""
    plan, wanted = expected
    rows = [{k: f"gs://{BUCKET}/{v}" if k.endswith("_path") else v for k, v in row.items()} for row in records()]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fetcher = fetching(tmp_path)
    assert batches_of(path, processor, fetcher, plan=plan) == wanted
    (tmp_path / "train.csv").write_bytes((home / "train.csv").read_bytes())
    assert batches_of(tmp_path / "train.csv", processor, fetcher, [f"gs://{BUCKET}/"], plan=plan) == wanted
    fetcher.close()
