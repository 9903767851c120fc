"""Intervals and paired tests against SciPy's, and in simulations where the truth is known."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from gemma_mlx.resampling import Interval, bootstrap, paired
from gemma_mlx.scoring import METRICS

WER, EXACT, BLEU = (METRICS[name].corpus for name in ("wer", "exact_match", "bleu"))


def utterances(r, n, skill=1.0):
    """float64 [n, 4], counts of `wer`: lengths from 3 words, each row with its own error rate, 10 % on average."""
    words = r.geometric(1 / 12, n) + 2
    wrong = r.binomial(words, np.minimum(r.beta(1, 9, n) * skill, 1))
    inserted = r.poisson(0.02 * words)
    return np.stack([wrong, 0 * wrong, inserted, words - wrong], 1).astype(np.float64)


TRUE_WER = 0.12
"""Of `utterances`: 0.1 of the words, whatever their number, and 0.02 inserted."""


def speakers(r, count, per_speaker=8):
    """(counts, speaker of each row): speakers differ far more than a speaker's rows do."""
    rows, names = [], []
    for speaker in range(count):
        words = r.geometric(1 / 12, per_speaker) + 2
        wrong = r.binomial(words, r.beta(1, 9))
        rows.append(np.stack([wrong, 0 * wrong, 0 * wrong, words - wrong], 1))
        names += [f"s{speaker}"] * per_speaker
    return np.concatenate(rows).astype(np.float64), names


def coverage(draw, truth, corpus, times, samples=1000, clustered=True):
    """(share of intervals that hold the truth, share below it, share above it)"""
    held, below, above = 0, 0, 0
    for i in range(times):
        rows = draw(np.random.default_rng([17, i]))
        rows, clusters = rows if isinstance(rows, tuple) else (rows, None)
        found = bootstrap(rows, corpus, samples, seed=i, clusters=clusters if clustered else None)
        held += found.low <= truth <= found.high
        below += found.high < truth
        above += found.low > truth
    return held / times, below / times, above / times


def test_interval_is_scipys():
    """SciPy's BCa at the level that the widening for few rows asks for; both draw the same rows from one seed."""
    r = np.random.default_rng(12)
    for corpus, rows in ((EXACT, np.stack([r.beta(1, 2, 12), np.ones(12)], 1)), (WER, utterances(r, 60))):
        n = len(rows)

        def statistic(*columns, corpus=corpus, axis=-1):
            return corpus(np.stack([c.sum(axis) for c in columns], -1))

        left_out = [corpus(np.delete(rows, i, 0).sum(0)) for i in range(n)]
        freedom = min(n - 1, 2 * n / (stats.kurtosis(left_out, fisher=False) - 1))
        tail = np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, freedom)
        theirs = stats.bootstrap(
            tuple(rows.T),
            statistic,
            paired=True,
            n_resamples=4000,
            confidence_level=2 * stats.norm.cdf(tail) - 1,
            method="BCa",
            batch=2000,
            rng=1,
        ).confidence_interval
        ours = bootstrap(rows, corpus, 4000, seed=1)
        width = theirs.high - theirs.low
        print(f"n={n}: {ours} against {theirs}")
        assert tuple(ours) == pytest.approx(tuple(theirs), abs=1e-3 * width)  # t's quantile is an expansion here


