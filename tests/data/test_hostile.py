"""Data that mean harm or are broken: one clear line that names the place, little time and memory, nothing outside.

What each reader refuses is tested beside it; here the whole way is, from what the user names to a batch.
"""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
import soundfile

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.data.rows import Rows
from gemma_mlx.errors import InputError


def bomb():
    """A PNG of 40,000 x 40,000 black pixels in 200 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), io.BytesIO()
    for _ in range(100):
        rows.write(packer.compress(bytes(40_001) * 400))
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    data = rows.getvalue() + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def ten_hours():
    """A WAV header that promises ten hours, and one second."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000, np.float32), 16_000, "PCM_16", format="WAV")
    data = bytearray(file.getvalue())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 36_000 * 32_000)
    data[4:8] = struct.pack("<I", 36_000 * 32_000 + 36)
    return bytes(data)


def ten_real_hours():
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, "PCM_16", format="FLAC") as clip:
        for _ in range(600):
            clip.write(np.zeros(480_000, np.float32))
    return file.getvalue()


CELLS = {
    "../secret.wav": r"lies outside",
    "a/../../secret.wav": r"lies outside",
    "{outside}/secret.wav": r"lies outside",
    "/etc/passwd": r"lies outside",
    "link.wav": r"lies outside .*through a symbolic link",
    "linked/secret.wav": r"lies outside .*through a symbolic link",
    "file:///etc/passwd": r"file:// is not read",
    "ftp://example.org/a.wav": r"ftp:// is not read",
    "http://127.0.0.1:9/a.wav": r"private|loopback",
    "http://169.254.169.254/latest/meta-data": r"private|link-local",
    "http://[::1]/a.wav": r"private|loopback",
    "http://2130706433/a.wav": r"private|loopback|not",
    "folder": r"is a folder",
    "a\\b.wav": r"no such file .*write / between folders",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "outside").mkdir()
    soundfile.write(tmp_path / "outside" / "secret.wav", np.zeros(16_000, np.float32), 16_000)
    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    soundfile.write(tmp_path / "secret.wav", np.zeros(16_000, np.float32), 16_000)
    (data / "link.wav").symlink_to(tmp_path / "secret.wav")
    (data / "linked").symlink_to(tmp_path / "outside")
    return data


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_paths_and_addresses(place, processor, cell, check, tmp_path):
    """Refused where the row is looked at, and where it is only read."""
    cell_ = cell.replace("{outside}", str(tmp_path / "outside"))
    (place / "train.csv").write_text(f"audio_path,text\n{cell_},hello\n")
    fetcher = LazyFetcher(folder=tmp_path / "cache")
    with pytest.raises(InputError, match=rf"train.csv:2: .*({CELLS[cell]})") as caught:
        rows = Dataset(Rows(place / "train.csv", fetcher=fetcher), processor, check=check)
        rows[0]
    assert "\n" not in str(caught.value)
    fetcher.close()


MEDIA = {
    "bomb.png": (bomb, "image too large|unreadable image"),
    "hours.wav": (ten_hours, "over-long audio|unreadable|audio"),
    "real.flac": (ten_real_hours, "over-long audio: 36000.0 s"),
    "empty.wav": (lambda: b"", "empty audio"),
    "text.wav": (lambda: b"not a sound at all", "unreadable audio"),
    "half.png": (lambda: bomb()[:100], "image too large|unreadable image"),
}


@pytest.mark.parametrize("name", MEDIA)
def test_media(place, processor, name):
    make, says = MEDIA[name]
    data = make()
    assert len(data) < 3_000_000
    (place / name).write_bytes(data)
    column, answer = ("image_path", "caption") if name.endswith("png") else ("audio_path", "text")
    (place / "train.csv").write_text(f"{column},{answer}\n{name},hello\n")
    with pytest.raises(InputError, match=rf"train.csv:2: .*{name}: .*({says})"):
        Dataset(place / "train.csv", processor)[0]


