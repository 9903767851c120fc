"""Attention in blocks of queries against torch in float64, and what the blocks leave out."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from gemma_mlx.models import blocks as module
from gemma_mlx.models.blocks import attention, blocks, pairs
from gemma_mlx.models.gemma4.text import additive_mask

SHAPES = "1/4/0 7/3/0 23/4/5 24/4/4 9/16/3 40/7/11 33/8/1 30/5/29 9/6/99"
CASES = [tuple(int(n) or None for n in shape.split("/")) for shape in SHAPES.split()]
"""Tokens of a row, queries of a block, window."""


@pytest.fixture
def sized(monkeypatch):
    return lambda size: monkeypatch.setitem(module.BLOCK, mx.default_device().type.name, size)


def seen(length, window):
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & (distance < (window or length))


@pytest.mark.parametrize(("length", "size", "window"), CASES)
def test_every_query_sees_what_it_may(sized, length, size, window):
    sized(size)
    found, counted = np.zeros((length, length), bool), 0
    for b in blocks(length, window, mx.float32).parts:
        assert b.stop - b.start <= size
        keys = np.arange(b.low, b.stop)
        if isinstance(b.mask, str):
            found[b.start : b.stop, keys] = keys[None] <= np.arange(b.start, b.stop)[:, None]
        else:
            found[b.start : b.stop, keys] = np.array(b.mask)[0, 0] == 0
        counted += (b.stop - b.start) * len(keys)
    assert np.array_equal(found, seen(length, window))
    assert counted == pairs(length, window)


@pytest.mark.parametrize(("length", "size", "window"), CASES)
def test_values_and_gradients(sized, length, size, window):
    sized(size)
    r = np.random.default_rng(length)
    q, k, v, g = (r.standard_normal((2, heads, length, 6)).astype(np.float32) for heads in (4, 2, 2, 4))
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=torch.tensor(seen(length, window)), scale=0.7, enable_gqa=True
    )
    out.backward(torch.tensor(g, dtype=torch.float64))
    masks = (
        blocks(length, window, mx.float32),
        additive_mask(mx.arange(length)[None], mx.arange(length), window, None, mx.float32),
    )
    for mask in masks:
        made, grads = mx.vjp(lambda *x, m=mask: attention(*x, 0.7, m), [*map(mx.array, (q, k, v))], [mx.array(g)])
        for ours, wanted in zip((*made, *grads), (out, *(x.grad for x in theirs)), strict=True):
            assert np.abs(np.array(ours) - wanted.detach().numpy()).max() <= 1e-5


def test_cost_grows_with_the_length_where_a_window_slides():
    """Twice the row, twice a sliding layer's scores; a full layer's are half of the square."""
    assert pairs(16_384, 512) / pairs(8_192, 512) < 2.1
    assert pairs(8_192, None) / 8_192**2 < 0.55
