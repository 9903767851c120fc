"""Patches beside a data set, against the rules written out plainly, on random data and on hostile files."""

import csv
import dataclasses
import random

import numpy as np
import pytest

from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.sources.table import Row
from gemma_mlx.data.tuner.layout import PatchedTable, learnt_columns, patching
from gemma_mlx.data.tuner.patches import Patches, normal_id
from gemma_mlx.errors import InputError, SourceError


def write(path, header, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return path


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("12", "12"), ("12.0", "12"), ("12.000", "12"), ("12.", "12"), (" 12 ", "12"), ("012", "12"), ("0012.0", "12"),
        ("+12", "12"), (12, "12"), (12.0, "12"), (np.int64(12), "12"), ("-3.0", "-3"), ("-03", "-3"), (-3.0, "-3"),
        ("0", "0"), ("000", "0"), ("-0", "0"), ("0.0", "0"), (0, "0"), (0.0, "0"),
        ("12.5", "12.5"), (12.5, "12.5"), ("1.20", "1.20"), (".0", ".0"), ("1e3", "1e3"), ("1_000", "1_000"),
        ("", ""), ("   ", ""), (None, ""), (float("nan"), ""), (True, "true"), ("nan", "nan"), ("NA", "NA"),
        ("a 12", "a 12"), (" clip-007 ", "clip-007"), ("٣", "٣"), ("12 .0", "12 .0"),
        ("9" * 5000 + ".0", "9" * 5000), ("123456789012345678901.0", "123456789012345678901"),
    ],
)  # fmt: skip
def test_ids_are_compared_as_numbers_where_they_are_whole(spelling, normal):
    assert normal_id(spelling) == normal


def test_a_hostile_id_takes_no_time():
    assert normal_id("0" * 1_000_000 + "x") == "0" * 1_000_000 + "x"


def test_ids_match_as_in_a_column_that_pandas_reads_as_numbers(tmp_path):
    pandas = pytest.importorskip("pandas")
    spellings = ["7", "007", "7.0", " 7", "-2", "-2.0", "0", "00", "41.00"]
    table = write(tmp_path / "ids.csv", ["id"], [[s] for s in spellings])
    numbers = pandas.read_csv(table)["id"]
    assert [normal_id(s) for s in spellings] == [normal_id(n) for n in numbers] == [str(int(n)) for n in numbers]


SPELLINGS = [str, lambda n: f"{n}.0", lambda n: f" {n} ", lambda n: f"{n:04d}", lambda n: f"note-{n}"]


def random_project(folder, seed):
    """A table and its patches; what they say, as plain lists."""
    draw = random.Random(seed)
    # What an id is to be compared with: its number, or its text.
    spell = lambda key: key if isinstance(key, str) else draw.choice(SPELLINGS[:4])(key)  # noqa: E731
    keys = [draw.choice([n, f"note-{n}"]) for n in range(60)] + [""]
    rows = [(key, spell(key), f"perfect {i}", f"verbatim, {i}", f"text\n{i}") for i, key in enumerate(keys)]
    draw.shuffle(rows)
    write(folder / "train.csv", ["id", "text_perfect", "text_verbatim", "text"], [row[1:] for row in rows])
    said = {"override_text_perfect": [], "override_text_verbatim": [], "delete": [], "do_not_blacklist": []}
    for name, lines in said.items():
        for part in range(draw.randint(0, 3)):
            column = name.removeprefix("override_")
            new = [(draw.choice([*keys, 999]), f"{name} {part} {i}") for i in range(draw.randint(0, 20))]
            cells = [[spell(key), text, "whatever"] for key, text in new]
            write(folder / "patches" / name / f"{part}.csv", ["id", column, "wer"], cells)
            lines += [(key, text) for key, text in new if key != ""]
    (folder / "patches").mkdir(exist_ok=True)
    return rows, said


def expected(rows, said, text_column):
    """The rules: overrides, perfect before verbatim, each also to the text column; then delete minus protected."""
    left = []
    for key, spelling, *texts in rows:
        cells = dict(zip(["text_perfect", "text_verbatim", "text"], texts, strict=True))
        for name in ("override_text_perfect", "override_text_verbatim"):
            for target, text in said[name]:
                if target == key and key != "":
                    cells[name.removeprefix("override_")] = text
                    cells[text_column] = text
        deleted = any(target == key for target, _ in said["delete"])
        protected = any(target == key for target, _ in said["do_not_blacklist"])
        if key == "" or protected or not deleted:
            left.append({"id": spelling, **cells})
    return left


