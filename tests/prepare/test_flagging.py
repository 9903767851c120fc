"""evaluate --flag-bad-rows: what is flagged, and that it is a patch."""

import csv
from types import SimpleNamespace

import pytest
from prepared_rows import read_csv

from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.tuner.layout import PatchedTable
from gemma_mlx.data.tuner.patches import Patches
from gemma_mlx.errors import InputError
from gemma_mlx.flagging import flag_rows, flagged


def said(row_id, reference, prediction, task="transcript", where=None):
    return SimpleNamespace(
        row_id=row_id, where=where or f"t.csv:{row_id}", task=task, reference=reference, prediction=prediction
    )


ROWS = [
    said("1", "one two three four", "one two three four"),
    said("2", "one two three four", "one TWO, three x"),  # 1 of 4 words
    said("3", "one two three four", "one two x y"),  # 2 of 4
    said("4", "one two", "a b c d e"),  # 5 errors of 2
    said("5", "yes", "no", task="answer"),
    said("t.csv:9", "one", "two", where="t.csv:9"),  # without an id
]


def test_rows_above_the_limit_and_no_others():
    assert [(p.row_id, rate) for p, rate in flagged(ROWS, 0.5)] == [("4", 2.5), ("t.csv:9", 1.0)]
    assert [p.row_id for p, _ in flagged(ROWS, 0.25)] == ["4", "t.csv:9", "3"]
    assert [p.row_id for p, _ in flagged(ROWS, 0.0)] == ["4", "t.csv:9", "3", "2"]
    assert [p.row_id for p, _ in flagged(ROWS, 0.25, "none")] == ["4", "t.csv:9", "2", "3"]


def test_the_file_is_a_patch_that_deletes_them(tmp_path):
    told = flag_rows(ROWS, 0.25, tmp_path)
    assert told.startswith("3 of 5 transcripts") and "1 of them have no id" in told
    assert [row["id"] for row in read_csv(tmp_path / "delete.csv")] == ["4", "", "3"]
    table = tmp_path / "train.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([p.row_id, p.reference] for p in ROWS[:5])])
    folder = tmp_path / "data_patches" / "source" / "delete"
    folder.mkdir(parents=True)
    (tmp_path / "delete.csv").rename(folder / "delete.csv")
    patched = PatchedTable(CsvTable(table), Patches.read(folder.parent, "text"))
    assert [patched[i].values["id"] for i in range(len(patched))] == ["1", "2", "5"]


@pytest.mark.parametrize("limit", [-0.1, float("nan"), float("inf")])
def test_limits_that_are_none(tmp_path, limit):
    with pytest.raises(InputError, match="word error rate"):
        flag_rows(ROWS, limit, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_it(checkpoint_folder, rows, run, tmp_path):
    data = ("--model", checkpoint_folder, "--data", rows / "media.csv", "--max-tokens", 3)
    source = read_csv(rows / "media.csv")
    table = rows / "flagged.csv"
    with table.open("w", newline="") as file:
        out = csv.DictWriter(file, ["id", *source[0]])
        out.writeheader()
        out.writerows({"id": i, **row} for i, row in enumerate(source) if row["audio_path"])
    data = ("--model", checkpoint_folder, "--data", table, "--max-tokens", 3)
    code, out, err = run(*data, "--out", tmp_path, "--flag-bad-rows", 0.5, verb="evaluate")
    assert code == 0, err
    predictions = read_csv(tmp_path / "predictions.csv")
    worse = {row["row_id"] for row in predictions if float(row["errors"]) > 0.5}
    assert worse and {row["id"] for row in read_csv(tmp_path / "delete.csv")} == worse
    assert f"{len(worse)} of {len(predictions)} transcripts" in out
    assert run(*data, "--flag-bad-rows", 0.5, verb="evaluate")[0] == 2
    assert run(*data, "--out", tmp_path, "--flag-bad-rows", -1, verb="evaluate")[0] == 2
