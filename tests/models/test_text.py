"""The text decoder against transformers, every weight and buffer random, float32, eager attention."""

import dataclasses
import itertools

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch

from gemma_mlx.models.cache import GROWTH, SlidingCache
from gemma_mlx.models.gemma4.text import Place, additive_mask, place, rope_periods, rotate
from gemma_mlx.models.load import load_model

S, F = "sliding_attention", "full_attention"
TOLERANCE = 2e-4  # absolute, logits of scale 1
INPUT_SEED = {"E2B": 2, "E4B": 0, "no sharing, no PLE": 0}  # by the floor, as the models' seeds
FLOOR = 5e-5  # the reference's own noise must stay below this for the comparison to mean anything

PATTERNS = {
    # All layers of E2B and E4B in their patterns, thin; seeds chosen by the floor.
    "E2B": dict(
        seed=9,
        text=dict(num_hidden_layers=35, layer_types=([S] * 4 + [F]) * 7, num_kv_shared_layers=20),
    ),
    "E4B": dict(
        seed=0,
        style="native",
        text=dict(
            num_hidden_layers=42,
            layer_types=([S] * 5 + [F]) * 7,
            num_kv_shared_layers=18,
            num_key_value_heads=2,
            use_double_wide_mlp=False,
        ),
    ),
    "no sharing, no PLE": dict(
        seed=0, text=dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0, num_key_value_heads=4)
    ),
}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("text")
    reference = tiny.make(folder, vision=None, audio=None, **PATTERNS[request.param])
    return reference, load_model(folder), INPUT_SEED[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    tiny.make(folder, vision=None, audio=None)
    return load_model(folder)


def rows(*lengths, seed=0):
    """Right-padded random rows as ids and mask."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(3, 490, mask.shape) * mask, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(1,), (8,), (9,), (41, 7, 30), (64,)])
def test_logits(pair, lengths):
    """Within and beyond the window of 8, right-padded; equal to the reference at every token."""
    reference, ours, seed = pair
    batch = rows(*lengths, seed=seed)
    floor = tiny.logit_floor(reference, batch)
    valid = batch["attention_mask"].astype(bool)
    expected = tiny.reference_logits(reference, batch)
    found = np.array(ours(**batch))
    difference = np.abs(found - expected)[valid].max()
    print(f"{lengths}: difference {difference:.1e}, reference's own floor {floor:.1e}")
    assert found.dtype == np.float32 and 0.5 < expected.std() < 2
    assert floor < FLOOR
    assert difference <= TOLERANCE


def test_left_padding(pair):
    """With padding on the left, logits at tokens are those of the row alone."""
    _, ours, _ = pair
    alone = rows(19)["input_ids"]
    ids = np.concatenate([np.zeros((1, 6), np.int64), alone], axis=1)
    mask = (np.arange(25) >= 6).astype(np.int64)[None]
    padded = np.array(ours(input_ids=ids, attention_mask=mask))
    assert np.isfinite(padded).all()
    assert np.abs(padded[:, 6:] - np.array(ours(input_ids=alone))).max() <= TOLERANCE


def test_causal(pair):
    """Changing the last token changes no earlier logit, bit for bit."""
    _, ours, _ = pair
    ids = rows(30)["input_ids"]
    changed = ids.copy()
    changed[0, -1] = 3 + (ids[0, -1] + 1) % 400
    a, b = np.array(ours(input_ids=ids)), np.array(ours(input_ids=changed))
    assert np.array_equal(a[:, :-1], b[:, :-1])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 0.01


def test_traced_mask_equals_known_mask(pair):
    """Inside a compiled step a mask's values are not known; logits at tokens are the same."""
    _, ours, _ = pair
    batch = rows(21, 6)
    known = np.array(ours(**batch))
    valid = {k: mx.array(v) for k, v in batch.items()}
    where = place(ours.spec.text, 21, mx.float32, valid["attention_mask"].astype(mx.bool_))
    text = ours.model.language_model
    embeddings = text.embed(valid["input_ids"])
    hidden = text(embeddings, text.per_layer_inputs(valid["input_ids"], embeddings), where)
    masked = np.array(text.logits(hidden))
    keep = batch["attention_mask"].astype(bool)
    assert np.abs(masked - known)[keep].max() <= TOLERANCE


def test_cached_equals_uncached_step_by_step(model):
    """Sixty single tokens, past seven windows and across a growth of the full layers' buffers."""
    ids = rows(60)["input_ids"]
    expected = np.array(model(input_ids=ids))
    cache = model.make_cache()
    for i in range(60):
        found = np.array(model(input_ids=ids[:, i : i + 1], cache=cache))
        assert np.abs(found[:, 0] - expected[:, i]).max() <= TOLERANCE, i
    window = model.spec.text.sliding_window
    assert cache.offset == 60
    assert {cache.held(S), cache.held(F)} == {window - 1, 60}
    assert len(cache.layers) == model.spec.text.first_kv_shared_layer


@pytest.mark.parametrize("cuts", [(0, 13, 14, 35, 60), (0, 3, 60), (0, 7, 8, 9, 60)])
def test_chunked_prefill(model, cuts):
    ids = rows(60)["input_ids"]
    expected = np.array(model(input_ids=ids))
    cache = model.make_cache()
    parts = [np.array(model(input_ids=ids[:, a:b], cache=cache)) for a, b in itertools.pairwise(cuts)]
    assert np.abs(np.concatenate(parts, axis=1) - expected).max() <= TOLERANCE


def test_full_cache_grows_past_its_first_buffer(model):
    """300 tokens in three chunks, the second across the 256 that were reserved."""
    ids = rows(300)["input_ids"]
    expected = np.array(model(input_ids=ids))
    cache = model.make_cache()
    parts = [np.array(model(input_ids=ids[:, a:b], cache=cache)) for a, b in ((0, 250), (250, 299), (299, 300))]
    assert np.abs(np.concatenate(parts, axis=1) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_batch_with_padding(model, side):
    """A padded prompt batch, then single tokens: each row as if alone, padded keys hidden from all steps."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 490, n) for n in (17, 5)]
    after = rng.integers(3, 490, (2, 12))
    ids, mask = np.zeros((2, 17), np.int64), np.zeros((2, 17), np.int64)
    for i, p in enumerate(prompts):
        at = slice(17 - len(p), 17) if side == "left" else slice(0, len(p))
        ids[i, at], mask[i, at] = p, 1
    cache = model.make_cache()
    model(input_ids=ids, attention_mask=mask, cache=cache)
    steps = [np.array(model(input_ids=after[:, t : t + 1], cache=cache))[:, 0] for t in range(12)]
    for i, p in enumerate(prompts):
        if side == "right" and len(p) < 17:
            continue  # positions of a right-padded row would have a gap: only its longest row can go on
        alone = np.array(model(input_ids=np.concatenate([p, after[i]])[None]))[0, len(p) :]
        assert np.abs(np.stack(steps)[:, i] - alone).max() <= TOLERANCE


def test_sliding_cache_keeps_copies(model):
    """What is kept of a long prefill is the window alone and room to grow, not a view of the whole."""
    cache = model.make_cache()
    model(input_ids=rows(600)["input_ids"], cache=cache)
    window = model.spec.text.sliding_window - 1
    for layer in (layer for layer in cache.layers if isinstance(layer, SlidingCache)):
        assert layer.held()[0].shape[2] == window
        assert {a.shape[2] for a in layer.arrays()} == {window + GROWTH}
    assert len(cache.arrays()) == 2 * len(cache.layers)


def test_gathered_positions_equal_consecutive_ones(model):
    """Queries at chosen positions, with mask rows and rotation of their own, give those positions' hidden states."""
    text, spec = model.model.language_model, model.spec.text
    ids = mx.array(rows(25)["input_ids"])
    embeddings = text.embed(ids)
    per_layer = text.per_layer_inputs(ids, embeddings)
    everywhere = place(spec, 25, mx.float32)
    expected = text(embeddings, per_layer, everywhere)
    chosen = mx.array([3, 4, 11, 24])
    keys = mx.arange(25)
    masks = {
        S: additive_mask(chosen[None], keys, spec.sliding_window, None, mx.float32),
        F: additive_mask(chosen[None], keys, None, None, mx.float32),
    }
    there = Place(chosen[None], masks)
    x, shared = embeddings, {}
    for i, layer in enumerate(text.layers):
        if i == spec.first_kv_shared_layer:
            x, per_layer, everywhere = x[:, chosen], per_layer[:, chosen], there
        provider = spec.kv_provider(i)
        x, kv = layer(x, per_layer[:, :, i], everywhere, kv=shared.get(provider))
        shared.setdefault(provider, kv)
    assert np.abs(np.array(text.norm(x) - expected[:, chosen])).max() <= TOLERANCE


def test_checkpointed_layers_give_the_same_gradients(model):
    """Keys and values pass through a checkpoint as outputs and arguments: gradients of the providers are whole."""
    text, spec = model.model.language_model, model.spec.text
    ids = mx.array(rows(14)["input_ids"])
    where = place(spec, 14, mx.float32)
    weight = mx.random.normal((1, 14, spec.hidden_size))

    def loss(embeddings, checkpointed):
        per_layer = text.per_layer_inputs(ids, embeddings)
        x, shared = embeddings, {}
        for i, layer in enumerate(text.layers):
            provider = spec.kv_provider(i)

            def run(x, per_layer_input, kv, layer=layer):
                return layer(x, per_layer_input, where, kv=kv)

            run = mx.checkpoint(run) if checkpointed else run
            x, kv = run(x, per_layer[:, :, i], shared.get(provider))
            shared.setdefault(provider, kv)
        return (text.norm(x) * weight).sum()

    embeddings = text.embed(ids)
    plain, again = (np.array(mx.grad(lambda e, c=c: loss(e, c))(embeddings)) for c in (False, True))
    assert np.abs(plain).max() > 0.1
    assert np.linalg.norm(plain - again) <= 1e-5 * np.linalg.norm(plain)


@pytest.mark.parametrize("parameters", [tiny.TEXT["rope_parameters"][S], tiny.TEXT["rope_parameters"][F]])
def test_rotation_against_numpy(parameters):
    """Both forms of `rotate` against the definition in float64."""
    dims = 32
    x = np.random.default_rng(0).standard_normal((2, 3, 40, dims)).astype(np.float32)
    half = dims // 2
    rotated = half if parameters["rope_type"] == "default" else half // 4
    frequency = np.where(np.arange(half) < rotated, parameters["rope_theta"] ** (-2 * np.arange(half) / dims), 0)
    angle = (np.arange(40)[:, None] + 5) * frequency
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    periods = rope_periods(dims, parameters)
    for positions in (5, mx.arange(5, 45)[None]):
        assert np.abs(np.array(rotate(mx.array(x), periods, positions)) - expected).max() <= 1e-5


def test_fully_masked_row_is_finite_forward_and_backward():
    """A query that sees no key averages; nothing is NaN, in both dtypes."""
    for dtype in (mx.float32, mx.bfloat16):
        valid = mx.array([[False, False, True, True]])
        mask = additive_mask(mx.arange(4)[None], mx.arange(4), 2, valid, dtype)
        q = mx.random.normal((1, 2, 4, 8)).astype(dtype)

        def attend(q, mask=mask):
            return mx.fast.scaled_dot_product_attention(q, q[:, :1], q[:, :1], scale=1.0, mask=mask).sum()

        assert mx.isfinite(attend(q)).item() and mx.isfinite(mx.grad(attend)(q)).all().item()


def test_bfloat16(tmp_path):
    """A bfloat16 load computes in bfloat16 and stays near float32; the embedding scale is rounded to it."""
    tiny.make(tmp_path, vision=None, audio=None)
    ids = rows(20)["input_ids"]
    exact, rough = load_model(tmp_path), load_model(tmp_path, dtype="bfloat16")
    hidden = rough.hidden(input_ids=ids)
    assert hidden.dtype == mx.bfloat16 and rough.logits(hidden).dtype == mx.float32
    a, b = np.array(exact(input_ids=ids)), np.array(rough(input_ids=ids))
    assert np.abs(a - b).mean() < 0.1 * a.std()
    rows_, text = mx.array(ids), rough.model.language_model
    table = text.embed_tokens.weight[rows_]
    assert mx.array_equal(text.embed(rows_), table * mx.array(8.0, mx.bfloat16)).item()


def test_place_uses_no_mask_array_where_none_is_needed(model):
    """Without padding and within the window, attention gets "causal", or nothing for a single token."""
    spec = model.spec.text
    short, long, one = (place(spec, n, mx.float32) for n in (8, 9, 1))
    assert short.masks == {F: "causal", S: "causal"}
    assert long.masks[F] == "causal" and long.masks[S].shape == (1, 1, 9, 9)
    assert one.masks == {F: None, S: None}
    assert dataclasses.is_dataclass(short)