@pytest.mark.parametrize("text_column", ["text", "text_perfect", "text_verbatim"])
@pytest.mark.parametrize("seed", range(25))
def test_random_patches_follow_the_rules(tmp_path, seed, text_column):
    rows, said = random_project(tmp_path, seed)
    table = CsvTable(tmp_path / "train.csv")
    patches = Patches.read(tmp_path / "patches", text_column)
    patched = PatchedTable(table, patches)
    want = expected(rows, said, text_column)
    got = [patched[i] for i in range(len(patched))]
    assert [row.values for row in got] == want
    lines = {row.values["id"]: row.where for row in map(table.__getitem__, range(len(table)))}
    assert [row.where for row in got] == [lines[row["id"]] for row in want]
    # Row by row, without a table, it is the same; and so it is where the ids are given.
    alone = (patches.apply(table[i].values, table[i].where) for i in range(len(table)))
    assert [values for values in alone if values is not None] == want
    given = PatchedTable(table, patches, ids=[row[1] for row in rows])
    assert [given[i].values for i in range(len(given))] == want
    assert patches.counts() == {name: len({key for key, _ in lines}) for name, lines in said.items()}


def project(tmp_path, **folders):
    """A table of ids 1 to 5, and patches from lines by folder."""
    cells = [[n, f"p{n}", f"t{n}"] for n in range(1, 6)]
    table = CsvTable(write(tmp_path / "train.csv", ["id", "text_perfect", "text"], cells))
    (tmp_path / "patches").mkdir()
    for name, lines in folders.items():
        column = name.removeprefix("override_")
        header = ["id", column] if name.startswith("override") else ["id"]
        write(tmp_path / "patches" / name / "a.csv", header, lines)
    return table, tmp_path / "patches"


def test_what_each_folder_does_and_the_report(tmp_path):
    table, folder = project(
        tmp_path,
        override_text_perfect=[["1.0", "one"], ["2", "two"], ["3", "three"], ["77", "elsewhere"]],
        override_text_verbatim=[["02", "uh two"]],
        delete=[["3"], ["4.0"], ["5"]],
        do_not_blacklist=[[" 4 "], ["1"]],
    )
    patched = PatchedTable(table, Patches.read(folder))
    assert [tuple(patched[i].values.values()) for i in range(len(patched))] == [
        ("1", "one", "one"), ("2", "two", "uh two"), ("4", "p4", "t4"),
    ]  # fmt: skip
    assert [patched[i].where for i in range(3)] == [f"{table.name}:{line}" for line in (2, 3, 5)]
    (line,) = patched.report()
    assert line == (
        f"{table.name}: patches of {folder}: 2 of 5 rows left out, 1 kept by do_not_blacklist, text_perfect of 2 "
        "replaced, text_verbatim of 1 replaced"
    )


def test_files_are_read_in_the_order_of_their_names_and_others_are_noted(tmp_path):
    table, folder = project(tmp_path, override_text_perfect=[["1", "a"], ["2", "a"], ["2", "a again"]])
    write(folder / "override_text_perfect" / "b.csv", ["text_perfect", "id"], [["b", "1"]])
    write(folder / "override_text_perfect" / "c.csv", ["id", "text"], [["1", "c"]])
    write(folder / "delete" / "old.txt", ["id"], [["1"]])
    write(folder / "delete" / "._a.csv", ["id"], [["1"]])
    write(folder / "delete" / "b.csv", ["note_id"], [["1"]])
    write(folder / "deleted" / "b.csv", ["id"], [["1"]])
    patches = Patches.read(folder)
    assert dict(patches.texts["text_perfect"]) == {"1": "b", "2": "a again"} and not patches.deleted
    notes = "\n".join(patches.notes)
    for part in ("c.csv:1: skipped: no column 'text_perfect'", "old.txt: not read", "b.csv:1: skipped: no column 'id'"):
        assert part in notes
    assert f"{folder / 'deleted'}: not read" in notes and "._a" not in notes and len(patches.notes) == 4
    assert PatchedTable(table, patches).report()[1:] == list(patches.notes)


