"""Filters, penalties and draws against mlx-lm, transformers and NumPy."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.sample_utils import make_repetition_penalty
from transformers import RepetitionPenaltyLogitsProcessor

from gemma_mlx.errors import InputError
from gemma_mlx.sampling import BARRED, Chooser, Settings, filters

V = 37


def chooser(rows, prompts=None, **settings):
    prompts = [np.array([1])] * len(rows) if prompts is None else prompts
    return Chooser(Settings(**settings), prompts, rows)


def random_logits(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32) * 3


@pytest.mark.parametrize("context", [4, 20])
def test_penalty_equals_mlx_lm_and_transformers(context):
    """Prompts of 3 and 30 tokens, six steps: each row is penalised for its own last tokens, the prompt's among them."""
    r = np.random.default_rng(1)
    histories = [r.integers(0, V, n).tolist() for n in (3, 30, 11)]
    choose = chooser([0, 1, 2], histories, repetition_penalty=1.7, repetition_context=context)
    theirs = make_repetition_penalty(1.7, context)
    transformers = RepetitionPenaltyLogitsProcessor(1.7)
    for step in range(6):
        logits = random_logits(3, step)
        tokens = choose(mx.array(logits)).tolist()
        for row, history in enumerate(histories):
            expected = np.array(theirs(mx.array(history), mx.array(logits[row : row + 1])))[0]
            seen = torch.tensor(history[-context:])[None]
            again = transformers(seen, torch.tensor(logits[row : row + 1]))[0].numpy()
            np.testing.assert_allclose(expected, again, rtol=1e-6)
            assert tokens[row] == expected.argmax()
            history.append(tokens[row])
    plain = chooser([0, 1, 2], histories)(mx.array(logits)).tolist()
    assert plain == logits.argmax(1).tolist() != tokens


def reference_filter(p, top_p, min_p, top_k):
    """Which of the probabilities [V] stay: the fewest whose mass reaches top_p; those above min_p of the largest; k."""
    order = np.argsort(-p)
    stay = np.ones(V, bool)
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        stay[order[before >= top_p]] = False
    if min_p:
        stay &= p >= min_p * p.max()
    if top_k:
        stay[order[top_k:]] = False
    return stay


@pytest.mark.parametrize(
    "top_p, min_p, top_k", [(0.7, 0, 0), (1, 0.1, 0), (1, 0, 5), (0.9, 0.05, 8), (1, 0, V), (1, 0, 500)]
)
def test_filters_equal_numpy(top_p, min_p, top_k):
    logits = random_logits(20)
    p = np.exp(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    left = mx.log(mx.array(p))
    for each in filters(Settings(temperature=1, top_p=top_p, min_p=min_p, top_k=top_k)):
        left = each(left)
    expected = np.stack([reference_filter(row.astype(np.float64), top_p, min_p, top_k) for row in p])
    np.testing.assert_array_equal(np.isfinite(np.array(left)), expected)


def test_draws_follow_the_probabilities():
    """20,000 rows that differ by their number alone; at temperature 2 probabilities go as their square roots."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    rows = mx.broadcast_to(mx.log(mx.array(p.astype(np.float32))), (20_000, 4))
    for temperature, expected in ((1.0, p), (2.0, np.sqrt(p) / np.sqrt(p).sum())):
        drawn = np.array(chooser(range(20_000), temperature=temperature, seed=1)(rows))
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, expected, atol=0.015)


def test_what_a_row_draws_depends_on_seed_and_number_alone():
    logits = mx.array(np.zeros((6, V), np.float32))
    whole = chooser(range(6), temperature=1.0, seed=5)
    first = [whole(logits).tolist() for _ in range(4)]
    assert len({tuple(row) for row in np.array(first).T}) == 6, "rows draw differently"
    parted, other = chooser([4, 2], temperature=1.0, seed=5), chooser([0], temperature=1.0, seed=5)
    parted.join(other)
    again = [parted(logits[:3]).tolist() for _ in range(2)]
    parted.keep([2, 0])
    again += [parted(logits[:2]).tolist() for _ in range(2)]
    assert again == [[first[0][i] for i in (4, 2, 0)], [first[1][i] for i in (4, 2, 0)],
                     [first[2][i] for i in (0, 4)], [first[3][i] for i in (0, 4)]]  # fmt: skip
    assert chooser(range(6), temperature=1.0, seed=6)(logits).tolist() != first[0]


def test_barred_ids_never_come():
    logits = np.zeros((500, V), np.float32)
    logits[:, [3, 4]] = 50
    choose = Chooser(Settings(temperature=1.0, seed=0), [np.array([3])] * 500, range(500), barred=(3, 4))
    assert not set(choose(mx.array(logits)).tolist()) & {3, 4}
    assert BARRED < -1e8


@pytest.mark.parametrize(
    "bad", [
        dict(max_tokens=0), dict(max_tokens=2.5), dict(temperature=-1), dict(temperature=float("nan")),
        dict(top_p=1.1), dict(top_k=-1), dict(min_p=-0.1), dict(repetition_penalty=0), dict(repetition_context=0),
        dict(stop=("",)), dict(stop=(3,)), dict(seed=-1), dict(top_k=True),
    ],
)  # fmt: skip
def test_values_outside_their_range_get_one_line(bad):
    with pytest.raises(InputError, match=next(iter(bad))) as error:
        Settings(**bad)
    assert "\n" not in str(error.value)


def test_one_stop_text_may_stand_alone():
    assert Settings(stop="END").stop == ("END",)
