"""From a name to rows: kinds of files, folders, patterns, mixtures; what is refused."""

import io
import json
import os
import tarfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest

from gemma_mlx.data import rows as rows_of_sources
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset, read_examples
from gemma_mlx.data.order import Shuffled
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.data.rows import Rows
from gemma_mlx.data.sources import parquet
from gemma_mlx.data.sources.opening import Part, Shards, of_split, open_parts, open_table
from gemma_mlx.errors import InputError, SourceError


def texts(path, names, kind="jsonl"):
    """A file of rows with these ids."""
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"id": n, "prompt": "hi", "response": f"ho {n}"}) + "\n" for n in names))
    else:
        path.write_text("id,prompt,response\n" + "".join(f"{n},hi,ho {n}\n" for n in names))
    return str(path)


def ids(source, **options):
    return [example.row_id for example in read_examples(source, **options)]


def test_patterns_and_folders_of_files(tmp_path):
    for i in range(3):
        texts(tmp_path / f"part-{i}.jsonl", [f"{i}a", f"{i}b"])
    assert ids(tmp_path / "part-{0..2}.jsonl") == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert ids(f"{tmp_path}/part-{{2,0}}.jsonl") == ["2a", "2b", "0a", "0b"]
    assert ids(f"{tmp_path}/*.jsonl") == ids(tmp_path) == ids(tmp_path / "part-{0..2}.jsonl")
    texts(tmp_path / "odd[1]{a}.jsonl", ["x"])  # a name that is there is no pattern
    assert ids(tmp_path / "odd[1]{a}.jsonl") == ["x"]
    texts(tmp_path / "more.csv", ["m"], "csv")
    with pytest.raises(InputError, match=r"files of several kinds \(.csv, .jsonl\)"):
        Rows(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        Rows(f"{tmp_path}/absent-*.csv")
    with pytest.raises(InputError, match="no such file"):
        Rows(tmp_path / "part-{0..3}.jsonl")


def test_splits_of_a_folder(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl", "test.jsonl"):
        texts(tmp_path / name, [name])
    assert ids(tmp_path) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert ids(tmp_path, split="valid") == ids(tmp_path, split="validation") == ["validation.jsonl"]
    assert ids(tmp_path, split="test") == ["test.jsonl"]
    files = [tmp_path / n for n in ("strain.csv", "training.csv")]
    assert of_split(tmp_path, files, "train") == files  # no word of its own: nothing is said
    (tmp_path / "data" / "train").mkdir(parents=True)
    texts(tmp_path / "data" / "train" / "a.jsonl", ["a"])
    (tmp_path / "data" / "README.md").write_text("a data set")
    (tmp_path / "data" / "dataset_infos.json").write_text("{}")
    assert ids(tmp_path / "data") == ["a"]
    with pytest.raises(InputError, match="no files of the split 'validation', only of train"):
        ids(tmp_path / "data", split="validation")


def test_media_of_each_table_start_from_its_own_folder(tmp_path, media):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        os.link(media / f"{'short' if name == 'a' else 'long'}.wav", tmp_path / name / "clip.wav")
        (tmp_path / name / "train.csv").write_text("audio_path,text\nclip.wav,hello\n")
    examples = read_examples(f"{tmp_path}/*/train.csv")
    assert [e.media()[0].path for e in examples] == [tmp_path / name / "clip.wav" for name in ("a", "b")]


def test_a_mixture(tmp_path, processor):
    texts(tmp_path / "many.jsonl", [f"m{i}" for i in range(40)])
    texts(tmp_path / "few.csv", [f"f{i}" for i in range(10)], "csv")
    (tmp_path / "other.csv").write_text("name,ask,say\n" + "".join(f"o{i},why,because {i}\n" for i in range(8)))
    (tmp_path / "mix.yaml").write_text(
        "- {data: many.jsonl, weight: 0.5}\n- {data: few.csv, weight: 3}\n"
        "- {data: other.csv, columns: {id: name, prompt: ask, response: say}}\n"
    )
    rows = Rows(tmp_path / "mix.yaml")
    assert len(rows) == 58 and rows[57].row_id == "o7" and rows[57].reference == "because 7"
    data = Dataset(rows, processor)
    seen = []
    with Batches(data, 4, plan=Shuffled(data.walk(3), 4), epochs=2) as batches:
        assert len(batches) == 15  # 20 + 30 + 8 rows in fours
        seen = [row_id for batch in batches for row_id in batch.row_ids]
    first, second = Counter(seen[:58]), Counter(seen[58:])
    for epoch in (first, second):
        assert Counter(row_id[0] for row_id in epoch.elements()) == {"m": 20, "f": 30, "o": 8}
        assert all(epoch[f"f{i}"] == 3 for i in range(10))
    assert {i for i in first if i[0] == "m"} | {i for i in second if i[0] == "m"} == {f"m{i}" for i in range(40)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a list"), ("data: a.csv", "expected a list"), ("- a.csv", "entry 1: expected `data: NAME`"),
        ("- {data: a.csv, wieght: 2}", "entry 1: unknown key 'wieght'"),
        ("- {data: a.csv, weight: 0}", "entry 1: weight is 0"), ("- {data: a.csv, weight: yes}", "weight is True"),
        ("- {data: a.csv, weight: .inf}", "weight is inf"), ("- {data: mix.yaml}", "a mixture of mixtures"),
        ("- {data: a.csv, columns: text}", "entry 1: columns is 'text'"), ("- {data: [", "not YAML"),
        ("- {data: absent.csv}", "absent.csv: no such file"),
    ],
)  # fmt: skip
def test_mixtures_that_are_refused(tmp_path, text, says):
    texts(tmp_path / "a.csv", ["1"], "csv")
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        Rows(tmp_path / "mix.yaml")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("absent.csv", "absent.csv: no such file"), ("absent", "a name without a suffix is no known kind"),
        ("s3://bucket/a.csv", "s3:// is not read"), ("file:///a.csv", "file:// is not read"),
        ("https://example.org/a.csv", "only files of this machine"), ("gs://b/a.csv", "only files of this machine"),
    ],
)  # fmt: skip
def test_names_that_are_refused(source, says):
    with pytest.raises(InputError, match=says):
        open_parts(source)


