"""Metrics against jiwer, sacrebleu, SQuAD's definition, and a plain edit distance written here."""

import re
import string

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from gemma_mlx.normalizers import normalizer
from gemma_mlx.scoring import (
    EDITS,
    METRICS,
    basic,
    bleu_tokenizer,
    character_error_rate,
    exact_match,
    metric,
    whitespace,
    word_error_rate,
)


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


WORDS = {
    "en": ["alpha", "bravo", "it's", "Don't", "5", "twenty-one", "end.", "(so)", "naïve"],
    "hi": ["मैं", "घर", "जा", "रहा", "हूँ", "ज़रूर।"],
    "ar": ["السلام", "عليكم", "مرحبا؟"],
    "ru": ["привет", "мир", "ёлка"],
    "th": ["สวัสดี", "ครับ", "ผม"],
    "zh": ["你好", "世界", "北京，"],
    "emoji": ["👍🏽", "🇫🇷", "ok", "é", "é"],
}


def pairs_of_texts(count, seed=7):
    """Texts of several scripts, and what a model might have made of them; both may be empty."""
    r = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(count):
        words = WORDS[r.choice(list(WORDS))]
        reference = list(r.choice(words, r.integers(1, 15)))
        heard = [w for w in reference if r.random() > 0.15]
        heard = [str(r.choice(words)) if r.random() < 0.2 else w for w in heard]
        for _ in range(r.poisson(0.7)):
            heard.insert(int(r.integers(0, len(heard) + 1)), str(r.choice(words)))
        references.append(" ".join(reference) if r.random() > 0.04 else "")
        predictions.append(" ".join(heard) if r.random() > 0.04 else "")
    return references, predictions


@pytest.fixture(scope="module")
def thousand():
    references, predictions = pairs_of_texts(1000)
    assert references.count("") > 20 and predictions.count("") > 20
    return references, predictions


def jiwer_wer(references, predictions):
    return jiwer.wer(references, predictions)


def jiwer_cer(references, predictions):
    return jiwer.cer(references, predictions)


def sacrebleu_bleu(references, predictions, tokenize="13a"):
    return BLEU(tokenize=tokenize).corpus_score(predictions, [references]).score


def sacrebleu_chrf(references, predictions):
    return CHRF().corpus_score(predictions, [references]).score


ORACLES = {"wer": jiwer_wer, "cer": jiwer_cer, "bleu": sacrebleu_bleu, "chrf": sacrebleu_chrf}


@pytest.mark.parametrize("name", ORACLES)
def test_thousand_pairs(name, thousand):
    """Error rates bit-equal to jiwer's, BLEU and chrF within 1e-12 of sacrebleu's."""
    ours, theirs = METRICS[name].score(*thousand), ORACLES[name](*thousand)
    print(f"{name}: {ours!r} against {theirs!r}")
    assert ours == theirs if name in ("wer", "cer") else ours == pytest.approx(theirs, rel=1e-12)


def test_spaces_at_the_ends_do_not_count():
    for name in ("wer", "cer"):
        assert METRICS[name].score([" ab  c "], ["ab  c d"]) == ORACLES[name]([" ab  c "], ["ab  c d"]) > 0


def test_edits_are_jiwers(thousand):
    references, predictions = thousand
    for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        for row, r, p in zip(METRICS[name].rows(*thousand), references, predictions, strict=True):
            found = process(r, p)
            assert dict(zip(EDITS, row, strict=True)) == {kind: getattr(found, kind) for kind in EDITS}


@pytest.mark.parametrize("name", ORACLES)
def test_resampled_rows_are_exact(name, thousand):
    """Rows drawn with replacement: the score of summed counts is the score of those rows' texts, few or many."""
    references, predictions = thousand
    rows, r = METRICS[name].rows(*thousand), np.random.default_rng(3)
    drawn = [r.integers(0, 1000, size) for size in (2, 3, 5, 20, 300)]
    scores = METRICS[name].corpus(np.stack([rows[i].sum(0) for i in drawn]))
    for i, score in zip(drawn, scores, strict=True):
        theirs = ORACLES[name]([references[k] for k in i], [predictions[k] for k in i])
        assert score == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_single_rows(name, thousand):
    """Short and empty rows, where orders of n-grams have no match or do not occur."""
    for reference, prediction in list(zip(*thousand, strict=True))[:300]:
        theirs = ORACLES[name]([reference], [prediction])
        assert METRICS[name].score([reference], [prediction]) == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("language", "tokenize"), [("zh", "zh"), ("Thai", "char"), ("hi", "13a"), (None, "13a")])
def test_bleu_by_language(language, tokenize, thousand):
    counted = metric("bleu", language)
    assert counted.score(*thousand) == pytest.approx(sacrebleu_bleu(*thousand, tokenize), rel=1e-12)
    assert f"tok:{tokenize}" in counted.signature


def test_signatures_are_sacrebleus():
    """But for the number of references, which rows may differ in."""
    for name, made in (("bleu", BLEU()), ("chrf", CHRF())):
        made.corpus_score(["a"], [["a"]])
        stated = made.get_signature().format().removeprefix("nrefs:1|")
        assert METRICS[name].signature.partition("|")[2] == stated


def test_bleu_of_japanese_and_korean_says_how_it_splits():
    assert bleu_tokenizer("ja") in ("char", "ja-mecab")
    assert bleu_tokenizer("ko") in ("13a", "ko-mecab")
    assert metric("bleu", "ja").score(["東京へ行く人"], ["東京へ行く人"]) == pytest.approx(100)


