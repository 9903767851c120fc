"""Threads that work ahead: in order, within bounds, stopped by the first error."""

import threading
import time

import pytest

from gemma_mlx.preparing.workers import BLOCK, in_order


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("workers", [1, 4])
def test_results_come_in_order(count, workers):
    assert list(in_order(lambda i: i * i, count, workers)) == [i * i for i in range(count)]


def test_no_more_is_held_than_stated():
    started, taken, most = 0, 0, 0
    lock = threading.Lock()

    def work(index):
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - taken)
        return index

    for _ in in_order(work, 5000, 2):
        time.sleep(0.0001)
        with lock:
            taken += 1
    assert taken == 5000 and most <= (3 * 2 + 1) * BLOCK


def test_an_error_is_raised_in_its_place_and_stops_the_rest():
    done = []

    def work(index):
        if index == 40:
            raise ValueError("forty")
        done.append(index)
        return index

    seen = []
    with pytest.raises(ValueError, match="forty"):
        for index in in_order(work, 100_000, 2):
            seen.append(index)
    assert seen == list(range(40 // BLOCK * BLOCK)) and max(done) < 40 + 10 * BLOCK


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    for index in in_order(lambda i: i, 100_000, 3):
        if index == 5:
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