def test_one_table(tmp_path):
    path = texts(tmp_path / "a.csv", ["1", "2"], "csv")
    assert len(open_table(path)) == 2
    texts(tmp_path / "b.csv", ["3"], "csv")
    with pytest.raises(InputError, match="stands for 2 tables"):
        open_table(f"{tmp_path}/*.csv")


def test_several_parquet_files_are_one_order(tmp_path, processor):
    """With bytes in them they come by stretches of all files; small, they come as a CSV's would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"r{i}" for i in range(30)]
    for k in range(3):
        part = names[k * 10 : k * 10 + 10]
        columns = {"id": part, "prompt": ["hi"] * 10, "response": [f"ho {n}" for n in part], "unread": [b"x" * 99] * 10}
        pq.write_table(pa.table(columns), tmp_path / f"{k}.parquet", row_group_size=4)
    path = texts(tmp_path / "all.jsonl", names)
    found = []
    for source in (f"{tmp_path}/*.parquet", path):
        data = Dataset(source, processor)
        with Batches(data, 4, plan=Shuffled(data.walk(9), 4), epochs=2) as batches:
            found.append([batch.row_ids for batch in batches])
    assert found[0] == found[1]
    assert Rows(f"{tmp_path}/*.parquet").fingerprint() != Rows(tmp_path / "0.parquet").fingerprint()


def test_corrections(tmp_path):
    """Patches and a language mode, as the options of a run."""
    path = texts(tmp_path / "a.csv", ["1", "2", "3"], "csv")
    (tmp_path / "patches" / "delete").mkdir(parents=True)
    (tmp_path / "patches" / "delete" / "x.csv").write_text("id\n2.0\n")
    rows = Rows(path, patches=str(tmp_path / "patches"))
    assert [example.row_id for example in rows] == ["1", "3"] and any("1" in line for line in rows.notes())
    assert rows.fingerprint() != Rows(path).fingerprint()


def test_hidden_folders_are_not_data(tmp_path):
    texts(tmp_path / "a.csv", ["1", "2"], "csv")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    texts(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.csv", ["1"], "csv")
    texts(tmp_path / "._a.csv", ["1"], "csv")
    assert ids(tmp_path) == ["1", "2"]
    (tmp_path / ".home").mkdir()
    texts(tmp_path / ".home" / "b.csv", ["3"], "csv")
    assert ids(tmp_path / ".home") == ["3"]  # named by the user


def test_weights_are_part_of_what_the_rows_are(tmp_path):
    for name in ("a", "b"):
        texts(tmp_path / f"{name}.csv", [f"{name}{i}" for i in range(4)], "csv")
    found = set()
    for one, other in ((1, 1), (2, 1), (1, 2)):
        (tmp_path / "mix.yaml").write_text(f"- {{data: a.csv, weight: {one}}}\n- {{data: b.csv, weight: {other}}}\n")
        found.add(Rows(tmp_path / "mix.yaml").fingerprint())
    assert len(found) == 3


def test_a_mixture_with_an_empty_part(tmp_path, processor):
    """A header alone, or all rows deleted."""
    texts(tmp_path / "none.csv", [], "csv")
    texts(tmp_path / "some.csv", ["1", "2", "3"], "csv")
    (tmp_path / "mix.yaml").write_text("- {data: none.csv, weight: 2}\n- {data: some.csv, weight: 2}\n")
    data = Dataset(tmp_path / "mix.yaml", processor)
    assert Counter(i for b in Batches(data, 2, plan=Shuffled(data.walk(1), 2), epochs=1) for i in b.row_ids) == {
        "1": 2, "2": 2, "3": 2,
    }  # fmt: skip


class Opened:
    """Shards far away, as `opening` gives them: who opened and who closed which."""

    def __init__(self, folder, monkeypatch, counts, **part):
        self.opened, self.closed, self.lock = Counter(), [], threading.Lock()
        for i, count in enumerate(counts):
            texts(folder / f"{i}.csv", [f"{i}-{k}" for k in range(count)], "csv")
        self.folder = folder
        shards = Shards(tuple(f"{i}.csv" for i in range(len(counts))), self.open, self.closed.append)
        monkeypatch.setattr(rows_of_sources, "open_parts", lambda *_, **__: [Part(shards, **part)])

    def open(self, name):
        with self.lock:
            self.opened[name] += 1
        time.sleep(0.01)
        return open_table(str(self.folder / name))


def test_a_shard_is_opened_by_one(tmp_path, monkeypatch):
    far = Opened(tmp_path, monkeypatch, [3] * 4)
    rows, found = Rows("s{0..3}.csv"), []
    threads = [threading.Thread(target=lambda: found.append(rows[2 << 32 | 1].row_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["2-1"] * 8 and far.opened == {"2.csv": 1} and not far.closed
    assert rows.count(2) == 3 and rows.count(1) == 3 and far.opened == {"2.csv": 1, "1.csv": 1}


def test_shards_in_use_stay(tmp_path, monkeypatch):
    """The longest unused are let go, but none whose row is being made a sample."""
    far = Opened(tmp_path, monkeypatch, [1] * 12)
    rows = Rows("s{0..11}.csv")
    with rows.staying(0), rows.staying(0):
        for shard in range(12):
            rows[shard << 32]
        assert far.closed == ["1.csv", "2.csv", "3.csv", "4.csv"]
    assert far.closed == ["1.csv", "2.csv", "3.csv", "4.csv"]
    rows[4 << 32]
    assert far.closed[4:] == ["0.csv"] and far.opened["4.csv"] == 2
    assert rows.count(1) == 1 and far.opened["1.csv"] == 1  # remembered


def test_a_sample_keeps_its_shard(tmp_path, monkeypatch, processor):
    far = Opened(tmp_path, monkeypatch, [1] * 12)
    data = Dataset("s{0..11}.csv", processor, check=False, cache_bytes=0)
    make = processor.sample

    def slow(example, **options):
        for shard in range(1, 12):
            data.examples[shard << 32]
        assert "0.csv" not in far.closed
        return make(example, **options)

    monkeypatch.setattr(processor, "sample", slow)
    assert data[0].row_id == "0-0" and data.measure([0]) > [0]
    assert far.opened["0.csv"] == 1


def test_a_shard_that_cannot_be_opened_is_tried_again(tmp_path, monkeypatch):
    far = Opened(tmp_path, monkeypatch, [1, 1])
    text = (tmp_path / "1.csv").read_text()
    (tmp_path / "1.csv").unlink()
    rows = Rows("s{0..1}.csv")
    with pytest.raises(InputError, match="no such file"):
        rows[1 << 32]
    (tmp_path / "1.csv").write_text(text)
    assert rows[1 << 32].row_id == "1-0" and far.opened == {"1.csv": 2}


def test_a_mixture_of_one_stream(tmp_path, monkeypatch):
    """Its columns hold; a weight has no meaning."""
    Opened(tmp_path, monkeypatch, [1], options={"columns": {"response": "id"}})
    assert Rows("mix.yaml")[0].reference == "0-0"
    Opened(tmp_path, monkeypatch, [1], weight=2.0)
    with pytest.raises(InputError, match="no weight"):
        Rows("mix.yaml")


def test_some_rows_are_read_when_they_are_asked_for(tmp_path, monkeypatch, processor):
    """Rows that stand for the others do not hold what has been let go."""
    far = Opened(tmp_path, monkeypatch, [2] * 12)
    data = Dataset("s{0..11}.csv", processor, check=False)
    data.look_at_some(3)
    first = data.seen.examples[0].row_id
    for shard in (*range(12), *range(12)):  # the first row's shard is let go
        if not first.startswith(f"{shard}-"):
            data.examples[shard << 32]
    opened = sum(far.opened.values())
    assert len(data.seen) == len(data.seen.examples) == 3 and data.seen.examples[0].row_id == first
    assert sum(far.opened.values()) == opened + 1


def test_media_far_away_in_any_part(tmp_path, processor):
    """Known by the first rows of each, so that they are fetched ahead."""
    texts(tmp_path / "near.csv", map(str, range(30)), "csv")
    (tmp_path / "far.csv").write_text("id,audio_path,text\nx,gs://b/a.wav,hello\n")
    (tmp_path / "mix.yaml").write_text("- {data: near.csv}\n- {data: far.csv}\n")
    with LazyFetcher(folder=tmp_path / "cache") as fetcher:
        assert Rows(tmp_path / "mix.yaml", fetcher=fetcher).remote_media()
        assert not Rows(tmp_path / "near.csv", fetcher=fetcher).remote_media()


def test_a_fetcher_that_is_made_again_is_of_the_same_run(tmp_path):
    """It forgets what an earlier run saw, not what this one did."""
    lazy = LazyFetcher(folder=tmp_path / "cache", run="r")
    lazy.cache.pin("r", "gs://b/a", "1")
    lazy.close()
    assert lazy.cache.pinned("r", "gs://b/a") is not None
    lazy.close()
    with LazyFetcher(folder=tmp_path / "cache", run="r") as new:
        assert new.cache.pinned("r", "gs://b/a") is None


def test_shards_are_fetched_before_their_turn(tmp_path):
    """In the background, those that are not open; each opened by its own URL."""

    class Fetcher:
        def __init__(self):
            self.ahead, self.files = [], []

        def blob(self, url):
            return url

        def prefetch(self, blob):
            self.ahead.append(blob)

        def file(self, url):
            self.files.append(url)
            return tmp_path / url.rsplit("/", 1)[1]

        def release(self, url):
            pass

        def list(self, pattern):
            return [f"gs://b/{i}.tar" for i in range(6)]

    for i in range(6):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"hi"))
    fetcher = Fetcher()
    assert Rows("gs://b/3.tar", fetcher=fetcher).n == 1 and fetcher.files.pop() == "gs://b/3.tar"  # no stream
    rows = Rows("gs://b/*.tar", fetcher=fetcher)
    walk = rows.walk(1).walk(0)
    rows[next(walk)]
    first, second = {f"gs://b/{i}.tar" for i in rows._open}, set(fetcher.ahead)
    assert len(first) == len(fetcher.files) == 4 and len(second) == 2 and not first & second
    list(walk)
    list(rows.walk(1).walk(1))
    assert len(fetcher.files) == 6 and len(fetcher.ahead) == 2


def test_parts_of_weight_one_are_one_order(tmp_path, processor):
    """As the same files named by a pattern."""
    for name, n in (("a", 7), ("b", 12)):
        texts(tmp_path / f"{name}.csv", [f"{name}{i}" for i in range(n)], "csv")
    (tmp_path / "mix.yaml").write_text("- {data: a.csv}\n- {data: b.csv, weight: 1}\n")
    orders = [list(Rows(tmp_path / name).walk(4).walk(1)) for name in ("mix.yaml", "{a,b}.csv")]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(19))


def test_the_last_shard_stays_though_all_others_are_in_use(tmp_path, monkeypatch):
    far = Opened(tmp_path, monkeypatch, [1] * 10)
    rows = Rows("s{0..9}.csv")
    with ExitStack() as used:
        for shard in range(8):
            used.enter_context(rows.staying(shard << 32))
            rows[shard << 32]
        assert rows.count(8) == 1 and not far.closed
        assert rows.count(9) == 1 and far.closed == ["8.csv"]
    assert far.closed == ["8.csv", "7.csv"]  # the first one that nobody used any more


def test_a_fetcher_closes_its_cache(tmp_path):
    with LazyFetcher(folder=tmp_path / "cache") as lazy:
        cache = lazy.cache
        assert not cache._closed.is_set()
    assert cache._closed.is_set()


@pytest.mark.parametrize("look", ["check", "measure_all", "look_at_some", "measure", "batches"])
def test_a_source_that_fails_is_no_bad_row(tmp_path, processor, monkeypatch, look):
    """Whoever looks at the rows; and where every row that is looked at is bad, it is told."""
    path = texts(tmp_path / "a.csv", map(str, range(5)), "csv")
    data = Dataset(path, processor, check=False, on_bad_row="skip")

    def fails(error):
        def read(self, index):
            raise error

        monkeypatch.setattr(Rows, "__getitem__", read)

    fails(SourceError("gs://b/a.wav: its server fails"))
    ways = {
        "check": data.look_at_all, "measure_all": data.measure_all,
        "look_at_some": lambda: data.look_at_some(3), "measure": lambda: data.measure([0, 1]),
        "batches": lambda: next(Batches(data, 5, on_bad_row="skip", max_bad_rows=1.0)),
    }  # fmt: skip
    with pytest.raises(SourceError, match="its server fails"):
        ways[look]()
    assert not data.bad
    fails(InputError("a.csv:2: bad"))
    if look == "measure":
        assert data.measure([0, 1]) == [0, 0]
    else:
        with pytest.raises(InputError, match=r"a.csv:2: bad"):
            ways[look]()


def test_a_sample_made_twice_is_kept_once(tmp_path, processor):
    """By two threads at once; and one that is too large pushes no other out."""
    path = texts(tmp_path / "a.csv", ["1"], "csv")
    with open(path, "a") as file:
        file.write("2,hi," + "ho " * 500 + "\n")
    size = Dataset(path, processor)[0].nbytes
    data = Dataset(path, processor, cache_bytes=2 * size)
    sample = data[0]
    data._keep(0, processor.sample(data.examples[0]))
    assert data._cached == sample.nbytes and data[0] is sample
    assert data[1].nbytes > 2 * size and data[0] is sample


def test_a_shard_that_is_being_opened_stays(tmp_path, monkeypatch):
    far, go = Opened(tmp_path, monkeypatch, [1] * 12), threading.Event()
    rows, opening, found = Rows("s{0..11}.csv"), far.open, []
    rows._shards = replace(rows._shards, open=lambda name: (name != "0.csv" or go.wait(10)) and opening(name))
    thread = threading.Thread(target=lambda: found.append(rows.count(0)))
    thread.start()
    while 0 not in rows._open:
        time.sleep(0.001)
    for shard in range(1, 12):
        rows.count(shard)
    go.set()
    thread.join()
    assert found == [1] and far.opened["0.csv"] == 1 and "0.csv" not in far.closed


def test_parts_of_a_mixture_have_their_own_orders(tmp_path):
    """Also without shuffling: then it is that of the files."""
    for name in ("a", "b"):
        texts(tmp_path / f"{name}.csv", [f"{name}{i}" for i in range(30)], "csv")
    (tmp_path / "mix.yaml").write_text("- {data: a.csv, weight: 2}\n- {data: b.csv, weight: 2}\n")
    rows = Rows(tmp_path / "mix.yaml")
    order = list(rows.walk(1).walk(0))
    first = [list(dict.fromkeys(i % 30 for i in order if i // 30 == part)) for part in (0, 1)]
    assert sorted(first[0]) == sorted(first[1]) == list(range(30)) and first[0] != first[1]
    assert list(rows.walk(1, shuffle=False).walk(0)) == list(range(60))


def test_a_mixture_says_split_and_media_root_of_a_part(tmp_path, media):
    for name in ("train", "test"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        (tmp_path / "clips" / name / "x.csv").write_text(f"id,audio_path,text\n{name},short.wav,hello\n")
    (tmp_path / "roots").mkdir()
    os.link(media / "short.wav", tmp_path / "roots" / "short.wav")
    (tmp_path / "mix.yaml").write_text("- {data: clips, split: test, media_root: roots}\n")
    (example,) = read_examples(tmp_path / "mix.yaml")
    assert example.row_id == "test" and example.media()[0].path == tmp_path / "roots" / "short.wav"
    assert ids(f"{tmp_path}/**/x.csv", media_roots=[tmp_path / "roots"]) == ["test", "train"]


def test_several_parquet_files_share_what_may_be_decoded_whole(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [f"r{i}" for i in range(50)], "text": [f"number {i}" for i in range(50)]})
    for k in range(4):
        pq.write_table(table, tmp_path / f"{k}.parquet", row_group_size=10)
    (part,) = open_parts(str(tmp_path / "0.parquet"))
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 2 * sum(part.tables[0].unit_bytes))
    for source, whole in (("0.parquet", True), ("{0,1}.parquet", True), ("*.parquet", False), ("", False)):
        (part,) = open_parts(os.path.join(tmp_path, source))
        assert all((table.units is None) == whole for table in part.tables)


def test_measuring_asks_for_media_first(tmp_path, processor, monkeypatch):
    data, asked = Dataset(texts(tmp_path / "a.csv", map(str, range(4)), "csv"), processor), []
    data.prefetch = asked.append
    measured = data._measured
    monkeypatch.setattr(data, "_measured", lambda index: len(asked) == 3 and measured(index))
    assert min(data.measure([2, 0, 3])) > 0 and asked == [2, 0, 3]


def test_hosts_that_the_user_named(tmp_path):
    with LazyFetcher(["http://near.example/a.csv", "a.csv"], hosts=["other.example"], folder=tmp_path / "c") as lazy:
        assert lazy.cache and sorted(map(str, lazy._made._hosts)) == ["near.example:80", "other.example"]


def test_a_mixture_names_urls_as_they_are(tmp_path):
    (tmp_path / "mix.yaml").write_text("- {data: 'gs://b/a.csv'}\n")
    with pytest.raises(InputError, match=r"^gs://b/a.csv: only files of this machine"):
        Rows(tmp_path / "mix.yaml")


def test_no_file_of_a_folder_is_left_out_in_silence(tmp_path):
    """Neither one that says no split beside some that do, nor one of another kind."""
    texts(tmp_path / "train.csv", ["1"], "csv")
    texts(tmp_path / "more.csv", ["2"], "csv")
    with pytest.raises(InputError, match=r"more.csv \(1 such files\) belongs to no split, train.csv to 'train'"):
        Rows(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    texts(other / "a.jsonl", ["1"])
    (other / "b.json").write_text('[{"text": "x"}]')
    with pytest.raises(InputError, match=r"several kinds \(.json, .jsonl\)"):
        Rows(other)
    (other / "a.jsonl").unlink()
    assert len(Rows(other)) == 1
    (other / "b.json").unlink()
    (other / "c.txt").write_text("one\ntwo\n")
    assert len(Rows(other)) == 2


def test_corrections_that_leave_nothing(tmp_path):
    path = texts(tmp_path / "a.csv", ["1"], "csv")
    (tmp_path / "patches" / "delete").mkdir(parents=True)
    (tmp_path / "patches" / "delete" / "x.csv").write_text("id\n1\n")
    with pytest.raises(InputError, match=r"the corrections leave no row; see .*patches"):
        Rows(path, patches=str(tmp_path / "patches"))
