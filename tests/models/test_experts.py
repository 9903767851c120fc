"""Router and experts against transformers' modules: outputs, and gradients of every weight and of the input."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import torch
from mlx.utils import tree_flatten

from gemma_mlx.models.gemma4.experts import SORT_FROM, Experts, Router
from gemma_mlx.spec import TextSpec

TOLERANCE = 1e-5  # relative, of each array's norm


@pytest.fixture(scope="module")
def modules():
    """(transformers' router and experts in float64, ours in float32), the same random weights."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextRouter

    torch.set_num_threads(1)
    config = tiny.config(**tiny.larger(tiny.EXPERTS)).text_config
    config._experts_implementation = "eager"
    theirs = torch.nn.ModuleDict({"router": Gemma4TextRouter(config), "experts": Gemma4TextExperts(config)}).double()
    tiny.randomise(theirs, seed=3)
    spec = TextSpec(**{k: v for k, v in config.to_dict().items() if k in ("hidden_size", *tiny.EXPERTS)})
    ours = nn.Module()
    ours.router, ours.experts = Router(spec), Experts(spec)
    ours.load_weights([(n, mx.array(p.detach().float().numpy())) for n, p in theirs.named_parameters()], strict=True)
    return theirs, ours


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("tokens", [1, 7, 21, 22, 200])
def test_outputs_and_gradients(modules, tokens):
    """Below and above the number of pairs from which tokens are sorted by expert."""
    theirs, ours = modules
    rng = np.random.default_rng(tokens)
    x, weight = rng.standard_normal((2, tokens, 64)).astype(np.float32)
    assert (tokens >= 22) == (3 * tokens >= SORT_FROM)

    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    _, their_weights, their_chosen = theirs["router"](inputs)
    expected = theirs["experts"](inputs * 1.5, their_chosen, their_weights)
    theirs.zero_grad()
    (expected * torch.tensor(weight)).sum().backward()

    def total(parameters, x):
        ours.update(parameters)
        out = ours.experts(x[None] * 1.5, *ours.router(x[None]))[0]
        return (out * mx.array(weight)).sum(), out

    (_, found), (grads, of_x) = mx.value_and_grad(total, argnums=(0, 1))(ours.parameters(), mx.array(x))
    chosen, _ = ours.router(mx.array(x))
    assert np.array_equal(np.sort(np.array(chosen)), np.sort(their_chosen.numpy()))
    assert relative(found, expected.detach().numpy()) <= TOLERANCE
    assert relative(of_x, inputs.grad.numpy()) <= TOLERANCE
    flat = dict(tree_flatten(grads))
    assert set(flat) == {n for n, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative(flat[name], parameter.grad.numpy()) <= TOLERANCE, name


def test_router_is_float32_and_experts_keep_the_dtype(modules):
    """In bfloat16 the choice is made on float32 sums; what comes out is bfloat16."""
    _, ours = modules
    x = mx.random.normal((40, 64)).astype(mx.bfloat16)
    chosen, weights = ours.router(x)
    assert weights.dtype == mx.float32
    assert mx.array_equal(chosen, ours.router(x.astype(mx.float32))[0]).item()
    out = ours.experts(x, chosen, weights)
    assert out.dtype == mx.bfloat16 and mx.isfinite(out).all().item()
