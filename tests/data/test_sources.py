"""Rows of CSV and JSONL files: what is read, where it was, and what is refused."""

import csv
import json
import os
import random
import threading

import numpy as np
import pytest

from gemma_mlx.data.sources import jsonl, lines
from gemma_mlx.data.sources.jsonl import JsonlTable, JsonTable, begins_a_list
from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.errors import InputError, SourceError


def rows_of(table):
    return [table[i] for i in range(len(table))]


def test_rows_equal_the_csv_module(table):
    content = '\ufeffid,text\r\n1,"a, ""quoted"" cell"\r\n\r\n2,"two\nlines"\r\n3,plain é 日本\r\n'
    path = table(content)
    with path.open(encoding="utf-8-sig", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = rows_of(CsvTable(path))
    assert [row.values for row in rows] == expected
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 4, 6)]


@pytest.mark.parametrize("quotes", [0.02, 0.5])
def test_records_are_those_of_the_csv_module(tmp_path, monkeypatch, quotes):
    """Random texts, cut into pieces of any size, tidy and untidy: the same cells at the same lines, or both refuse."""
    path, read = tmp_path / "fuzz.csv", 0
    for seed in range(1500):
        rng = random.Random(seed)
        monkeypatch.setattr(lines, "CHUNK", rng.choice([1, 2, 3, 7, 20, 1000]))
        kinds = ["", "a", "é b", "1,5", 'say ""so""', "two\nlines", "\r\n"] + ['"', 'a"'] * (rng.random() < quotes)
        cells = [rng.choice(kinds) for _ in range(rng.randrange(40))]
        cells = [f'"{cell}"' if rng.random() < quotes or set(cell) & set(",\n\r") else cell for cell in cells]
        ends = [rng.choice([",", "\n", "\r\n", "\n\n"]) for _ in cells]
        body = "head,er\n" + "".join(cell + end for cell, end in zip(cells, ends, strict=True))
        path.write_bytes(body.encode())
        told = [line + "\n" for line in body.split("\n")]
        reader, wanted = csv.reader(told, strict=True), []
        try:
            while True:
                begun = reader.line_num + 1
                row = next(reader)
                wanted += [(f"{path}:{begun}", row)] if row else []
        except StopIteration:
            pass
        except csv.Error:
            wanted = None
        try:
            table = CsvTable(path)
            found = [(f"{path}:{line}", table._cells(a, b, line)) for a, b, line in spans(table)]
        except InputError:
            found = None
        assert found == (wanted and wanted[1:]), body
        read += bool(found)
    assert read > 300


def spans(table):
    starts = table._starts.tolist()
    return zip(starts, starts[1:], table._lines.tolist(), strict=False)


def test_an_index_without_a_name(table):
    """As pandas writes it."""
    found = CsvTable(table(",text\n0,one\n1,two\n"))
    assert found.columns == ("", "text") and [row.values["text"] for row in rows_of(found)] == ["one", "two"]


def test_tabs_and_long_cells(table):
    words = "word " * 60_000
    (row,) = rows_of(CsvTable(table(f"prompt\tresponse\na,b\t{words}\n", "train.tsv")))
    assert row.values == {"prompt": "a,b", "response": words}


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("", 1, "the file is empty"),
        ("\n\n", 1, "the file is empty"),
        ("text,text\n", 1, "stands twice"),
        ("text,,id\n", 1, "column 2 of the header has no name"),
        ("audio_path,text\na.wav,hi\nb.wav,well, hello\n", 3, "wrong sample format: 3 cells, the header has 2"),
        ("audio_path,text\na.wav,hi\nb.wav\n", 3, "wrong sample format: 1 cells"),
        ('text\nfine\n"never closed\nand on\n', 3, "broken CSV record"),
        ('text\n"a" b\n', 2, "broken CSV record"),
    ],
)
def test_refuses_a_bad_table(table, content, line, says):
    path = table(content)
    with pytest.raises(InputError) as caught:
        rows_of(CsvTable(path))
    assert str(caught.value).startswith(f"{path}:{line}: ") and says in str(caught.value)


