"""The audio tower against transformers' Gemma4AudioModel, every weight and buffer random, float32."""

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import tiny
import torch
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.models.gemma4 import audio
from gemma_mlx.models.gemma4.audio import AudioTower, soft_token_index
from gemma_mlx.ops.banded_attention import banded_attention

TOLERANCE = 2e-4  # absolute, soft tokens of scale ~1


@pytest.fixture(scope="module")
def pair():
    theirs, spec = reference.audio()
    ours = AudioTower(spec)
    reference.copy_weights(theirs, ours)
    return theirs, ours


def run_theirs(theirs, features, mask):
    with torch.no_grad():
        out = theirs(torch.tensor(features), torch.tensor(mask))
    return out.last_hidden_state[out.attention_mask].numpy()


CASES = [
    (101,),
    (61,),
    (61, 101),
    (101, 61),
    (1, 2, 3),
    (5, 47, 48, 49, 53),  # around one block of 12 soft tokens
    (97, 96, 95, 94),  # around two
    (257, 3, 400),
    (200, 200, 200),
]


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_soft_tokens(pair, lengths):
    theirs, ours = pair
    features, mask, counts = tiny.audio_inputs(lengths, seed=len(lengths))
    expected = run_theirs(theirs, features, mask)
    got = np.array(ours(features, mask))
    assert got.shape == expected.shape == (sum(counts), 40)
    assert np.abs(got - expected).max() <= TOLERANCE
    assert np.abs(expected).mean() > 0.3


def test_thirty_seconds(pair):
    """2,999 frames, 750 soft tokens: the longest clip."""
    theirs, ours = pair
    features, mask, counts = tiny.audio_inputs((2999,))
    assert counts == [750]
    assert np.abs(np.array(ours(features, mask)) - run_theirs(theirs, features, mask)).max() <= TOLERANCE


def test_random_lengths(pair):
    theirs, ours = pair
    rng = np.random.default_rng(5)
    for _ in range(4):
        features, mask, _ = tiny.audio_inputs(tuple(rng.integers(1, 300, rng.integers(1, 4)).tolist()))
        assert np.abs(np.array(ours(features, mask)) - run_theirs(theirs, features, mask)).max() <= TOLERANCE


def test_padding_in_front_and_holes(pair):
    """Any mask gives what the reference gives, although batches are padded behind."""
    theirs, ours = pair
    rng = np.random.default_rng(0)
    features, mask, _ = tiny.audio_inputs((200, 200, 30))
    mask[0, :90], mask[1] = False, rng.random(200) < 0.3
    assert np.abs(np.array(ours(features, mask)) - run_theirs(theirs, features, mask)).max() <= TOLERANCE


def test_clips_cut(pair):
    """The comparisons above go through active clips: some values are cut at both ends of a linear."""
    theirs, _ = pair
    features, mask, _ = tiny.audio_inputs((101, 61))
    inputs, outputs = reference.truncated(theirs, lambda: run_theirs(theirs, features, mask))
    assert inputs > 1e-3 and outputs > 1e-3


@pytest.mark.parametrize("changes", [{"use_clipped_linears": False}, {"num_attention_heads": 2, "conv_kernel_size": 3}])
def test_other_configurations(changes):
    theirs, spec = reference.audio(4, **changes)
    ours = AudioTower(spec)
    reference.copy_weights(theirs, ours)
    features, mask, _ = tiny.audio_inputs((61, 101))
    assert np.abs(np.array(ours(features, mask)) - run_theirs(theirs, features, mask)).max() <= TOLERANCE


def attention_by_hand(q, k, v, relative, cap):
    """softmax over the W last frames of cap · tanh((q·k + q·r) / cap), frame by frame in float64."""
    m, frames, heads, d = q.shape
    window = relative.shape[0]
    out = np.zeros((m, frames, heads, d))
    for b in range(m):
        for h in range(heads):
            for t in range(frames):
                keys = range(max(0, t - window + 1), t + 1)
                score = np.array([q[b, t, h] @ (k[b, s, h] + relative[window - 1 - (t - s), h]) for s in keys])
                e = np.exp(cap * np.tanh(score / cap) - cap)
                out[b, t, h] = (e / e.sum()) @ v[b, list(keys), h]
    return out.reshape(m, frames, -1)


