"""WebDataset shards: places and groups equal those of `tarfile` and `datasets`; hostile archives get one line."""

import io
import json
import random
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemma_mlx.data.blob import Member
from gemma_mlx.data.sources.tar import TarTable
from gemma_mlx.data.sources.tar_members import members
from gemma_mlx.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path, files, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes or TarInfo's changes)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(rng, n, long=False):
    """Random samples in the order that WebDataset's writer has."""
    files = []
    for i in range(n):
        folder = rng.choice(("", "a/", "a.b/é/")) + ("d" * 120 + "/" if long and i % 2 else "")
        key = f"{folder}{i:05d}"
        files.append((f"{key}.flac", b"fLaC" + rng.randbytes(rng.randrange(3_000))))
        if rng.random() < 0.5:
            files += [(f"{key}.{j}.PNG", rng.randbytes(rng.randrange(600))) for j in range(rng.randrange(1, 3))]
        files.append((f"{key}.txt", f"text {i} ü\n".encode()))
        if rng.random() < 0.5:
            files.append((f"{key}.json", json.dumps({"language": "German", "n": i, "none": None}).encode()))
    return files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("long", [False, True])
def test_members_lie_where_tarfile_finds_them(tmp_path, form, long):
    files = samples(random.Random(form), 60, long)
    path = write(tmp_path / "a.tar", files, FORMATS[form])
    with tarfile.open(path) as tar, path.open("rb") as file:
        assert list(members(file, "a.tar")) == [(m.name, m.offset_data, m.size) for m in tar]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_equal_those_of_datasets(tmp_path, form):
    """The same keys, the same extensions in the same order, the same bytes as its WebDataset reader gives."""
    reader = pytest.importorskip("datasets.packaged_modules.webdataset.webdataset")
    files = samples(random.Random(form), 80)
    path = write(tmp_path / "a.tar", files, FORMATS[form])
    raw = type("Raw", (reader.WebDataset,), {"DECODERS": {}})
    theirs = list(raw._get_pipeline_from_tar(str(path), ((name, io.BytesIO(data)) for name, data in files)))
    table = TarTable(path)
    assert len(table) == len(theirs) == 80
    assert table.columns[0] == "__key__" and set(table.columns) == {
        "__key__",
        "audio",
        "image",
        "text",
        "language",
        "n",
    }
    for i, sample in enumerate(theirs):
        row = table[i]
        assert row.where == f"{path}:{sample['__key__']}" and row.values["__key__"] == sample["__key__"]
        assert row.values["text"] == sample["txt"].decode().rstrip("\n")
        assert row.values["audio"].open().read() == sample["flac"]
        pictures = [sample[name] for name in sample if name.lower().endswith("png")]
        found = row.values.get("image", [])
        found = found if isinstance(found, list) else [found]
        assert [(p.open().read(), p.suffix) for p in found] == [(data, ".png") for data in pictures]
        fields = json.loads(sample["json"]) if "json" in sample else {}
        assert {k: row.values[k] for k in ("language", "n") if k in row.values} == {
            k: str(v) for k, v in fields.items() if v is not None
        }


def test_what_each_extension_gives(tmp_path):
    fields = {"caption": "of json", "text": "hidden", "flag": True, "tags": ["a", 1], "audio": "old.wav", "rate": 0.5}
    path = write(
        tmp_path / "s.tar",
        [
            ("./x/1.WAV", b"RIFF"),
            ("x/1.txt", b"\xef\xbb\xbfsaid\r\n"),
            ("x/1.question.txt", b"asked"),
            ("x/1.cls", b"7\n"),
            ("x/1.json", json.dumps(fields).encode()),
            ("x/1.meta.json", b'{"a": [null, 1]}'),
            ("x/1.pyd", b"\x80\x04never opened"),
            ("x/._1.wav", b"resource fork"),
            ("x/README", b"no extension"),
            ("__meta__.json", b"{}"),
            ("2.mp4", b"film"),
            ("2.answer", b"yes"),
        ],
    )
    first, second = (TarTable(path)[i] for i in (0, 1))
    with tarfile.open(path) as tar:
        place = {m.name: m.offset_data for m in tar}
    where = f"{path}:x/1"
    assert first.where == where
    assert first.values == {
        "__key__": "x/1",
        "audio": Member(path, place["./x/1.WAV"], 4, f"{where}.wav", ".wav"),
        "text": "said",
        "question": "asked",
        "label": "7",
        "caption": "of json",
        "flag": "true",
        "tags": ["a", 1],
        "rate": "0.5",
        "meta": {"a": [None, 1]},
        "pyd": Member(path, place["x/1.pyd"], 14, f"{where}.pyd", ".pyd"),
    }
    assert second.values == {
        "__key__": "2",
        "video": Member(path, place["2.mp4"], 4, f"{path}:2.mp4", ".mp4"),
        "answer": "yes",
    }
    named = TarTable(path, "hub/s.tar", "https://example.org/")
    assert (named.name, named.base, named[1].where) == ("hub/s.tar", "https://example.org/", "hub/s.tar:2")
    assert TarTable(path).base == str(tmp_path) and named.units is None


