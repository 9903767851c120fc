"""Plain text: rows equal what Python's own reading and splitting gives, in little memory."""

import random
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemma_mlx.data.sources import lines
from gemma_mlx.data.sources.text import TextTable
from gemma_mlx.errors import InputError


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def random_text(seed):
    rng = random.Random(seed)
    pieces = ["a word", "é 日本", " indented", "", "", "  ", "\t", "trailing  ", "x" * 50]
    breaks = ["\n", "\r\n"]
    text = "".join(rng.choice(pieces) + rng.choice(breaks) for _ in range(rng.randrange(1, 80)))
    return rng.choice(("", "\ufeff")) + text + rng.choice(("", "no line break at the end", "\r"))


@pytest.mark.parametrize("chunk", [1, 7, 100, 8 << 20])
def test_rows_equal_pythons_splitting(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    for seed in range(40):
        content = random_text(seed)
        plain = content.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\r")
        if not plain.strip():
            continue
        path = write(tmp_path / "a.txt", content)
        kept = [(n, line) for n, line in enumerate(plain.split("\n"), 1) if line.strip()]
        table = TextTable(path)
        assert [(row.where, row.values) for row in map(table.__getitem__, range(len(table)))] == [
            (f"{path}:{n}", {"text": line}) for n, line in kept
        ]
        paragraphs = [p.strip("\n") for p in re.split(r"\n(?:[ \t]*\n)+|^(?:[ \t]*\n)+|\n[ \t]*$", plain) if p.strip()]
        table = TextTable(path, sep="paragraph")
        assert [table[i].values["text"] for i in range(len(table))] == paragraphs
        (whole,) = [TextTable(path, sep="document")[0]]
        first, last = kept[0][0], kept[-1][0]
        assert whole.values["text"] == "\n".join(plain.split("\n")[first - 1 : last])
        assert whole.where == f"{path}:{first}"


def test_names_and_fingerprint(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    table = TextTable(path)
    assert (table.columns, table.units, len(table), table.name, table.base) == (
        ("text",),
        None,
        2,
        str(path),
        str(tmp_path),
    )
    assert TextTable(path, "b", "https://example.org/").base == "https://example.org/"
    assert TextTable(path, "b").name == "b" and TextTable(path, "b")[1].where == "b:3"
    assert table.fingerprint() == TextTable(write(tmp_path / "copy.txt", "one\n\ntwo\n")).fingerprint()
    assert table.fingerprint() != TextTable(write(tmp_path / "c.txt", "one\n\ntwi\n")).fingerprint()
    assert table.fingerprint() != TextTable(path, sep="document").fingerprint()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"a.txt:1: no text"),
        (b"\n \n\t\r\n", r"a.txt:1: no text"),
        (b"\xef\xbb\xbf", r"a.txt:1: no text"),
        (b"fine\nbad \0 here\n", r"a.txt:2: a NUL character"),
        ("fine".encode("utf-16"), r"a.txt:1: UTF-16"),
    ],
)
def test_refuses_what_is_no_text(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        TextTable(tmp_path / "a.txt")


def test_refuses_a_bad_row_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\ncaf\xe9\nfine too\n" + b"x" * 1_001)
    table = TextTable(path)
    assert [table[i].values["text"] for i in (0, 2)] == ["fine", "fine too"]
    with pytest.raises(InputError, match=r"a.txt:3: not UTF-8 \(byte 0xe9\)"):
        table[1]
    monkeypatch.setattr("gemma_mlx.data.sources.text.MAX_TEXT_BYTES", 1_000)
    with pytest.raises(InputError, match=r"a.txt:5: a record of"):
        table[3]
    with pytest.raises(InputError, match="no such file"):
        TextTable(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="sep is 'word'; expected one of line, paragraph, document"):
        TextTable(path, sep="word")


def test_a_million_lines_from_eight_threads(tmp_path):
    n = 1_000_000
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} says something\n" + "\n" * (i % 3 == 0) for i in range(n)))
    tracemalloc.start()
    table = TextTable(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == n and kept < 22e6 and peak < 150e6, (kept, peak)

    def read(seed):
        order = random.Random(seed).sample(range(n), 2_000)
        return all(table[i].values["text"] == f"line {i} says something" for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert table[n - 1].where.endswith(f":{n + (n - 1) // 3}")