TABLES = {
    "nul.csv": (b"text\nfine\na\0b\n", r"nul.csv:3: a NUL character"),
    "empty.csv": (b"", r"empty.csv:1: the file is empty"),
    "header.csv": (b"audio_path,text\n", r"header.csv:2: no rows below the header"),
    "none.jsonl": (b"\n", r"none.jsonl:1: the file is empty"),
    "cell.csv": (b"id,text\n1," + b"x" * (100 << 20) + b"\n", r"cell.csv:2: a line of more than 64 MiB"),
    "line.jsonl": (b'{"text": "' + b"x" * (100 << 20), r"line.jsonl:1: a line of more than 64 MiB"),
    "not.parquet": (b"PAR1 but no more", r"not.parquet: "),
    "unknown.xls": (b"x", r"unknown.xls: .xls is no known kind of data"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(place, processor, name):
    data, says = TABLES[name]
    (place / name).write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        Dataset(place / name, processor)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("member", ["../out.wav", "/abs.wav", "a/../../out.wav", "link"])
def test_archives(place, processor, member):
    with tarfile.open(place / "train.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
        info = tarfile.TarInfo("b.wav" if member == "link" else member)
        if member == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InputError, match=r"train.tar"):
        Dataset(place / "train.tar", processor)[0]
    assert not (place.parent / "out.wav").exists()


def corrupted(place, n, bad, seed=0):
    """Rows of small clips, some of them broken files."""
    rng = np.random.default_rng(seed)
    lines = ["id,audio_path,text\n"]
    for i in range(n):
        data = io.BytesIO()
        soundfile.write(data, (0.1 * rng.standard_normal(500)).astype(np.float32), 16_000, "PCM_16", format="WAV")
        content = data.getvalue()
        (place / f"{i}.wav").write_bytes(content[: 20 + i % 20] if i in bad else content)
        lines.append(f"r{i},{i}.wav,the fox {i}\n")
    (place / "train.csv").write_text("".join(lines))
    return place / "train.csv"


@pytest.mark.parametrize("checked", [True, False])
def test_one_percent_corrupt(place, processor, checked):
    """Skipped and listed, each one; the others in their batches as if nothing had been; too many stop it."""
    n = 600
    bad = set(np.random.default_rng(4).choice(n, n // 100, replace=False).tolist())
    path = corrupted(place, n, bad)

    def dataset(**options):
        data = Dataset(path, processor, check=checked, **options)
        if checked:
            data.measure_all()
        return data

    data = dataset(on_bad_row="skip")
    with Batches(data, 7, seed=2, epochs=2, on_bad_row="skip") as batches:
        found = [batch.row_ids for batch in batches]
        state = batches.state()
    listed = {**data.bad, **batches.bad}
    assert set(listed) == bad
    assert all(f"train.csv:{i + 2}" in listed[i] and f"{i}.wav" in listed[i] for i in bad)
    assert state["looked_at"] == n and state["bad"] == len(bad) * (not checked)  # an epoch's, not known before
    for i in bad:  # the order without damage
        (place / f"{i}.wav").write_bytes((place / f"{next(j for j in range(n) if j not in bad)}.wav").read_bytes())
    with Batches(Dataset(path, processor), 7, seed=2, epochs=2) as batches:
        whole = [batch.row_ids for batch in batches]
    names = {f"r{i}" for i in bad}
    assert [tuple(i for i in ids if i not in names) for ids in whole] == found
    corrupted(place, n, bad)
    with pytest.raises(InputError, match=r"rows are bad, more than 0% \(--max-bad-rows\)|bad, more than"):
        data = dataset(on_bad_row="skip", max_bad_rows=0.004)
        with Batches(data, 7, seed=2, epochs=1, on_bad_row="skip", max_bad_rows=0.004) as batches:
            list(batches)
    with pytest.raises(InputError, match=r"train.csv:\d+: .*wav"):
        list(Batches(dataset(), 7, seed=2, epochs=1))


def test_a_resumed_run_goes_on_counting(place, processor):
    path = corrupted(place, 300, {5, 50, 100, 222})
    whole = Batches(Dataset(path, processor), 4, seed=1, epochs=1, on_bad_row="skip")
    ids, states = [], []
    for batch in whole:
        ids.append(batch.row_ids)
        states.append(whole.state())
    again = Batches(Dataset(path, processor), 4, seed=1, epochs=1, on_bad_row="skip", state=states[40])
    assert [batch.row_ids for batch in again] == ids[41:] and again.state() == states[-1]
    assert states[-1]["bad"] == 4 and states[-1]["looked_at"] == 300


@pytest.mark.parametrize("checked", [True, False])
def test_the_same_bad_rows_every_epoch_are_no_more_of_them(place, processor, checked):
    """One row in ten of few: allowed in one epoch, so in any number."""
    data = Dataset(corrupted(place, 60, set(range(0, 60, 10))), processor, check=False, on_bad_row="skip")
    if checked:
        data.measure_all()
    with Batches(data, 7, seed=2, epochs=5, on_bad_row="skip") as batches:
        found = [row_id for batch in batches for row_id in batch.row_ids]
    assert len(found) == 5 * 54 and len(batches.bad) == 6


def test_rows_known_to_be_bad_were_counted(place, processor):
    """Bad rows that come together at the beginning of an epoch stop nothing if they are few in the whole."""
    n, bad = 1000, range(15)
    path = corrupted(place, n, set(bad))
    data = Dataset(path, processor, check=False, on_bad_row="skip", max_bad_rows=0.02)
    data.measure_all()
    with Batches(data, 20, shuffle=False, epochs=1, on_bad_row="skip", max_bad_rows=0.02) as batches:
        assert sum(len(batch.row_ids) for batch in batches) == n - 15
    fresh = Dataset(path, processor, check=False)
    with pytest.raises(InputError, match=r"^15 of the first 20 rows are bad, more than 2%.*train.csv:16"):
        next(Batches(fresh, 20, shuffle=False, on_bad_row="skip", max_bad_rows=0.02, workers=0))


def test_no_good_row_in_an_epoch(place, processor):
    """It does not go round for ever; nor does a resumed run that allows less fail without a reason."""
    path = corrupted(place, 6, set(range(6)))
    with pytest.raises(InputError, match=r"^all 6 rows are bad; the last one: .*train.csv:7"):
        next(Batches(Dataset(path, processor), 4, shuffle=False, on_bad_row="skip", max_bad_rows=1.0))
    path = corrupted(place, 20, set(range(9)))
    data = Dataset(path, processor)
    first = Batches(data, 10, shuffle=False, on_bad_row="skip", workers=0)
    next(first)
    again = Batches(data, 10, shuffle=False, on_bad_row="skip", max_bad_rows=0.01, workers=0, state=first.state())
    assert len(next(again).row_ids) == 10