def test_eight_threads_read_what_one_reads(tmp_path):
    table = TarTable(write(tmp_path / "a.tar", samples(random.Random(4), 200)))
    alone = [(table[i].values, table[i].values["audio"].open().read()) for i in range(200)]

    def read(seed):
        order = random.Random(seed).sample(range(200), 200)
        return all((table[i].values, table[i].values["audio"].open().read()) == alone[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def special(name, **changes):
    """One member that is no plain file, beside a good sample."""

    def make(path):
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            good = tarfile.TarInfo("1.txt")
            good.size = 2
            tar.addfile(good, io.BytesIO(b"hi"))
            info = tarfile.TarInfo(name)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info)

    return make


def plain(*files):
    return lambda path: write(path, files)


def pax(name, **headers):
    def make(path):
        info = tarfile.TarInfo(name)
        info.pax_headers = headers
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info)

    return make


def changed(change):
    def make(path):
        write(path, [("1.flac", bytes(2_000)), ("1.txt", b"hi")], tarfile.USTAR_FORMAT)
        data = bytearray(path.read_bytes())
        path.write_bytes(change(data) or data)

    return make


def sized(digits):
    """The first header with another size, and its checksum right again."""

    def change(data):
        data[124:136] = digits
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])

    return changed(change)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (plain(("../1.txt", b"x")), "lies outside the archive"),
        (plain(("a/../../1.txt", b"x")), "lies outside the archive"),
        (plain(("/etc/1.txt", b"x")), "lies outside the archive"),
        (plain((".//etc/../1.txt", b"x")), "lies outside the archive"),
        (pax("1.txt", path="a\0b.txt"), "lies outside the archive"),
        (special("2.wav", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'2.wav' is a symbolic link"),
        (special("2.wav", type=tarfile.LNKTYPE, linkname="1.txt"), "'2.wav' is a hard link"),
        (special("2.wav", type=tarfile.LNKTYPE, linkname="l" * 200), "'2.wav' is a hard link"),
        (special("2.wav", type=tarfile.CHRTYPE), "is a device"),
        (special("2.wav", type=tarfile.BLKTYPE), "is a device"),
        (special("2.wav", type=tarfile.FIFOTYPE), "is a pipe"),
        (special("2.wav", type=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
        (special("2.wav", type=b"V"), "of an unknown kind"),
        (pax("1.txt", **{"GNU.sparse.major": "1"}), "sparse file"),
        (pax("1.txt", size="99999999999999999999999"), "no size"),
        (pax("1.txt", size=str(1 << 60)), "says 1152921504606846976 bytes"),
        (plain(("1.txt", b"a"), ("2.txt", b"b"), ("1.wav", b"c")), r"tar:1: this key stands at two places"),
        (plain(("1.txt", b"a"), ("1.TXT", b"b")), r"tar:1: the member .TXT stands twice"),
        (plain(("README", b"a")), "no samples"),
        (lambda path: write(path, []), "no samples"),
        (lambda path: path.write_bytes(b""), "not a tar archive"),
        (lambda path: path.write_bytes(b"text\n" * 500), "not a tar archive"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(900)), r"packed by gzip; .*gunzip"),
        (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd"), "packed by zstd"),
        (lambda path: None, "cannot be read"),
        (sized(b"77777777777\0"), "says 8589934591 bytes, the file has"),
        (sized(b"\x80" + b"\xff" * 11), "bytes, the file has"),
        (sized(b"-0000000001\0"), "no size in the header"),
        (changed(lambda d: d[:700]), "truncated"),
        (changed(lambda d: d[: 512 * 5]), "no end mark"),
        (changed(lambda d: d[: 512 * 5 + 100]), "truncated"),
        (changed(lambda d: d + d), "more data behind"),
        (changed(lambda d: d.__setitem__(slice(512 * 5, 512 * 5 + 3), b"zzz")), "no header at byte 2560"),
    ],
)
def test_refuses_hostile_archives(tmp_path, make, says):
    path = tmp_path / "a.tar"
    make(path)
    with pytest.raises(InputError, match=says) as caught:
        TarTable(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("2.txt", b"caf\xe9")], r"a.tar:2.txt: not UTF-8"),
        ([("2.txt", b"a\0b")], r"a.tar:2.txt: contains a NUL"),
        ([("2.json", b"{no")], r"a.tar:2.json: not JSON"),
        ([("2.json", b"[" * 100_000)], r"a.tar:2.json: not JSON"),
        ([("2.json", b'{"n": ' + b"9" * 5_000 + b"}")], r"a.tar:2.json: not JSON"),
        ([("2.json", b"[1]")], r"a.tar:2.json: expected a JSON object"),
        ([("2.txt", b"a"), ("2.text", b"b")], r"a.tar:2: two members give 'text'"),
        ([("2.wav", b"a"), ("2.audio.txt", b"b")], r"a.tar:2: two members give 'audio'"),
        ([("2.txt", bytes((1 << 24) + 1))], r"a.tar:2.txt: 16777217 bytes of text"),
    ],
)
def test_refuses_a_bad_row_alone(tmp_path, files, says):
    table = TarTable(write(tmp_path / "a.tar", [("1.txt", b"good"), *files]))
    assert table[0].values["text"] == "good"
    with pytest.raises(InputError, match=says):
        table[1]


