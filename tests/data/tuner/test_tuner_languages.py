"""What the model is told about a row's language, in each mode."""

import csv

import pytest

from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.tuner.languages import NAMES, LanguageMode, language_name
from gemma_mlx.data.tuner.layout import PatchedTable
from gemma_mlx.errors import InputError

CELLS = ["fr", "FR", "fr-CA", "pt_BR", " de ", "??", "", "French", "klingon", "xx"]
STRICT = ["French", "French", "French", "Portuguese", "German", "", "", "French", "klingon", "xx"]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("strict", STRICT), ("mixed", [""] * 10), ("auto", [""] * 10), ("override:es", ["Spanish"] * 10),
        ("override:??", [""] * 10), ("override: Latin ", ["Latin"] * 10),
    ],
)  # fmt: skip
def test_modes(tmp_path, mode, told):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["language", "text"], *([cell, "x"] for cell in CELLS)])
    table = PatchedTable(CsvTable(path), language_mode=mode)
    assert len(table) == 10  # no mode leaves a row out
    assert [table[i].values for i in range(10)] == [{"language": name, "text": "x"} for name in told]
    assert table.fingerprint() != PatchedTable(CsvTable(path)).fingerprint()


def test_a_table_without_languages(tmp_path):
    (tmp_path / "train.csv").write_text("text\nx\n")
    table = CsvTable(tmp_path / "train.csv")
    for mode in ("strict", "mixed", "override:??", None):
        told = PatchedTable(table, language_mode=mode)
        assert told.columns == ("text",) and told[0].values == {"text": "x"}
    told = PatchedTable(table, language_mode="override:cy")
    assert told.columns == ("text", "language") and told[0].values == {"text": "x", "language": "Welsh"}
    assert LanguageMode.parse("strict").language(None) == ""


@pytest.mark.parametrize("mode", ["", "Strict", "override", "override:", "override: ", "fr", "strict:fr"])
def test_refuses_a_mode_that_there_is_not(mode):
    with pytest.raises(InputError, match="language_mode: expected strict, mixed or override:XX"):
        LanguageMode.parse(mode)


def test_names_equal_whispers():
    whisper = pytest.importorskip("transformers.models.whisper.tokenization_whisper")
    known = {code: name for code, name in whisper.LANGUAGES.items()}
    other = {"my": "Burmese", "nn": "Norwegian Nynorsk", "yue": "Cantonese"}
    differ = {code: (name, NAMES.get(code)) for code, name in known.items() if NAMES.get(code, "").lower() != name}
    assert len(known) >= 99 and set(differ) <= set(other), differ
    assert all(language_name(code) == name for code, name in other.items())


def test_names_are_complete():
    assert len([code for code in NAMES if len(code) == 2]) >= 184
    assert all(name and name == name.strip() and name[0].isupper() for name in NAMES.values())
