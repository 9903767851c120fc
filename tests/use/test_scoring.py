"""Error rates against a plain dynamic-programming edit distance written here."""

import numpy as np
import pytest

from gemma_mlx.scoring import basic, character_error_rate, exact_match, whitespace, word_error_rate


def edit_distance(a, b):
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        previous, row = row, np.empty_like(row)
        row[0] = i
        for j, y in enumerate(b, 1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
    return int(row[-1])


def random_pairs(count, seed):
    r = np.random.default_rng(seed)
    words = ["alpha", "bravo", "ça", "d", "écho", "straße", "東京"]

    def sentence(low):
        return " ".join(r.choice(words, r.integers(low, 9)))

    return [sentence(0) for _ in range(count)], [sentence(0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_rates_equal_edit_distance(seed):
    references, predictions = random_pairs(60, seed)
    words = sum(edit_distance(r.split(), p.split()) for r, p in zip(references, predictions, strict=True))
    letters = sum(edit_distance(r, p) for r, p in zip(references, predictions, strict=True))
    assert word_error_rate(references, predictions) == pytest.approx(words / sum(len(r.split()) for r in references))
    assert character_error_rate(references, predictions) == pytest.approx(letters / sum(map(len, references)))


def test_edge_cases():
    assert word_error_rate(["a b"], [""]) == 1.0
    assert word_error_rate(["a"], ["a b c"]) == 2.0
    assert word_error_rate([""], [""]) == 0.0
    assert word_error_rate([""], ["x"]) == 1.0
    assert exact_match(["a", "b"], ["a", "c"]) == 0.5
    with pytest.raises(ValueError, match="1 references but 2 predictions"):
        word_error_rate(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,   World! ", "hello world"),
        ("It's 5 o’clock — now", "its 5 oclock now"),
        ("Straße\n№ 7", "straße no 7"),
        ("«Ça va?»", "ça va"),
    ],
)
def test_basic_normaliser(text, expected):
    assert basic(text) == expected


def test_no_normaliser_keeps_case():
    assert whitespace(" A  b\n") == "A b"