def test_random_damage_never_gives_anything_but_rows_or_one_line(tmp_path):
    rng, refused = random.Random(5), 0
    whole = write(tmp_path / "a.tar", samples(rng, 10), tarfile.PAX_FORMAT).read_bytes()
    path = tmp_path / "b.tar"
    for _ in range(300):
        at, length = rng.randrange(len(whole)), rng.choice((1, 4, 600))
        path.write_bytes(whole[:at] + rng.randbytes(length) + whole[at + length :])
        try:
            table = TarTable(path)
            for i in range(len(table)):
                table[i]
        except InputError as e:
            refused += 1
            assert str(e).startswith(str(path)) and "\n" not in str(e)
    assert refused > 50


def test_fingerprint_survives_copying_and_notices_changes(tmp_path):
    big = bytes(2_000_000)
    one = TarTable(write(tmp_path / "1.tar", [("1.wav", big), ("1.txt", b"a"), ("2.wav", big)]))
    copy = tmp_path / "copy.tar"
    copy.write_bytes(one.path.read_bytes())
    assert one.fingerprint() == TarTable(copy).fingerprint()
    # A member's name in the middle of the file.
    other = TarTable(write(tmp_path / "2.tar", [("1.wav", big), ("1.cls", b"a"), ("2.wav", big)]))
    assert one.path.stat().st_size == other.path.stat().st_size and one.fingerprint() != other.fingerprint()


def test_the_index_is_small(tmp_path):
    """10,000 members; a million need a hundred times that, which is less than 100 MB."""
    path, n = tmp_path / "a.tar", 5_000
    info = tarfile.TarInfo()
    with path.open("wb") as file:
        for i in range(n):
            for suffix in ("wav", "txt"):
                info.name, info.size = f"clips/{i:07d}.{suffix}", 4
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"data".ljust(512, b"\0"))
        file.write(bytes(1_024))
    tracemalloc.start()
    table = TarTable(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == n and kept < 0.5e6 and peak < 1e6, (kept, peak)
    assert sys.getsizeof(table._keys) < 14 * n