def test_p_value_is_scipys():
    """Against all 2^n exchanges of SciPy's permutation test; our 20,000 random ones have an error below 0.004 x 3."""
    r = np.random.default_rng(4)
    for effect in (0.0, 0.2, 0.4):
        a, b = r.random(11), np.clip(r.random(11) + effect, 0, 1)
        exact = stats.permutation_test(
            (b, a), lambda x, y: x.mean() - y.mean(), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        found = paired(np.stack([a, a * 0 + 1], 1), np.stack([b, b * 0 + 1], 1), EXACT, samples=20000)
        assert found.p_value == pytest.approx(exact, abs=0.012)
        assert found.difference == pytest.approx(b.mean() - a.mean())


def test_paired_interval_is_of_the_difference():
    """For a mean it is the interval of the differences themselves, drawn alike."""
    r = np.random.default_rng(8)
    a, b = r.random(40), r.random(40)
    ones = np.ones(40)
    found = paired(np.stack([a, ones], 1), np.stack([b, ones], 1), EXACT, samples=3000, seed=5)
    direct = bootstrap(np.stack([b - a, ones], 1), EXACT, samples=3000, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(direct), abs=1e-12)
    swapped = paired(np.stack([b, ones], 1), np.stack([a, ones], 1), EXACT, samples=3000, seed=5)
    assert (swapped.difference, swapped.p_value) == pytest.approx((-found.difference, found.p_value))
    assert swapped.low == pytest.approx(-found.high, abs=0.02)


def test_seed_and_level():
    rows = utterances(np.random.default_rng(1), 80)
    assert bootstrap(rows, WER) == bootstrap(rows, WER)
    assert bootstrap(rows, WER) != bootstrap(rows, WER, seed=1)
    wide, usual, narrow = (bootstrap(rows, WER, level=level) for level in (0.99, 0.95, 0.5))
    assert wide.low < usual.low < narrow.low < WER(rows.sum(0)) < narrow.high < usual.high < wide.high


def test_clusters_are_drawn_whole():
    r = np.random.default_rng(2)
    rows, names = speakers(r, 12)
    sums = rows.reshape(12, 8, 4).sum(1)
    assert bootstrap(rows, WER, clusters=names) == bootstrap(sums, WER)
    shuffled = r.permutation(len(rows))
    first = list(dict.fromkeys(np.array(names)[shuffled]))
    order = [int(name[1:]) for name in first]
    assert bootstrap(rows[shuffled], WER, clusters=list(np.array(names)[shuffled])) == bootstrap(sums[order], WER)
    assert bootstrap(rows, WER, clusters=range(len(rows))) == bootstrap(rows, WER)
    others = utterances(r, len(rows))
    other_sums = others.reshape(12, 8, 4).sum(1)
    assert paired(rows, others, WER, clusters=names) == paired(sums, other_sums, WER)
    with pytest.raises(ValueError, match="96 rows but 5 cluster labels"):
        bootstrap(rows, WER, clusters=names[:5])


def test_few_or_equal_rows():
    one = np.array([[1.0, 0, 0, 3]])
    for rows in (one[:0], one):
        assert not bootstrap(rows, WER).known
        found = paired(rows, rows, WER)
        assert np.isnan([found.low, found.high]).all() and (found.difference, found.p_value) == (0, 1)
    assert not bootstrap(np.repeat(one, 9, 0), WER, clusters=["same"] * 9).known
    assert bootstrap(np.repeat(one, 9, 0), WER) == Interval(0.25, 0.25)
    assert bootstrap(np.zeros((5, 4)), WER) == Interval(0, 0)  # nothing was said, nothing was heard
    two = bootstrap(np.array([[0.0, 0, 0, 4], [4, 0, 0, 0]]), WER)
    assert two == Interval(0, 1)
    one_apart = np.repeat(one, 9, 0)
    one_apart[3] = [0, 0, 0, 4]
    found = bootstrap(one_apart, WER)
    assert 0 < found.low < WER(one_apart.sum(0)) <= found.high <= 0.25
    for level in (0.99, 0.999):  # one row holds all that differs: the ends reach the most that was drawn
        found = bootstrap(one_apart, WER, level=level)
        assert 0 < found.low < WER(one_apart.sum(0)) <= found.high <= 0.25
    for value in (0.1, 0.7):  # thirty of which add up to another sum in another order
        found = bootstrap(np.stack([np.full(30, value), np.ones(30)], 1), EXACT)
        assert tuple(found) == pytest.approx((value, value), abs=1e-14)
    with pytest.raises(ValueError, match="not the same rows"):
        paired(one, np.repeat(one, 2, 0), WER)


def test_huge_scores():
    """Perplexities: e to the mean of nats, of rows that a model finds all but impossible."""
    r = np.random.default_rng(6)
    rows = np.stack([r.uniform(100, 900, 40), np.ones(40)], 1)
    found, small = (bootstrap(rows, lambda sums, by=by: np.exp(sums[..., 0] / sums[..., 1]) * by) for by in (1, 1e-200))
    assert 0 < found.low < np.exp(rows[:, 0].mean()) < found.high < np.inf
    assert np.array(small) * 1e200 == pytest.approx(tuple(found), rel=1e-9)


def test_p_value_is_never_zero():
    a = np.stack([np.ones(200), np.ones(200)], 1)
    found = paired(a * [0, 1], a, EXACT, samples=499)
    assert found.p_value == 1 / 500
    assert (found.difference, found.low, found.high) == (1, 1, 1)


def test_bounded_memory():
    """A table of 20,000 rows: the draws are held in parts, far below the 320 MB that all of them would take."""
    rows = utterances(np.random.default_rng(0), 20000)
    tracemalloc.start()
    bootstrap(rows, WER, samples=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak {peak / 1e6:.1f} MB")
    assert peak < 50e6


def test_coverage_of_few_simulations():
    """400 of them, so that three standard errors are 3.3 %; the slow tests have more."""
    held, *_ = coverage(lambda r: utterances(r, 50), TRUE_WER, WER, 400, samples=500)
    print(f"95 % intervals hold the truth in {held:.1%}")
    assert 0.917 <= held <= 0.983


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200])
def test_coverage(n):
    """93 to 97 % of the intervals hold the true word error rate."""
    held, below, above = coverage(lambda r: utterances(r, n), TRUE_WER, WER, 3000)
    print(f"n={n}: holds {held:.2%}, too low {below:.2%}, too high {above:.2%}")
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("n", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_coverage_of_exact_match(n):
    """Not simulated but summed over all outcomes: with whole rows right or wrong it jumps with the true share."""
    intervals = [bootstrap(np.stack([np.arange(n) < k, np.ones(n)], 1), EXACT, seed=k) for k in range(n + 1)]
    shares = np.linspace(0.6, 0.95, 36)
    held = [
        sum(
            p for p, (low, high) in zip(stats.binom.pmf(range(n + 1), n, s), intervals, strict=True) if low <= s <= high
        )
        for s in shares
    ]
    print(f"n={n}: holds {np.mean(held):.2%} on average, {min(held):.2%} at {shares[np.argmin(held)]:.2f}")
    assert 0.93 <= np.mean(held) <= 0.97
    assert min(held) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 200])