@pytest.mark.parametrize("window", [12, 13])
@pytest.mark.parametrize("frames", [1, 11, 12, 13, 23, 24, 25, 97])
def test_attention_against_a_loop(window, frames):
    rng = np.random.default_rng(frames)
    q, k, v = rng.standard_normal((3, 2, frames, 2, 4))
    q *= 3
    relative = rng.standard_normal((window, 2, 4))
    args = [mx.array(a.astype(np.float32)) for a in (q, k, v, relative)]
    got = banded_attention(*args, mx.zeros((4,)), None, 5.0, 1 / math.log(2))  # softplus(0) = ln 2
    assert np.abs(np.array(got) - attention_by_hand(q, k, v, relative, 5.0)).max() <= 1e-5


def attention_in_torch(module, x, window):
    """The reference's projections and constants with a dense T × T mask of `window` keys, in x's precision."""
    m, frames, _ = x.shape
    split = (m, frames, module.num_heads, module.head_dim)
    q, k, v = (p(x).view(split).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    q = q * module.head_dim**-0.5 / math.log(2) * torch.nn.functional.softplus(module.per_dim_scale)
    k = k * math.log(1 + math.e) / math.log(2)
    rates = 1e4 ** (-torch.arange(x.shape[-1] // 2, dtype=x.dtype) / (x.shape[-1] // 2 - 1))
    angle = torch.arange(frames, dtype=x.dtype)[:, None] * rates
    table = module.relative_k_proj(torch.cat([angle.sin(), angle.cos()], -1))
    table = table.view(frames, module.num_heads, module.head_dim).permute(1, 0, 2)
    distance = torch.arange(frames)[:, None] - torch.arange(frames)
    by_distance = q @ table.transpose(-1, -2)
    score = q @ k.transpose(-1, -2) + by_distance.gather(-1, distance.clamp(min=0).expand_as(by_distance))
    score = 50 * torch.tanh(score / 50)
    score = score.masked_fill((distance < 0) | (distance >= window), -1e9)
    return module.post((score.softmax(-1) @ v).transpose(1, 2).reshape(m, frames, -1))


@pytest.mark.parametrize("window", [12, 13])
def test_window_switch(window):
    """One conformer attention at both windows against dense float64; 12 is also the reference's own forward."""
    theirs, spec = reference.audio(1)
    ours = AudioTower(dataclasses.replace(spec, attention_window=window))
    reference.copy_weights(theirs, ours)
    x = np.random.default_rng(0).standard_normal((2, 50, 32)).astype(np.float32)
    got = np.array(ours.layers[0].self_attn(mx.array(x), None))
    with torch.no_grad():
        expected = attention_in_torch(theirs.layers[0].self_attn.double(), torch.tensor(x).double(), window).numpy()
        other = attention_in_torch(theirs.layers[0].self_attn, torch.tensor(x).double(), 25 - window).numpy()
    assert np.abs(got - expected).max() <= 2e-5
    assert np.abs(got - other).max() > 1e-2  # the 13th key matters


def test_windows_that_are_neither(pair):
    _, spec = reference.audio()
    with pytest.raises(InputError, match="audio window 14: expected 12 or 13"):
        AudioTower(spec, window=14)
    with pytest.raises(InputError, match="attention_chunk_size 8"):
        AudioTower(reference.audio(attention_chunk_size=8)[1])


def gradients(ours, features, mask, weight):
    def loss(parameters, features):
        ours.update(parameters)
        return (ours(features, mask) * weight).sum()

    return mx.grad(loss, argnums=(0, 1))(ours.parameters(), mx.array(features))


@pytest.mark.parametrize("lengths", [(61, 101), (300,)], ids=str)
def test_gradients(pair, lengths):
    theirs, ours = pair
    features, mask, counts = tiny.audio_inputs(lengths)
    weight = np.random.default_rng(0).standard_normal((sum(counts), 40)).astype(np.float32)
    x = torch.tensor(features, requires_grad=True)
    theirs.zero_grad()
    out = theirs(x, torch.tensor(mask))
    (out.last_hidden_state[out.attention_mask] * torch.tensor(weight)).sum().backward()
    by_name, by_feature = gradients(ours, features, mask, mx.array(weight))
    expected = {n: reference.to_mlx(n, p.grad) for n, p in theirs.named_parameters()} | {"features": x.grad.numpy()}
    got = dict(tree_flatten(by_name)) | {"features": by_feature}
    for name, value in expected.items():
        a, b = np.array(got[name]), np.array(value)
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), name


def test_clips_of_padding_only_give_no_nan(pair):
    _, ours = pair
    features, mask, _ = tiny.audio_inputs((61, 5, 101))
    alone = np.array(ours(features[[0, 2]], mask[[0, 2]]))
    features[1], mask[1] = 0, False
    assert np.abs(np.array(ours(features, mask)) - alone).max() <= 2e-5
    for _, value in tree_flatten(gradients(ours, features, mask, 1.0)):
        assert bool(mx.isfinite(value).all())


def test_padding_changes_nothing(pair):
    _, ours = pair
    features, mask, _ = tiny.audio_inputs((61,))
    longer, longer_mask = np.zeros((1, 200, 128), np.float32), np.zeros((1, 200), bool)
    longer[:, :61], longer_mask[:, :61] = features, mask
    assert np.abs(np.array(ours(longer, longer_mask)) - np.array(ours(features, mask))).max() <= 2e-5
    longer[:, 61:] = 7  # padding frames need not be zero: the tower masks them
    assert np.abs(np.array(ours(longer, longer_mask)) - np.array(ours(features, mask))).max() <= 2e-5


def test_traced_with_the_index_given(pair):
    """Nothing but the index needs concrete values. (Left unevaluated: compiling for a CPU takes 20 s.)"""
    _, ours = pair
    features, mask, _ = tiny.audio_inputs((61, 101))
    index = mx.array(soft_token_index(mask))
    compiled = mx.compile(lambda *inputs: ours(*inputs))
    assert compiled(mx.array(features), mx.array(mask), index).shape == (42, 40)


def test_bfloat16(pair):
    """Half precision stays half precision, and near the float32 result."""
    theirs, ours = pair
    half = AudioTower(reference.audio()[1])
    reference.copy_weights(theirs, half)
    half.set_dtype(mx.bfloat16)
    features, mask, _ = tiny.audio_inputs((61, 101))
    got, full = half(features, mask), ours(features, mask)
    assert got.dtype == mx.bfloat16
    assert float(mx.linalg.norm(got.astype(mx.float32) - full) / mx.linalg.norm(full)) < 0.05


@pytest.mark.parametrize(("frames", "bins"), [(8, 6), (7, 6), (8, 5), (1, 1), (7, 9)])
def test_strided_convolution_by_taps(frames, bins):
    x, weight = mx.random.normal((2, frames, bins, 3)), mx.random.normal((4, 3, 3, 3))
    expected = torch.nn.functional.conv2d(
        torch.tensor(np.array(x)).double().permute(0, 3, 1, 2),
        torch.tensor(np.array(weight)).double().permute(0, 3, 1, 2),
        stride=2,
        padding=1,
    ).permute(0, 2, 3, 1)
    for form in (audio._strided_conv_by_taps, lambda x, w: mx.conv2d(x, w, stride=2, padding=1)):
        assert np.abs(np.array(form(x, weight)) - expected.numpy()).max() <= 1e-5


def test_linears_lie_under_linear(pair):
    """Ten clipped linears a layer; adapters replace their `.linear`, inside the clips."""
    _, ours = pair
    linears = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear)]
    plain = [n for n in linears if not n.endswith(".linear")]
    assert len(linears) - len(plain) == 2 * 10
    assert sorted(p.rsplit(".", 1)[-1] for p in plain) == ["input_proj_linear", "output_proj"] + ["relative_k_proj"] * 2
