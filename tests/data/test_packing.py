"""Packed rows and batches of similar length: order, every row once an epoch, resumption, waste, what lies in a row."""

from dataclasses import fields, replace

import numpy as np
import pytest

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.batches import Batches, collate
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import Grouped, Shuffled, padding
from gemma_mlx.data.packing import Packed, best_fit, joined
from gemma_mlx.data.permutation import Order
from gemma_mlx.data.template import Sample
from gemma_mlx.errors import InputError

MIXED = (
    "id,image_path,audio_path,question,answer,text\n"
    "a,tall.png,,What?,this,\n"
    "b,,short.wav,,,hello\n"
    "c,,,Why?,because the dog,\n"
    "d,wide.png,long.wav,Say?,the fox,\n"
    "e,,,,,once upon a time\n"
)


def log_normal(n, seed=0, mean=4.3, spread=0.8):
    """Token counts as text has them."""
    return np.clip(np.random.default_rng(seed).lognormal(mean, spread, n).astype(int), 4, None).tolist()


def row(i, length):
    ids = np.full(length, i, np.int32)
    return Sample(ids, ids.copy(), np.zeros_like(ids), row_id=str(i))


def plans(lengths, batch_size=3, seed=5):
    return {
        "packed": Packed(lengths, batch_size, 200, seed),
        "grouped": Grouped(lengths, batch_size, seed, window=4),
        "shuffled": Shuffled(len(lengths), batch_size, seed),
    }


PLANS = ("packed", "grouped", "shuffled")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("n", [1, 2, 11, 12, 100])
def test_every_sample_once_an_epoch(name, n):
    """From the beginning, and from any batch on."""
    for seed in range(3):
        plan = plans(log_normal(n, seed), seed=seed)[name]
        for epoch in range(3):
            found = list(plan.batches(epoch))
            assert sorted(i for batch in found for r in batch for i in r) == list(range(n))
            assert all(1 <= len(batch) <= 3 for batch in found) and sum(len(batch) < 3 for batch in found) <= 1
            starts = np.cumsum([0, *(sum(map(len, batch)) for batch in found)])
            assert starts[-1] == n
            for at, start in enumerate(starts):
                assert list(plan.batches(epoch, int(start))) == found[at:]


@pytest.mark.parametrize("name", PLANS)
def test_an_order_of_seed_and_epoch(name):
    lengths = log_normal(60)
    orders = [str(list(plans(lengths, seed=seed)[name].batches(epoch))) for seed in (0, 1, -7) for epoch in range(3)]
    again = [str(list(plans(lengths, seed=seed)[name].batches(epoch))) for seed in (0, 1, -7) for epoch in range(3)]
    assert orders == again and len(set(orders)) == len(orders)


