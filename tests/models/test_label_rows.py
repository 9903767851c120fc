"""Index arrays of label positions against loops, and the FLOPs that decide whether they are used."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.flops import DecoderCost, Picked
from gemma_mlx.lora import apply_lora
from gemma_mlx.loss import label_positions
from gemma_mlx.models.families import build
from gemma_mlx.models.gemma4.text import Place, at_labels, place
from gemma_mlx.models.label_rows import LabelRows, label_rows
from gemma_mlx.spec import FULL, SLIDING, read_spec


def random_labels(r, rows, length):
    labels = r.integers(0, 50, (rows, length)).astype(np.int32)
    labels[r.random((rows, length)) > r.random((rows, 1))] = -100
    return labels


def made(labels, multiple):
    where = label_positions(labels, 4)
    count = int(where["weights"].sum())
    found = label_rows(where["positions"], count, labels.shape, multiple)
    arrays = {name: mx.array(value) for name, value in found.items()}
    return LabelRows(mx.array(where["positions"]), **arrays), where["positions"], count


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_and_back(rows, multiple):
    r = np.random.default_rng(rows)
    for _ in range(10):
        labels = random_labels(r, rows, int(r.integers(2, 30)))
        labels[r.integers(rows)] = -100  # a row without labels
        chosen, flat, count = made(labels, multiple)
        x = r.standard_normal((2, *labels.shape, 3)).astype(np.float32)
        picked = chosen.pick(mx.array(x))
        assert np.array_equal(np.array(picked), x.reshape(2, 1, -1, 3)[:, :, flat])
        by_row = np.array(chosen.by_row(picked[0]))
        for row in range(rows):
            at = np.flatnonzero(labels[row, 1:] != -100)
            assert np.array_equal(by_row[row, : len(at)], x[0, row, at])
            assert np.array_equal(np.array(chosen.columns)[row, : len(at)], at)
        again = np.array(chosen.in_line(mx.array(by_row)))
        assert np.array_equal(again[0, :count], x[0].reshape(-1, 3)[flat[:count]])


def test_widths_are_few():
    r = np.random.default_rng(0)
    widths = {made(random_labels(r, 3, int(n)), 32)[0].columns.shape[1] for n in r.integers(2, 300, 60)}
    assert widths <= {32, 64, 128, 256, 512}


def brute_mask(columns, length, window, runs):
    """Who sees whom, by the definition."""
    seen = np.zeros((*columns.shape, length), bool)
    for b, q, k in np.ndindex(seen.shape):
        at = columns[b, q]
        same = runs is not None and runs[b, at] > 0 and runs[b, at] == runs[b, k]
        seen[b, q, k] = (k <= at or same) and (window is None or k > at - window)
    return seen


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_places_keep_positions_and_masks(rows, pictures):
    """Full, sliding and bidirectional masks and rotary positions of label positions, in rows longer than the window."""
    spec = read_spec(CHECKPOINTS["gemma-4-31B"]).text
    spec = type(spec)(**{**spec.__dict__, "sliding_window": 5})
    r, length = np.random.default_rng(0), 17
    labels = random_labels(r, rows, length)
    chosen, _, _ = made(labels, 1)
    types = r.integers(0, 2, (rows, length)).astype(np.int32) if pictures else None
    runs = None
    if pictures:
        starts = (types == 1) & (np.pad(types, ((0, 0), (1, 0)))[:, :-1] != 1)
        runs = np.where(types == 1, np.cumsum(starts, 1), 0)
    where = place(spec, length, mx.float32, mm_token_type_ids=None if types is None else mx.array(types))
    found = at_labels(where, chosen, length, mx.float32)
    columns = np.array(chosen.columns)
    assert np.array_equal(np.array(found.positions), columns)
    for kind, window in ((FULL, None), (SLIDING, 5)):
        mask = np.array(found.masks[kind])
        expected = brute_mask(columns, length, window, runs if kind == SLIDING else None)
        assert mask.shape == (rows, 1, columns.shape[1], length)
        assert np.array_equal(mask[:, 0] == 0, expected) and np.isfinite(mask).all()


def test_positions_that_begin_again_are_kept():
    chosen, _, _ = made(np.array([[-100, 1, -100, 2], [-100, -100, 3, -100]], np.int32), 1)
    positions = mx.array([[0, 1, 0, 1], [0, 1, 2, 3]])
    found = at_labels(Place(positions, {FULL: "causal"}), chosen, 4, mx.float32)
    assert np.array(found.positions).tolist() == [[0, 0], [1, 0]]  # columns 0 and 2; 1 and padding


def test_costs_are_those_of_the_shapes():
    """E2B: counted by hand from the sizes in its config; label positions cut the part above the line alone."""
    config = {**CHECKPOINTS["gemma-4-E2B"], "vision_config": None, "audio_config": None}
    model = build(read_spec(config))
    model.freeze()
    cost = DecoderCost(model)
    assert cost.line == 14 and len(cost.layers) == 35
    hidden, ple, length = 1536, 256, 100
    total, upper, lower = 0, 0, 0
    for i in range(35):
        d = 512 if i % 5 == 4 else 256
        mlp = 6144 * (2 if i >= 15 else 1)
        keys_values = 2 * 2 * hidden * d if i < 15 else 0
        rest = 2 * (2 * hidden * 8 * d + 3 * hidden * mlp + 2 * hidden * ple)
        total += length * (keys_values + rest) + 4 * 8 * d * length**2
        upper += (rest * 10 + 4 * 8 * d * 12 * length) if i >= 14 else 0
        lower = total if i < 14 else lower
    assert sum(cost.layer(i, 1, length).forward for i in range(35)) == total
    assert cost.upper(1, length, Picked(10, 12)) - length * cost.layers[14].keys_values.forward == upper
    forward = sum(cost.layer(i, 1, length, Picked(10, 12)).forward for i in range(35))
    assert forward == lower + length * cost.layers[14].keys_values.forward + upper
    linear = sum(c.rest.forward + c.keys_values.forward for c in cost.layers)
    assert cost.step(1, length) == 2 * length * linear + 3 * sum(c.pair.forward for c in cost.layers) * length**2


def test_adapters_cost_twice_in_the_backward():
    config = {**CHECKPOINTS["gemma-4-E2B"], "vision_config": None, "audio_config": None}
    config["text_config"] = {**config["text_config"], "vocab_size": 64, "vocab_size_per_layer_input": 64}
    model = build(read_spec(config))
    model.freeze()
    before = DecoderCost(model).layers[20].rest
    apply_lora(model, "q_proj", rank=4)
    after = DecoderCost(model).layers[20].rest
    size = 4 * (1536 + 8 * 256)
    assert (after.forward - before.forward, after.backward - before.backward) == (2 * size, 4 * size)