def test_a_row_without_the_overrides_column_gets_the_text_alone(tmp_path):
    table, folder = project(tmp_path, override_text_verbatim=[["1", "uh"]])
    row = PatchedTable(table, Patches.read(folder))[0]
    assert row.values == {"id": "1", "text_perfect": "p1", "text": "uh"}
    assert table[0].values["text"] == "t1"


def test_nothing_to_apply_changes_nothing(tmp_path):
    table, folder = project(tmp_path, delete=[["1"]], do_not_blacklist=[["1"]])
    patched = PatchedTable(table, Patches.read(folder))
    assert len(patched) == 5 and [patched[i] for i in range(5)] == [table[i] for i in range(5)]
    assert PatchedTable(table)[2] == table[2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ":1: "),
        (b"id\n1\ncaf\xe9\n", ":3: not UTF-8"),
        (b'id\n1\n"never closed\n', ":3: broken CSV"),
        (b"id,wer\n1,2\n3\n", ":3: "),
        (b"id,id\n1,2\n", ":1: "),
        (b"id\n1\n\0\n", ":3: "),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, says):
    _, folder = project(tmp_path, delete=[])
    (folder / "delete" / "bad.csv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        Patches.read(folder)
    assert str(folder / "delete" / "bad.csv") + says in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        Patches.read(tmp_path / "absent")
    write(tmp_path / "all" / "clinic" / "delete" / "a.csv", ["id"], [["1"]])
    with pytest.raises(InputError, match=r"all: holds no patches itself; name one of .*clinic"):
        Patches.read(tmp_path / "all")


def test_a_text_replaced_with_nothing_is_an_error_of_its_row_that_names_the_patch(tmp_path):
    table, folder = project(
        tmp_path, override_text_perfect=[["2", " "], ["3", ""]], override_text_verbatim=[["3", "x"]]
    )
    patched = PatchedTable(table, Patches.read(folder))
    assert len(patched) == 5 and patched[2].values["text"] == "x"
    with pytest.raises(InputError) as caught:
        patched[1]
    where = f"{folder / 'override_text_perfect' / 'a.csv'}:2"
    assert str(caught.value).startswith(f"{table.name}:3: empty text: {where} replaces the text of id 2 with nothing")


def test_patches_need_a_column_of_ids(tmp_path):
    _, folder = project(tmp_path, delete=[["1"]])
    table = CsvTable(write(tmp_path / "other.csv", ["note_id", "text"], [["1", "a"], ["2", "b"]]))
    with pytest.raises(InputError, match=r"other.csv: missing column 'id'.*found note_id, text"):
        PatchedTable(table, Patches.read(folder))
    assert [PatchedTable(table, Patches.read(folder, "text", "note_id"))[0].values["text"]] == ["b"]


def test_the_digest_is_of_what_is_said(tmp_path):
    table, folder = project(tmp_path, override_text_perfect=[["1", "a"]], delete=[["2"], ["3"]])
    first = Patches.read(folder)
    prints = {PatchedTable(table).fingerprint(), PatchedTable(table, first).fingerprint()}
    assert len(prints) == 2 and Patches.read(folder).fingerprint() == first.fingerprint()
    write(folder / "delete" / "a.csv", ["id"], [["3.0"]])
    write(folder / "delete" / "b.csv", ["id"], [["2"]])
    assert Patches.read(folder).fingerprint() == first.fingerprint()
    write(folder / "do_not_blacklist" / "b.csv", ["id"], [["2"]])
    assert Patches.read(folder).fingerprint() != first.fingerprint()
    assert Patches.read(folder, "text_perfect").fingerprint() != Patches.read(folder).fingerprint()


class Groups:
    """A table that is read in stretches; some of its rows cannot be read."""

    name, base, columns = "rows.parquet", ".", ("id", "text")

    def __init__(self, units, bad=(), error=InputError):
        self.units, self.bad, self.error = units, bad, error

    def __len__(self):
        return sum(self.units)

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error(f"rows.parquet:{index + 1}: broken")
        return Row({"id": index, "text": f"t{index}"}, f"rows.parquet:{index + 1}")

    def fingerprint(self):
        return "fixed"


def test_stretches_shrink_with_their_rows_and_empty_ones_go(tmp_path):
    write(tmp_path / "patches" / "delete" / "a.csv", ["id"], [[n] for n in (1, 4, 5, 6, 9)])
    patches = Patches.read(tmp_path / "patches")
    patched = PatchedTable(Groups([4, 3, 3]), patches)
    assert patched.units == [3, 2] and len(patched) == 5
    assert [patched[i].values["id"] for i in range(5)] == [0, 2, 3, 7, 8]
    with pytest.raises(IndexError):
        patched[5]
    assert PatchedTable(Groups([4, 3, 3])).units == [4, 3, 3] and not hasattr(patched, "unit_bytes")
    table = Groups([4, 3, 3])
    table.unit_bytes = [40, 30, 33]
    assert PatchedTable(table, patches).unit_bytes == [40, 33] and PatchedTable(table).unit_bytes == [40, 30, 33]


@pytest.mark.parametrize(
    ("columns", "mapping", "learnt"),
    [
        (("id", "text"), {}, "text"), (("caption", "text", "answer"), {}, "answer caption text"),
        (("caption", "text", "answer"), {"answer": "", "caption": ""}, "text"),
        (("said", "text"), {"text": "said"}, "said"), (("said", "text"), {"response": "said"}, "said text"),
        (("text", "said"), {"caption": "text", "text": "said"}, "text said"), (("messages",), {}, "text"),
    ],
)  # fmt: skip
def test_which_column_is_learnt(columns, mapping, learnt):
    assert learnt_columns(columns, mapping) == tuple(learnt.split())


def test_of_several_columns_the_row_s_own_is_patched(tmp_path):
    _, folder = project(tmp_path, override_text_verbatim=[["1", "new"], ["2", "new"]])
    patches = dataclasses.replace(Patches.read(folder), text_columns=("answer", "text"))
    assert patches.apply({"id": "1", "answer": "", "text": "old"}) == {"id": "1", "answer": "", "text": "new"}
    assert patches.apply({"id": "2", "answer": "old", "text": "kept"}) == {"id": "2", "answer": "new", "text": "kept"}


def test_patches_are_put_on_tables_by_their_columns(tmp_path):
    table, folder = project(tmp_path, override_text_perfect=[["2", "new"]], delete=[["1"]])
    put = patching(folder, "override:fi")
    row = put(table, {"text": "text_perfect"})[0]
    assert row.values == {"id": "2", "text_perfect": "new", "text": "t2", "language": "Finnish"}
    assert put(table, {"language": ""})[0].values == {"id": "2", "text_perfect": "new", "text": "new"}
    assert put(table, {"language": "text_perfect"})[1].values == {"id": "3", "text_perfect": "Finnish", "text": "t3"}
    other = CsvTable(write(tmp_path / "other.csv", ["note", "said", "id"], [["1", "a", "2"], ["02", "b", "1"]]))
    (only,) = [put(other, {"id": "note", "text": "said"})[0]]
    assert only.values == {"note": "02", "said": "new", "id": "1", "language": "Finnish"}
    assert patching(None, None)(table, {}) is table
    with pytest.raises(InputError, match="language_mode: expected"):
        patching(None, "french")


def test_a_row_that_cannot_be_read_stays_and_says_so_but_a_source_that_fails_is_no_row(tmp_path):
    write(tmp_path / "patches" / "delete" / "a.csv", ["id"], [[0], [2]])
    patches = Patches.read(tmp_path / "patches")
    patched = PatchedTable(Groups([5], bad=(2, 3)), patches)
    assert len(patched) == 4 and patched[0].values["id"] == 1
    with pytest.raises(InputError, match=r"rows.parquet:3: broken"):
        patched[1]
    with pytest.raises(SourceError, match=r"rows.parquet:4: broken"):
        PatchedTable(Groups([5], bad=(3,), error=SourceError), patches)


def test_a_table_that_changed_under_the_run_is_no_rows_fault(tmp_path):
    write(tmp_path / "patches" / "delete" / "a.csv", ["id"], [[0]])
    patched = PatchedTable(Groups([3]), Patches.read(tmp_path / "patches"), ids=[5, 6, 0])
    with pytest.raises(SourceError, match=r"rows.parquet:1: has another id"):
        patched[0]