def test_refuses_other_encodings_and_missing_files(table, tmp_path):
    path = table("text\nfine\ncafé\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"train.csv:3: not UTF-8 \(byte 0xe9\)"):
        rows_of(CsvTable(path))
    with pytest.raises(InputError, match="no such file"):
        CsvTable(tmp_path / "absent.csv")


def test_a_record_has_a_limit(tmp_path, monkeypatch):
    """Neither a cell of 100 MB nor a quote that is never closed is read into memory."""
    path = tmp_path / "train.csv"
    with path.open("wb") as file:
        file.write(b"id,text\n1,fine\n2,")
        file.write(b"x" * (100 << 20))
        file.write(b"\n3,fine\n")
    with pytest.raises(InputError, match=r"train.csv:3: a line of more than 64 MiB"):
        CsvTable(path)
    path.write_bytes(b'id,text\n1,fine\n2,"' + b"word\n" * (18 << 20 >> 2))
    with pytest.raises(InputError, match=r"train.csv:3: broken CSV record \(field larger than field limit"):
        CsvTable(path)
    path.write_bytes(b"id,text\n1,fine\n2,a\0b\n")
    with pytest.raises(InputError, match=r"train.csv:3: a NUL character"):
        CsvTable(path)


def test_jsonl_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    objects = [
        {"id": 7, "text": "é 日本", "ok": True, "rate": 0.25, "none": None},
        {"messages": [{"role": "user", "content": "hi"}], "text": "line\u2028break"},
        {"late": "é"},
    ]
    written = [json.dumps(o, ensure_ascii=i == 0) for i, o in enumerate(objects)]
    path.write_bytes(("\ufeff" + written[0] + "\r\n\n" + written[1] + "\n  \n" + written[2]).encode())
    table = JsonlTable(path)
    with pytest.raises(InputError, match=r"train.jsonl:4: not JSON"):
        table[2]
    assert [table[i].where for i in (0, 1, 3)] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert table[0].values == {"id": "7", "text": "é 日本", "ok": "true", "rate": "0.25"}
    assert table[1].values == objects[1] and table[3].values == objects[2]
    assert table.columns == ("id", "text", "ok", "rate", "messages", "late")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1, 2]", "expected a JSON object, found a list"),
        ("3", "found a number"),
        ('{"a": 1', "not JSON"),
        ('{"a": 1} {"b": 2}', "not JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_refuses_other_lines(tmp_path, line, says):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=says) as caught:
        JsonlTable(path)[1]
    assert str(caught.value).startswith(f"{path}:2: ")
    path.write_text("\n\n")
    with pytest.raises(InputError, match="the file is empty"):
        JsonlTable(path)


@pytest.mark.parametrize("kind", [CsvTable, JsonlTable])
def test_read_by_several_threads_and_as_opened(tmp_path, kind):
    """Another file under the same name changes nothing of what is read."""
    path = tmp_path / "train"
    texts = ["text", *(f"row {i} " * (i % 50 + 1) for i in range(2000))]
    path.write_text("".join(f"{t}\n" if kind is CsvTable else json.dumps({"text": t}) + "\n" for t in texts))
    table, found = kind(path), {}
    other = tmp_path / "other"
    other.write_text("something else\n")
    other.replace(path)

    def read(first):
        for i in range(first, len(table), 4):
            found[i] = table[i].values["text"]

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(table))] == texts[kind is CsvTable :]


