"""Alignments against jiwer's, and words as written against what the normaliser makes of them."""

import itertools

import jiwer
import numpy as np
import pytest

from gemma_mlx.alignment import KINDS, align, coloured, spans
from gemma_mlx.normalizers import NAMES, normalizer, tokens
from gemma_mlx.scoring import metric

WORDS = ["a", "bb", "ccc", "d'or", "é", "東京", "हूँ", "5", "bb", "a"]


def random_pair(r, words=WORDS, longest=14):
    return [[str(w) for w in r.choice(words, r.integers(0, longest))] for _ in range(2)]


def test_alignments_are_jiwers():
    """The same runs, kind by kind, of 1,000 pairs; both sides are all there, in order."""
    r, seen = np.random.default_rng(0), set()
    for _ in range(1000):
        reference, prediction = random_pair(r)
        pieces = align(reference, prediction)
        theirs = jiwer.process_words(" ".join(reference), " ".join(prediction))
        assert [(p.kind, len(p.reference), len(p.prediction)) for p in pieces] == [
            (c.type.replace("replace", "substitute"), c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
            for c in theirs.alignments[0]
        ]
        count = {kind: sum(max(map(len, p[1:])) for p in pieces if p.kind == kind) for kind in KINDS.values()}
        assert count["substitute"] == theirs.substitutions and count["equal"] == theirs.hits
        assert (count["delete"], count["insert"]) == (theirs.deletions, theirs.insertions)
        assert [w for p in pieces for w in p.reference] == reference
        assert [w for p in pieces for w in p.prediction] == prediction
        seen |= {p.kind for p in pieces}
    assert seen == set(KINDS.values())


def test_letters():
    assert align("abcd", "abxd") == [
        ("equal", ("a", "b"), ("a", "b")),
        ("substitute", ("c",), ("x",)),
        ("equal", ("d",), ("d",)),
    ]


SENTENCES = {
    "en": "Mr. Smith — uh, has Twenty-One dogs [noise] and two hundred and five cats, can't pay $20 million; it's OK "
    "(laughs) , colour the 3rd one oh one !",
    "hi": "मैं १२ बजे, घर — जा रहा हूँ। ज़रूर ! [शोर]",
    "fr": "L'été — «ça va» (oui bien sûr) , À bientôt n°5 !",
    "th": "สวัสดี ครับ, ผม 5 (ชื่อ) สมชาย",
    "zh": "你好，世界！ I love 北京 (笑) 2 次。",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", SENTENCES)
def test_stretches_are_the_text(name, language):
    """Joined they are the text, their tokens are all tokens in order, and cleaned alone each gives its own."""
    clean, r = normalizer(name, language), np.random.default_rng(1)
    words = SENTENCES[language].split()
    alone, kept_stretches = 0, 0
    for _ in range(40):
        text = " " + "  ".join(r.choice(words, r.integers(1, 9))) + "\n"
        found = tokens(clean(text), language)
        stretches = spans(text, found, clean, language)
        assert "".join(s for s, _, _ in stretches) == text
        assert [0, *(end for _, _, end in stretches)] == [*(start for _, start, _ in stretches), len(found)]
        kept = [(tokens(clean(s), language), found[i:k]) for s, i, k in stretches if k > i]  # others: in brackets
        alone += sum(one == together for one, together in kept)
        kept_stretches += len(kept)
    assert alone >= 0.98 * kept_stretches  # a stray bracket may open or close inside a stretch


@pytest.mark.parametrize("language", SENTENCES)
def test_colours_are_the_error_rates(language):
    """Where every written word is one token, the coloured words are the counts of the word error rate."""
    r, clean = np.random.default_rng(2), normalizer("basic")
    words = [w for w in SENTENCES[language].split() if len(tokens(clean(w), None)) == 1]
    for _ in range(200):
        before, after = (" ".join(side) for side in random_pair(r, words, 9))
        wrong, missing, added, right = metric("wer").row(clean(before), clean(after))
        written, heard = ([w.kind for w in side] for side in coloured(before, after, clean))
        assert (written.count("substitute"), written.count("delete")) == (wrong, missing)
        assert (heard.count("substitute"), heard.count("insert")) == (wrong, added)
        assert written.count("equal") == heard.count("equal") == right


def test_what_the_normaliser_made_equal_is_not_coloured():
    clean = normalizer("whisper", "en")
    reference = "Mr. Smith — uh, has Twenty-One dogs and twenty one cats; he can't  fly! [some noise] OK"
    prediction = "mister smith has 21 dogs and 21 cats he cannot fly ok"
    assert clean(reference).replace("can not", "cannot") == clean(prediction).replace("can not", "cannot")
    before, after = coloured(reference, prediction.replace("cannot", "can't"), clean, "en")
    assert {w.kind for w in after} == {"equal"}
    assert [w.text.strip() for w in before if w.kind == "ignored"] == ["—", "uh,", "[some noise]"]
    assert "twenty one " in [w.text for w in before]


def test_colours():
    before, after = coloured("The Cat, sat down", "the bat sat right up there", normalizer("basic"))
    assert [tuple(w) for w in before] == [
        ("The ", "equal"),
        ("Cat, ", "substitute"),
        ("sat ", "equal"),
        ("down", "substitute"),
    ]
    kinds = [w.kind for w in after]
    assert kinds[:3] == ["equal", "substitute", "equal"] and sorted(kinds[3:]) == ["insert", "insert", "substitute"]


def test_a_word_of_several_tokens_is_wrong_if_one_of_them_is():
    before, after = coloured("I can't go", "I can now go", normalizer("whisper", "en"), "en")
    assert [w.kind for w in before] == ["equal", "substitute", "equal"]
    assert [w.kind for w in after] == ["equal", "equal", "substitute", "equal"]


def test_what_cleaning_together_adds_belongs_to_the_word_before():
    assert spans("a b", ["a", "x", "b"], str) == [("a ", 0, 2), ("b", 2, 3)]
    assert spans("a b", ["x", "a", "b", "y"], str) == [("a ", 0, 2), ("b", 2, 4)]
    assert spans("a b c", ["a", "xy", "c"], str) == [("a ", 0, 1), ("b ", 1, 2), ("c", 2, 3)]


def test_letters_of_languages_without_spaces():
    before, after = coloured("你好，世界 OK", "你坏世 ok", normalizer("whisper", "zh"), "Chinese")
    assert [tuple(w) for w in before] == [
        *(
            ("你", "equal"),
            ("好", "substitute"),
            ("，", "ignored"),
            ("世", "equal"),
            ("界 ", "delete"),
            ("OK", "equal"),
        ),
    ]
    assert [w.kind for w in after] == ["equal", "substitute", "equal", "equal"]


@pytest.mark.parametrize(("reference", "prediction"), itertools.product(["", "  ", "—", "a"], repeat=2))
def test_little_text(reference, prediction):
    clean = normalizer("whisper", "en")
    before, after = coloured(reference, prediction, clean, "en")
    assert [w.kind for w in before] == {"a": ["equal" if prediction == "a" else "delete"], "—": ["ignored"]}.get(
        reference, []
    )
    assert [w.kind for w in after] == {"a": ["equal" if reference == "a" else "insert"], "—": ["ignored"]}.get(
        prediction, []
    )
