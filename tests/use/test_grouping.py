"""Groups of rows: each row in one, named and ordered as a reader expects."""

import math

import numpy as np
import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.grouping import MOST, SMALL, breakdown, file_of


def named(rows, by):
    return {g.name: g.rows for g in breakdown(rows, by)}


def test_languages_by_code_and_name():
    given = ["hi", "Hindi", "", "hindi", None, "Klingon", "zh-CN", "hi_IN", "Chinese"]
    groups = breakdown([{"language": x} for x in given], "language")
    assert [(g.name, g.rows) for g in groups] == [
        ("Hindi", (0, 1, 3, 7)),
        ("Chinese", (6, 8)),
        ("Klingon", (5,)),
        ("(none)", (2, 4)),
    ]


def test_source_is_the_column_else_the_file():
    rows = [{"where": "a/train.csv:8"}, {"where": "b.csv:2", "source": "news"}, {"where": "a/train.csv:9"}, {}]
    assert named(rows, "source") == {"a/train.csv": (0, 2), "news": (1,), "(none)": (3,)}
    assert [file_of(x) for x in ("a.csv:8", "gs://b/x.csv:12", "a:b", "C:7", "x", "")] == [
        *("a.csv", "gs://b/x.csv", "a:b", "C", "x", ""),
    ]


def test_durations():
    seconds = [0.0, 1.99, 2, 29.9, 30, 7200, None, "4.5", float("nan"), ""]
    assert named([{"duration": s} for s in seconds], "duration") == {
        "0-2 s": (0, 1),
        "2-5 s": (2, 7),
        "20-30 s": (3,),
        "30 s or more": (4, 5),
        "(none)": (6, 8, 9),
    }


def test_buckets_hold_what_their_names_say():
    """Random lengths and durations, read back from the groups' names; in ascending order."""
    r = np.random.default_rng(0)
    rows = [
        {"duration": s, "reference": "w " * n} for s, n in zip(r.gamma(2, 6, 300), r.integers(0, 70, 300), strict=True)
    ]
    for by, fact in (
        ("duration", lambda row: row["duration"]),
        ("reference_length", lambda row: row["reference"].count("w")),
    ):
        groups, below = breakdown(rows, by), -1.0
        assert sorted(i for g in groups for i in g.rows) == list(range(300))
        for group in groups:
            ends = group.name.split()[0].split("-")
            low = float(ends[0])
            high = math.inf if "or more" in group.name else float(ends[-1]) + (by == "reference_length")
            assert below < low and all(low <= fact(rows[i]) < high for i in group.rows)
            below = low


def test_reference_length_counts_letters_where_words_have_no_spaces():
    rows = [{"reference": "你好世界", "language": "zh"}, {"reference": "one two"}, {"reference": ""}, {}]
    assert named(rows, "reference_length") == {"0 words": (2,), "1-4 letters": (0,), "1-4 words": (1,), "(none)": (3,)}


def test_media():
    rows = [{"media": m} for m in (10, 2, 0, 2, None, "1")]
    assert list(named(rows, "media").items()) == [
        ("0", (2,)),
        ("1", (5,)),
        ("2", (1, 3)),
        ("10", (0,)),
        ("(none)", (4,)),
    ]


def test_any_column():
    rows = [{"speaker": s} for s in ("b", "a", " b ", 3, "", "a", "b")] + [{}]
    assert list(named(rows, "speaker").items()) == [("b", (0, 2, 6)), ("a", (1, 5)), ("3", (3,)), ("(none)", (4, 7))]
    with pytest.raises(InputError, match=r"group by 'accent': no such column; there are duration, .*speaker"):
        breakdown(rows, "accent")


def test_nothing_to_group():
    assert breakdown([], "language") == []
    assert breakdown([{"language": ""}, {"reference": "x"}], "language") == []
    assert breakdown([{"speaker": None}], "speaker") == []


def test_small_groups_are_marked():
    groups = breakdown([{"speaker": "much"}] * SMALL + [{"speaker": "little"}] * (SMALL - 1), "speaker")
    assert [(g.name, g.size, g.small) for g in groups] == [("much", SMALL, False), ("little", SMALL - 1, True)]


@pytest.mark.parametrize("nameless", [0, 3])
def test_many_groups(nameless):
    """The smallest become one before the rows without a name; no row is lost."""
    speakers = [f"s{i:03}" for i in range(80) for _ in range(100 - i)] + [""] * nameless
    rows = [{"speaker": s} for s in np.random.default_rng(1).permutation(speakers)]
    groups = breakdown(rows, "speaker")
    assert len(groups) == MOST
    assert sorted(i for g in groups for i in g.rows) == list(range(len(rows)))
    last = ["(others)", "(none)"] if nameless else ["(others)"]
    assert [g.name for g in groups] == [*(f"s{i:03}" for i in range(MOST - len(last))), *last]
    others = next(g for g in groups if g.name == "(others)")
    assert list(others.rows) == sorted(others.rows)