@pytest.mark.parametrize("epochs", [0.0, 0.4, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("name", PLANS)
def test_count_of_batches(name, epochs):
    """Epochs of packed rows differ in their number of batches; all are counted."""
    plan = plans(log_normal(53), batch_size=2)[name]
    each = [len(list(plan.batches(epoch))) for epoch in range(4)]
    assert plan.count(epochs) == pytest.approx(sum(each[: int(epochs)]) + epochs % 1 * each[int(epochs)])
    assert name != "packed" or len({len(Packed(log_normal(300), 1, 300).rows(epoch)) for epoch in range(5)}) > 1


def brute_force(samples, lengths, budget):
    """Best fit by its definition: the fullest row with room, the earlier of equals."""
    rows = []
    for i in samples:
        used = [sum(lengths[j] for j in r) for r in rows]
        fits = [(-u, at) for at, u in enumerate(used) if u + lengths[i] <= budget]
        if fits:
            rows[min(fits)[1]].append(i)
        else:
            rows.append([i])
    return rows


def test_best_fit_is_best_fit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 60, rng.integers(1, 40)).tolist()
        budget, order = int(rng.integers(1, 100)), rng.permutation(len(lengths)).tolist()
        assert best_fit(order, lengths, budget) == brute_force(order, lengths, budget)


def test_budget_and_waste():
    """No row beyond the budget but a sample longer than it, alone. Log-normal lengths: 3 % of packed rows are padding
    at most, a tenth of grouped batches of 8, more than half of shuffled ones."""
    lengths = log_normal(2000)
    for budget in (256, 512, 1024):
        plan = Packed(lengths, 8, budget, seed=1)
        rows = [r for batch in plan.batches(0) for r in batch]
        assert all(len(r) == 1 or sum(lengths[i] for i in r) <= budget for r in rows)
        assert sum(len(r) == 1 for r in rows if lengths[r[0]] > budget) == sum(n > budget for n in lengths)
        assert sum(min(n, budget) for n in lengths) / (len(rows) * budget) >= 0.97
    assert padding(Packed(lengths, 8, max(lengths)).batches(0), lengths) <= 0.03
    assert padding(Grouped(lengths, 8).batches(0), lengths) <= 0.1
    assert padding(Shuffled(len(lengths), 8).batches(0), lengths) >= 0.5


def test_padding_is_what_collate_pads():
    lengths, multiple = log_normal(40), 8
    data = [row(i, n) for i, n in enumerate(lengths)]
    for name, plan in plans(lengths).items():
        with Batches(data, 3, seed=5, epochs=1, pad_to_multiple=multiple, plan=plan) as batches:
            masks = [batch.attention_mask for batch in batches]
        share = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
        assert padding(plan.batches(0), lengths, multiple) == pytest.approx(share), name


def test_grouped_batches_are_of_neighbours_in_a_window():
    """Sorted by length within a window of the shuffled rows, cut, and the batches out of order."""
    lengths, size, window = log_normal(48), 4, 3
    order = [Order(48, 9, 2)[i] for i in range(48)]
    wanted = []
    for first in range(0, 48, size * window):
        near = sorted(order[first : first + size * window], key=lambda i: lengths[i])
        wanted += [near[at : at + size] for at in range(0, len(near), size)]
    found = [[i for (i,) in batch] for batch in Grouped(lengths, size, 9, window).batches(2)]
    assert sorted(found) == sorted(wanted) and found != wanted


def given(a, b):
    """Whether two batches are equal in every array."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["packed", "grouped"])
def test_resumed_at_any_batch(name, workers):
    lengths = log_normal(23)
    data = [row(i, n) for i, n in enumerate(lengths)]

    def batches(state=None):
        return Batches(data, 2, seed=5, workers=workers, plan=plans(lengths, 2)[name], state=state)

    with batches() as stream:
        whole = [next(stream) for _ in range(30)]
    assert sum(len(b.row_ids) for b in whole) > 2 * len(batches())
    for stop in range(1, 30, 4):
        with batches() as first:
            for _ in range(stop):
                next(first)
            state = first.state()
        assert set(state) == {"epoch", "position", "rows", "seed", "lengths"}
        with batches(state) as second:
            assert all(given(a, b) for a, b in zip(whole[stop:], second, strict=False))


def test_other_lengths_are_refused():
    """A medium that changed since would give another plan, and rows twice or never."""
    lengths = log_normal(9)
    data = [row(i, n) for i, n in enumerate(lengths)]
    state = Batches(data, 2, plan=Packed(lengths, 2, 200)).state()
    with pytest.raises(InputError, match="cannot resume: the saved run had lengths"):
        Batches(data, 2, plan=Packed([*lengths[:-1], lengths[-1] + 1], 2, 200), state=state)


def test_joined_samples(table, processor):
    """Ids, types and media in reading order; labels but those of first tokens; segments from 1, 0 in padding."""
    samples = list(Dataset(table(MIXED), processor))
    groups = [samples[:3], samples[3:]]
    batch, apart = collate([joined(g) for g in groups], 9, 8), collate(samples, 9, 8)
    for name in ("pixel_values", "image_position_ids", "input_features", "input_features_mask"):
        assert np.array_equal(getattr(batch, name), getattr(apart, name))
    assert batch.row_ids == ("a, b, c", "d, e") and apart.segment_ids is None
    assert batch.segment_ids.dtype == batch.labels.dtype == np.int32
    assert batch.label_count == apart.label_count
    for i, group in enumerate(groups):
        start = 0
        for segment, sample in enumerate(group, start=1):
            own = slice(start, start + len(sample))
            assert (batch.segment_ids[i, own] == segment).all()
            assert np.array_equal(batch.input_ids[i, own], sample.input_ids)
            assert np.array_equal(batch.mm_token_type_ids[i, own], sample.token_types)
            assert batch.labels[i, start] == IGNORE_INDEX
            assert np.array_equal(batch.labels[i, own][1:], sample.labels[1:])
            start += len(sample)
        assert not batch.segment_ids[i, start:].any() and not batch.attention_mask[i, start:].any()


def test_a_sample_labelled_from_its_first_token():
    """Its first label counts nowhere in a row of its own; packed, the token before it must not predict it."""
    packed = joined([row(1, 4), row(2, 3)])
    assert packed.labels.tolist() == [IGNORE_INDEX, 1, 1, 1, IGNORE_INDEX, 2, 2]
    assert packed.label_count == row(1, 4).label_count + row(2, 3).label_count == 5
    assert row(1, 4).labels[0] == 1  # what it was made from is untouched


def test_packed_rows_without_ids_are_named_by_their_place():
    places = [replace(row(i, 3), row_id="", where=f"a.csv:{i}") for i in (2, 5)]
    assert joined([*places, row(7, 2)]).row_id == "a.csv:2, a.csv:5, 7"