def test_coverage_with_speakers(count):
    """Of speakers drawn whole; as if rows were independent, the intervals would be far too narrow."""
    held, below, above = coverage(lambda r: speakers(r, count), 0.1, WER, 1000)
    naive, *_ = coverage(lambda r: speakers(r, count), 0.1, WER, 300, clustered=False)
    print(f"{count} speakers: holds {held:.2%}, too low {below:.2%}, too high {above:.2%}; rows alone {naive:.1%}")
    assert 0.93 <= held <= 0.97
    assert naive < 0.85


def p_values(times, n, skill=1.0):
    """Of two systems that differ on the same rows by chance alone, or by their skill."""
    found = []
    for i in range(times):
        r = np.random.default_rng([23, i])
        words = r.geometric(1 / 12, n) + 2
        hard = r.beta(1, 9, n)
        sides = []
        for rate in (hard, np.minimum(hard * skill, 1)):
            wrong = r.binomial(words, rate)
            sides.append(np.stack([wrong, 0 * wrong, r.poisson(0.02 * words), words - wrong], 1))
        found.append(paired(*sides, WER, samples=499, seed=i).p_value)
    return np.array(found)


@pytest.mark.slow
def test_p_values_are_uniform_where_nothing_differs():
    """For scores without ties; with ties of whole errors they are larger, never smaller."""
    smooth = []
    for i in range(2000):
        a, b = np.random.default_rng([31, i]).beta(1, 3, (2, 60))
        ones = np.ones(60)
        smooth.append(paired(np.stack([a, ones], 1), np.stack([b, ones], 1), EXACT, samples=499, seed=i).p_value)
    whole = p_values(2000, 60)
    fit = stats.kstest(smooth, "uniform")
    print(f"Kolmogorov-Smirnov {fit.statistic:.4f}, p {fit.pvalue:.3f}")
    assert fit.pvalue > 0.01
    for level in (0.01, 0.05, 0.1, 0.5):
        shares, error = [(np.array(p) <= level).mean() for p in (smooth, whole)], np.sqrt(level * (1 - level) / 2000)
        print(f"p <= {level}: {shares[0]:.4f}, word errors {shares[1]:.4f}")
        assert shares[0] == pytest.approx(level, abs=3 * error)
        assert 0.7 * level < shares[1] < level + 3 * error


@pytest.mark.slow
def test_power_grows_with_the_effect_and_the_rows():
    power = {(n, skill): (p_values(300, n, skill) <= 0.05).mean() for n in (30, 120) for skill in (1, 0.8, 0.5)}
    print(power)
    assert power[30, 1] < 0.09 and power[120, 1] < 0.09
    assert power[30, 1] < power[30, 0.8] < power[30, 0.5]
    assert power[30, 0.8] < power[120, 0.8] and power[120, 0.5] > 0.95


@pytest.mark.slow
def test_p_values_with_speakers():
    """Each system suits other speakers, equally often: with speakers exchanged whole one in twenty is below 5 %."""
    whole, alone = [], []
    for i in range(600):
        r = np.random.default_rng([29, i])
        words = r.geometric(1 / 12, (25, 8)) + 2
        sides = []
        for _ in range(2):
            wrong = r.binomial(words, r.beta(2, 18, (25, 1)))
            sides.append(np.stack([wrong, 0 * wrong, 0 * wrong, words - wrong], -1).reshape(200, 4))
        names = np.repeat(np.arange(25), 8).tolist()
        whole.append(paired(*sides, WER, samples=499, seed=i, clusters=names).p_value)
        alone.append(paired(*sides, WER, samples=499, seed=i).p_value)
    shares = [float((np.array(p) <= 0.05).mean()) for p in (whole, alone)]
    print(f"p <= 0.05: speakers {shares[0]:.3f}, rows {shares[1]:.3f}")
    assert shares[0] == pytest.approx(0.05, abs=0.027)
    assert shares[1] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_thousand_rows_take_well_under_a_second(name):
    r = np.random.default_rng(0)
    rows = r.integers(1, 9, (1000, METRICS[name].rows([], []).shape[1])).astype(float)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        bootstrap(rows, METRICS[name].corpus)
        taken.append(time.perf_counter() - start)
    print(f"{name}: {min(taken) * 1000:.0f} ms")
    assert min(taken) < 0.5