def test_a_json_list(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('\n [{"text": "one", "n": 1},\n {"text": "two", "list": [1]}, 5]')
    table = JsonTable(path)
    assert begins_a_list(path) and len(table) == 3 and table.columns == ("text", "n", "list")
    assert [table[i].values for i in (0, 1)] == [{"text": "one", "n": "1"}, {"text": "two", "list": [1]}]
    with pytest.raises(InputError, match=r"train.json:3: expected a JSON object, found a number"):
        table[2]
    for text in ("[]", '{"a": 1}', "[1"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"train.json: (expected a list|not JSON)"):
            JsonTable(path)


def test_many_files_need_few_descriptors(tmp_path, monkeypatch):
    """They are opened again when they are read, and have to be the same."""
    monkeypatch.setattr(lines, "MOST_OPEN", 3)
    paths = [tmp_path / f"{i}.csv" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_text(f"text\nrow {i}\n")
    tables = [CsvTable(path) for path in paths]
    for _ in range(2):
        assert [table[0].values["text"] for table in tables] == [f"row {i}" for i in range(8)]
    assert sum(table._file.file is not None for table in tables) == 3

    def read(first):
        for i in range(400):
            assert tables[(i + first) % 8][0].values["text"] == f"row {(i + first) % 8}"
        done.append(first)

    done = []
    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3] and sum(table._file.file is not None for table in tables) <= 3
    del tables[6:]
    assert [tables[0][0].values, tables[1][0].values, tables[2][0].values] == [{"text": f"row {i}"} for i in range(3)]
    (tmp_path / "other").write_text("text\nrow x\n")
    (tmp_path / "other").replace(paths[5])
    for i in range(4):
        tables[i][0]
    with pytest.raises(SourceError, match=r"5.csv: changed while it was in use"):
        tables[5][0]
    paths[4].unlink()
    with pytest.raises(SourceError, match=r"4.csv: cannot be read any more \(No such file"):
        tables[4][0]


@pytest.mark.parametrize("kind", [CsvTable, JsonlTable])
def test_a_file_that_shrinks_or_grows_in_use(tmp_path, kind):
    """No row is to blame for what was cut off; what is added later is not read."""
    path = tmp_path / "train"
    texts = ["text", "one", "two"]
    path.write_text("".join(f"{t}\n" if kind is CsvTable else json.dumps({"text": t}) + "\n" for t in texts))
    table = kind(path)
    with path.open("a") as file:
        file.write("more" * 50)
    last = len(table) - 1
    assert table[last].values == {"text": "two"}
    whole = path.read_bytes()
    path.write_bytes(whole[:12])
    with pytest.raises(SourceError, match="became shorter while it was in use"):
        table[last]


def test_a_file_that_grows_while_it_is_scanned(tmp_path, monkeypatch):
    path = tmp_path / "train.csv"
    path.write_text("text\none\ntwo\n")
    piece = lines.LineFile.piece

    def growing(self, start, line):
        with path.open("a") as file:
            file.write("later\n")
        return piece(self, start, line)

    monkeypatch.setattr(lines.LineFile, "piece", growing)
    assert [row.values["text"] for row in rows_of(CsvTable(path))] == ["one", "two"]


def test_a_first_line_that_is_broken_is_one_bad_row(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "cut o\n{"text": "fine"}\n')
    table = JsonlTable(path)
    assert table.columns == ("text",) and table[1].values == {"text": "fine"}
    with pytest.raises(InputError, match=r"train.jsonl:1: not JSON"):
        table[0]
    path.write_text("no\nJSON\n")
    with pytest.raises(InputError, match=r"train.jsonl:1: not JSON"):
        JsonlTable(path)


def test_a_header_of_quoted_names_behind_a_byte_order_mark(table):
    rows = '"the\n""text""",id\n"a\nb",2\n3,"4"\n'
    found = CsvTable(table("\ufeff" + rows))
    assert found.columns == ('the\n"text"', "id")
    assert [(row.values["id"], row.where.rpartition(":")[2]) for row in rows_of(found)] == [("2", "3"), ("4", "5")]
    assert [row.values for row in rows_of(found)] == [row.values for row in rows_of(CsvTable(table(rows)))]
    with pytest.raises(InputError, match=":1: the file is empty"):
        CsvTable(table("\ufeff\n"))


def test_lines_of_jsonl_are_counted_through_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "CHUNK", 20)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"n": {i}}}\n' + "\n" * (i % 3) for i in range(30)))
    table, text = JsonlTable(path), path.read_text().split("\n")
    assert [text[int(row.where.rpartition(":")[2]) - 1] for row in rows_of(table)] == [
        f'{{"n": {i}}}' for i in range(30)
    ]


def test_a_mark_inside_the_text_is_text(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\ufeff text , id\n\ufeffa,1\n", encoding="utf-8")
    table = CsvTable(path)
    assert table.columns == ("text", "id") and table[0].values["text"] == "\ufeffa"


def test_offsets_beyond_four_gigabytes():
    found = lines.Starts()
    found.add(np.array([0, 5 << 30]), np.array([1, 3 << 30]))
    starts, numbers = found.arrays(6 << 30)
    assert starts.tolist() == [0, 5 << 30, 6 << 30] and numbers.tolist() == [1, 3 << 30]


def test_a_json_list_has_a_limit_and_may_have_a_mark(tmp_path, monkeypatch):
    path = tmp_path / "train.json"
    path.write_text('\ufeff [{"text": "one"}]', encoding="utf-8")
    assert begins_a_list(path) and JsonTable(path)[0].values == {"text": "one"}
    monkeypatch.setattr(jsonl, "MOST_JSON", 1 << 20)
    path.write_text(json.dumps([{"text": "x" * (3 << 20)}]))
    with pytest.raises(InputError, match=r"train.json: a record of 3 MiB, the limit is 1"):
        JsonTable(path)


def test_a_file_that_was_rewritten_while_it_was_closed(tmp_path, monkeypatch):
    """Files that nobody uses any more take no one's place; one that is opened again has to be as old."""
    monkeypatch.setattr(lines, "MOST_OPEN", 2)
    paths = [tmp_path / f"{i}.csv" for i in range(4)]
    for path in paths:
        path.write_text("text\nrow\n")
    kept = CsvTable(paths[0])
    for path in paths[1:]:
        CsvTable(path)
    assert kept._file.file is not None
    others = [CsvTable(path) for path in paths[1:]]
    assert kept._file.file is None and len(others) == 3
    stat = paths[0].stat()
    paths[0].write_text("text\nwor\n")
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(SourceError, match="changed while it was in use"):
        kept[0]
