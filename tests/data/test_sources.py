"""CSV rows: what is read, where it was, going on from there, and what is refused."""

import csv

import pytest

from gemma_mlx.data.sources.local import CsvRows
from gemma_mlx.errors import InputError


def test_rows_equal_the_csv_module(table):
    content = '\ufeffid,text\r\n1,"a, ""quoted"" cell"\r\n\r\n2,"two\nlines"\r\n3,plain é 日本\r\n'
    path = table(content)
    with path.open(encoding="utf-8-sig", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = list(CsvRows(path))
    assert [row.values for row in rows] == expected
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 4, 6)]


@pytest.mark.parametrize("stop", range(5))
def test_goes_on_from_its_state(table, stop):
    path = table('id,text\n1,"one\n1"\n2,zwei ü\n3,"three, 3"\n\n4,four\n')
    whole = list(CsvRows(path))
    first = CsvRows(path)
    for _, _ in zip(range(stop), first, strict=False):
        pass
    assert first.state()["row"] == stop
    assert list(CsvRows(path, first.state())) == whole[stop:]


def test_tabs_and_long_cells(table):
    words = "word " * 60_000
    (row,) = CsvRows(table(f"prompt\tresponse\na,b\t{words}\n", "train.tsv"))
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
        list(CsvRows(path))
    assert str(caught.value).startswith(f"{path}:{line}: ") and says in str(caught.value)


def test_refuses_other_encodings_and_missing_files(table, tmp_path):
    path = table("text\nfine\ncafé\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"train.csv:3: not UTF-8 \(byte 0xe9\)"):
        list(CsvRows(path))
    with pytest.raises(InputError, match="no such file"):
        CsvRows(tmp_path / "absent.csv")