def test_several_references(thousand):
    """sacrebleu's own several references; for error rates the nearest, for answers the best."""
    references, predictions = thousand
    others = [*references[1:], references[0]]
    both = list(zip(references, others, strict=True))
    bleu = BLEU().corpus_score(predictions, [references, others]).score
    assert METRICS["bleu"].score(both, predictions) == pytest.approx(bleu, rel=1e-12)
    chrf = CHRF().corpus_score(predictions, [references, others]).score
    assert METRICS["chrf"].score(both, predictions) == pytest.approx(chrf, rel=1e-12)
    assert METRICS["wer"].score([["a b c d", "x y"]], ["x z"]) == 0.5
    assert METRICS["exact_match"].score([["a", "b"], ["a", "b"]], ["b", "c"]) == 0.5
    assert METRICS["f1"].score([["a", "b c"]], ["b"]) == pytest.approx(2 / 3)
    assert METRICS["anls"].score([["abcd", "abce"]], ["abce"]) == 1


# SQuAD: written from its definition, v1.1's normalisation and v2's rule for no answer.


def squad_words(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in re.split(r"\s+", re.sub(r"\b(?:a|an|the)\b", " ", text)) if w]


def squad_f1(gold, said):
    gold, said = squad_words(gold), squad_words(said)
    if not gold or not said:
        return int(gold == said)
    left, same = list(gold), 0
    for word in said:
        if word in left:
            left.remove(word)
            same += 1
    precision, recall = same / len(said), same / len(gold)
    return 0.0 if same == 0 else 2 * precision * recall / (precision + recall)


def test_answers_are_scored_as_squads():
    r = np.random.default_rng(5)
    words = ["The", "a", "an", "cat", "cat.", "Theatre", "dog's", "(red)", "1,000", "é", "—", "the", "to", "U.S."]
    golds, saids = ([" ".join(r.choice(words, r.integers(0, 6))) for _ in range(1000)] for _ in range(2))
    clean = normalizer("squad")
    gold, said = [clean(x) for x in golds], [clean(x) for x in saids]
    f1 = [squad_f1(g, s) for g, s in zip(golds, saids, strict=True)]
    assert METRICS["f1"].rows(gold, said)[:, 0] == pytest.approx(f1, abs=1e-15)
    assert METRICS["f1"].score(gold, said) == pytest.approx(np.mean(f1), abs=1e-12)
    same = [squad_words(g) == squad_words(s) for g, s in zip(golds, saids, strict=True)]
    assert METRICS["exact_match"].score(gold, said) == np.mean(same)
    assert 0.005 < np.mean(same) < np.mean(f1) < 0.5


def test_f1_of_letters():
    assert metric("f1", "zh").score(["北京市"], ["北京"]) == pytest.approx(0.8)
    assert metric("f1", None).score(["北京市"], ["北京"]) == 0


def plain_anls(golds, said):
    """Biten et al. 2019, equation 1: 1 - NL where NL < 0.5, the best of the references."""
    best = 0.0
    for gold in golds:
        one, other = " ".join(gold.strip().lower().split()), " ".join(said.strip().lower().split())
        distance = edit_distance(one, other) / max(len(one), len(other)) if one or other else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def test_anls():
    references, predictions = pairs_of_texts(150, seed=11)
    golds = [[r, p[: len(p) // 2 + 2]] for r, p in zip(references, predictions, strict=True)]
    each = [plain_anls(g, p) for g, p in zip(golds, predictions, strict=True)]
    assert METRICS["anls"].score(golds, predictions) == pytest.approx(np.mean(each), abs=1e-12)
    assert 0.2 < np.mean(each) < 0.95
    assert METRICS["anls"].score(["ab"], ["ax"]) == 0  # a distance of the threshold itself
    assert METRICS["anls"].score(["abc"], ["Abx "]) == pytest.approx(2 / 3)


def test_letters_are_words_where_words_have_no_spaces():
    assert metric("wer", "th").score(["สวัสดี"], ["สวสดี"]) == 0.25  # one of four clusters
    assert metric("wer", "zh").score(["你好world"], ["你坏world"]) == pytest.approx(1 / 3)
    assert metric("wer", "en").score(["你好world"], ["你坏world"]) == 1
    assert "letters" in metric("wer", "ja").signature and "words" in metric("wer", "hi").signature


@pytest.mark.parametrize("name", METRICS)
def test_every_metric(name):
    """One function for sums of any shape; nothing to count gives a number; a perfect answer the best."""
    m = METRICS[name]
    rows = m.rows(["a b c d e f", "", "x"], ["a b d e f", "y", ""])
    assert rows.dtype == np.float64 and m.rows([], []).shape == (0, rows.shape[1])
    grid = np.random.default_rng(0).permuted(np.stack([rows, rows[::-1]]), axis=1)
    assert m.corpus(grid).shape == (2, 3)
    assert m.corpus(grid)[1, 2] == m.corpus(grid[1, 2])
    assert m.corpus(np.zeros(rows.shape[1])) == 0
    with np.errstate(all="raise"):
        assert np.isfinite(m.corpus(grid)).all()
    best = m.score(["alpha bravo charlie delta"] * 2, ["alpha bravo charlie delta"] * 2)
    assert best == (pytest.approx(100) if m.points else float(m.higher_is_better))
    worse = m.score(["alpha bravo charlie delta"] * 2, ["alpha bravo charlie delta", "no"])
    assert worse < best if m.higher_is_better else worse > best
    assert m.text(best) in ("100.00", "100.00%", "0.00%")
    with pytest.raises(ValueError, match="1 references but 2 predictions"):
        m.rows(["a"], ["a", "b"])


def test_unknown_metric():
    with pytest.raises(KeyError):
        metric("meteor")
