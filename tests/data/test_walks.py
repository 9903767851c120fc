"""Orders of an epoch: every sample as often as it should come, from any position on, within few stretches at a time."""

import random
import sys
import threading
import time
from collections import Counter
from itertools import islice

import pytest

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.budget import Budget
from gemma_mlx.data.order import Grouped, Shuffled, in_turn
from gemma_mlx.data.permutation import Order
from gemma_mlx.data.walks import SHARD_BITS, ByStretches, Mixture, Shuffle, Stream
from gemma_mlx.errors import InputError

UNITS = [7, 1, 30, 12, 5, 18, 9, 2, 40, 11]


def stretches(most, seed=3):
    return ByStretches(UNITS, [u * 10 for u in UNITS], seed, most)


@pytest.mark.parametrize("most", [1, 150, 400, 10**9])
def test_stretches(most):
    """Each sample once; any position can be gone on from; another order each epoch; never more bytes than allowed in a
    window but for a stretch that is larger alone; with room for all, the plain shuffle."""
    walk, n = stretches(most), sum(UNITS)
    owner = [u for u, count in enumerate(UNITS) for _ in range(count)]
    orders = [list(walk.walk(epoch)) for epoch in range(4)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    for start in (0, 1, 7, 50, n - 1, n):
        assert list(walk.walk(2, start)) == orders[2][start:]
    if most == 10**9:
        assert orders[1] == list(Shuffle(n, 3).walk(1))
    for order in orders:
        first, last = {}, {}
        for position, sample in enumerate(order):
            first.setdefault(owner[sample], position)
            last[owner[sample]] = position
        for position in range(n):  # stretches begun and not finished
            open_units = [u for u in first if first[u] <= position <= last[u]]
            assert len(open_units) == 1 or sum(UNITS[u] * 10 for u in open_units) <= max(most, 400)


def test_a_mixture_sees_each_part_as_often_as_its_weight():
    counts, weights = [1000, 300, 5000], [1.0, 2.5, 0.2]
    walk = Mixture([Shuffle(n, i) for i, n in enumerate(counts)], weights, seed=4)
    assert walk.n == 1000 + 750 + 1000
    epochs = [list(walk.walk(epoch)) for epoch in range(5)]
    for order in epochs:
        parts = Counter(0 if i < 1000 else 1 if i < 1300 else 2 for i in order)
        assert parts == {0: 1000, 1: 750, 2: 1000}
        seen = Counter(order)
        assert all(seen[i] == 1 for i in range(1000)) and {seen[i] for i in range(1000, 1300)} == {2, 3}
    rare = Counter(i for order in epochs for i in order if i >= 1300)
    assert set(rare.values()) == {1} and len(rare) == 5000  # a fifth each epoch, and all of it in five
    for start in (0, 1, 1374, 1375, 2000, walk.n):
        assert list(walk.walk(3, start)) == epochs[3][start:]


@pytest.mark.parametrize("seed", [pytest.param(i, marks=[pytest.mark.slow] * (i % 2 == 0)) for i in range(8)])
def test_mixtures_of_any_parts(seed):
    rng = random.Random(seed)
    counts = [rng.randint(1, 9000) for _ in range(rng.randint(1, 30))]
    weights = [rng.choice([0.01, 0.3, 1, 1, 1.7, 4]) for _ in counts]
    walk = Mixture([Shuffle(n, i) for i, n in enumerate(counts)], weights, seed)
    order, edges = list(walk.walk(1)), [sum(counts[:i]) for i in range(len(counts) + 1)]
    assert len(order) == walk.n
    for part, (n, weight) in enumerate(zip(counts, weights, strict=True)):
        assert sum(edges[part] <= i < edges[part + 1] for i in order) == max(1, round(n * weight))
    start = rng.randrange(walk.n)
    assert list(walk.walk(1, start)) == order[start:]
    half = Counter(i < edges[1] for i in order[: walk.n // 2])[True]  # the first part's share comes evenly
    assert abs(half - max(1, round(counts[0] * weights[0])) / 2) <= 0.5 * 4096


def test_a_stream_asks_only_for_the_shards_it_reaches():
    counts, asked = [5, 0, 8, 3, 1, 9, 4, 2, 6, 7], []

    def count(shard):
        asked.append(shard)
        return counts[shard]

    walk = Stream(10, count, seed=5, together=3)
    some = list(islice(walk.walk(0), 3))
    assert len(some) == 3 and len(asked) == 3
    orders = [list(walk.walk(epoch)) for epoch in range(3)]
    everything = [shard << SHARD_BITS | i for shard in range(10) for i in range(counts[shard])]
    assert all(sorted(order) == everything for order in orders) and len(set(map(tuple, orders))) == 3
    for start in range(sum(counts) + 1):
        assert list(walk.walk(1, start)) == orders[1][start:]
    assert list(Stream(10, count, shuffle=False).walk(0)) == everything
    # One window of all shards is a plain shuffle.
    one = [everything[i] for i in Shuffle(len(everything), 5).walk(2)]
    assert list(Stream(10, count, seed=5, together=10).walk(2)) == one


def test_a_stream_needs_steps():
    plan = Shuffled(Stream(3, lambda shard: 2), 2)
    assert [len(batch) for batch in plan.batches(0)] == [2, 2, 2]
    with pytest.raises(InputError, match="say --steps"):
        plan.count(1)


def test_a_permutation_keeps_no_rows():
    """Opened at any place of a billion rows at once, in a few hundred bytes."""
    order = Order(10**9, 1, 2)
    assert len({order[i * 10**6] for i in range(1000)}) == 1000
    assert sum(sys.getsizeof(v) for v in vars(order).values()) < 1000
    began = time.monotonic()
    assert next(Shuffle(10**9, 1).walk(5, 10**9 - 1)) == Order(10**9, 1, 5)[10**9 - 1]
    assert time.monotonic() - began < 1


def test_lengths_may_be_measured_window_by_window():
    lengths = [random.Random(i).randrange(5, 500) for i in range(103)]
    asked = []

    def measure(samples):
        asked.append(len(samples))
        return [lengths[i] for i in samples]

    lazy, whole = Grouped(measure, 4, 9, 5, Shuffle(103, 9)), Grouped(lengths, 4, 9, 5)
    for start in (0, 4, 60, 100):
        asked.clear()
        assert list(lazy.batches(1, start)) == list(whole.batches(1, start))
        assert asked == [20] * (5 - start // 20) + [3]
    assert lazy.state() == {} and set(whole.state()) == {"lengths"}


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_ahead_stay_within_the_limit(workers):
    """Whatever the prefetch: made and not yet taken, plus what is being made, at most the limit."""
    from test_batches import row

    one = Batches([row(0)], 1, workers=0)
    size = next(one).nbytes
    seen = Batches([row(0)] * 60, 1, workers=workers, prefetch=50, max_bytes=7 * size, epochs=1)
    with seen:
        next(seen)
        deadline = time.monotonic() + 10
        while seen._budget.peak < 7 * size and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len([batch for batch in seen]) == 59
    assert seen._budget.peak == 7 * size


def test_a_budget_lets_the_next_one_through():
    """However large; and nobody waits for ever once it is closed."""
    budget, made = Budget(10), []

    def make(number, size):
        try:
            budget.begin(number)
        except RuntimeError:
            return
        made.append(number)
        budget.end(size)

    threads = [threading.Thread(target=make, args=(i, 100)) for i in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert made == [0]
    budget.take(100)
    time.sleep(0.05)
    assert made == [0, 1]
    budget.close()
    for thread in threads:
        thread.join(2)
        assert not thread.is_alive()


def test_a_mixture_with_a_part_without_rows():
    walk = Mixture([Shuffle(0, 1), Shuffle(5, 2), Shuffle(0, 3)], [2.0, 1.0, 0.5], seed=4)
    assert walk.n == 5 and sorted(walk.walk(1)) == list(range(5))


def test_orders_have_nothing_to_do_with_each_other():
    """Of seeds that differ in any bit; of stretches from epoch to epoch; of one window, block or shard and the next."""
    seeds = [0, *(1 << bit for bit in range(64))]
    assert len({tuple(Order(60, seed, 0)) for seed in seeds}) == len(seeds)
    assert len({tuple(Order(60, 0, epoch)) for epoch in seeds}) == len(seeds)
    for position in (-1, 60):
        with pytest.raises(IndexError):
            Order(60, 0, 0)[position]
    alone = ByStretches([50] * 6, [10] * 6, 3, most=1)
    orders = [list(alone.walk(epoch)) for epoch in range(3)]
    turns = [[order[at] // 50 for at in range(0, 300, 50)] for order in orders]
    assert all(sorted(turn) == list(range(6)) for turn in turns) and turns[0] != turns[1] != turns[2]
    inside = {tuple(i % 50 for i in order[at : at + 50]) for order in orders for at in range(0, 300, 50)}
    assert len(inside) == 18
    mixed = Mixture([Shuffle(4096, 1), Shuffle(4096, 2)], [1.0, 1.0], seed=3)
    parts = [[i < 4096 for i in mixed.walk(epoch)] for epoch in range(2)]
    assert len({tuple(order[at : at + 4096]) for order in parts for at in (0, 4096)}) == 4
    stream = list(Stream(4, lambda shard: 50, seed=3, together=1).walk(0))
    rows = {tuple(i & 0xFFFF for i in stream[at : at + 50]) for at in range(0, 200, 50)}
    assert len(rows) == 4
    assert in_turn(list(range(60)), 5, 1) != list(Order(60, 5, 1))
    grouped = Grouped(list(range(200)), 2, 9, 20, Shuffle(200, shuffle=False))
    first = [batch[0][0] for batch in grouped.batches(0)]
    assert len({tuple(i % 40 for i in first[at : at + 20]) for at in range(0, 100, 20)}) == 5


def test_a_mixture_of_very_many_parts_and_of_small_ones():
    """No block takes back what another gave; a part of few rows and little weight still comes."""
    walk = Mixture([Shuffle(70, i) for i in range(300)], [1.0] * 300, seed=1)
    assert sorted(walk.walk(0)) == list(range(300 * 70))
    walk = Mixture([Shuffle(3, 1), Shuffle(50, 2)], [0.01, 1.0], seed=1)
    assert sorted(i for epoch in range(3) for i in walk.walk(epoch) if i < 3) == [0, 1, 2]


def test_a_budget_reckons_with_what_is_being_made():
    """Each of them as large as the largest so far."""
    budget = Budget(10)
    budget.begin(0)
    assert not budget._may(1)  # how large the first will be nobody knows
    budget.end(4)
    budget.begin(1)
    budget.end(1)
    assert budget._may(2)  # 5 + 4
    budget.begin(2)
    assert not budget._may(3)  # 5 + 4 + 4
    budget.take(4)
    assert budget._may(3)  # 1 + 4 + 4


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_tells_which_shards_come_next(shuffle):
    """When rows of those before them come, and not while rows are passed over."""
    told, together = [], 3 if shuffle else 1
    walk = Stream(7, lambda shard: 2, seed=5, shuffle=shuffle, together=3, ahead=told.append)
    order = list(dict.fromkeys(i >> SHARD_BITS for i in walk.walk(0)))
    assert sorted(told) == sorted(order[together:])
    told.clear()
    rows = walk.walk(0)
    next(rows)
    assert sorted(told) == sorted(order[together : 2 * together])
    told.clear()
    next(walk.walk(0, 4 * together))
    assert sorted(told) == sorted(order[3 * together : 4 * together])
