"""Splits: groups stay together, shares are met, the seed alone decides."""

import numpy as np
import pytest
from prepared_rows import read_csv, table

from gemma_mlx.errors import InputError
from gemma_mlx.preparing.split import assign, group_key, read_fractions


def keys(groups):
    return np.array([group_key(str(g)) for g in groups], np.uint64)


def test_groups_stay_together_and_shares_are_met():
    r = np.random.default_rng(0)
    groups = r.integers(0, 500, 10_000)
    fractions = {"train": 0.8, "valid": 0.15, "test": 0.05}
    splits = assign(keys(groups), fractions, 1)
    for group in range(500):
        assert len(set(splits[groups == group])) <= 1
    for i, share in enumerate(fractions.values()):
        assert (splits == i).mean() == pytest.approx(share, abs=0.01)


def test_order_of_rows_and_other_rows_matter_little():
    groups = np.arange(1000)
    splits = assign(keys(groups), {"train": 0.9, "valid": 0.1}, 0)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(assign(keys(groups[order]), {"train": 0.9, "valid": 0.1}, 0), splits[order])
    more = assign(keys(np.arange(1100)), {"train": 0.9, "valid": 0.1}, 0)
    assert (more[:1000] != splits).sum() < 20
    assert (assign(keys(groups), {"train": 0.9, "valid": 0.1}, 1) != splits).sum() > 100
    assert (splits == 1).sum() == 100


def test_too_few_groups_are_refused():
    with pytest.raises(InputError, match="no row would be in valid"):
        assign(keys([1, 1, 1, 1]), {"train": 0.9, "valid": 0.1}, 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.9", {"train": 0.9, "valid": 0.1}), ("train=0.8, test=0.2", {"train": 0.8, "test": 0.2})],
)
def test_shares(text, found):
    assert read_fractions(text) == pytest.approx(found)


@pytest.mark.parametrize(
    "text", ["1", "0", "-1", "nan", "x", "train=0.5", "train=0.5,train=0.5", "a=0.5,b=0.5", "a=b=c"]
)
def test_bad_shares(text):
    with pytest.raises(InputError, match="--split"):
        read_fractions(text)


def test_a_speaker_is_in_one_file_and_twins_stay_together(folder, run, tmp_path):
    clips = ["a.wav", "b.wav", "c.wav", "d.wav", "again.wav", "stereo.wav"]
    rows = [{"id": i, "audio_path": clips[i % 6], "text": f"t{i}", "speaker": f"s{i % 5}"} for i in range(30)]
    path = table(folder / "t.csv", rows)
    for out, flags in (("o", ("--split-by", "speaker")), ("p", ())):
        code, _, err = run(path, "--out", tmp_path / out, "--split", "train=0.5,valid=0.25,test=0.25", *flags)
        assert code == 0, err
        parts = [read_csv(tmp_path / out / f"{name}.csv") for name in ("train", "valid", "test")]
        assert sorted(int(row["id"]) for part in parts for row in part) == list(range(30))
        assert all(parts)
        if flags:
            speakers = [{row["speaker"] for row in part} for part in parts]
        else:
            contents = [{(tmp_path / out / row["audio_path"]).read_bytes() for row in part} for part in parts]
            speakers = contents
        assert not (speakers[0] & speakers[1] or speakers[0] & speakers[2] or speakers[1] & speakers[2])
    assert run(path, "--out", tmp_path / "q", "--split", "train=0.5,valid=0.25,test=0.25", "--workers", 3)[0] == 0
    for name in ("train", "valid", "test"):
        assert (tmp_path / "q" / f"{name}.csv").read_bytes() == (tmp_path / "p" / f"{name}.csv").read_bytes()
