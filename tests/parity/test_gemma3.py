"""Gemma 3 text against transformers: logits, gradients of adapters, cache; every weight random, float32, eager."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3 as gemma3
import torch
from mlx.utils import tree_flatten
from parity_cases import random_lora, relative_differences
from tiny_gemma3 import F, S, rows

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.errors import InputError
from gemma_mlx.lora import apply_lora, linear_paths, lora_layers, resolve_targets, set_lora_parameters
from gemma_mlx.loss import loss_and_count
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.spec import read_spec

TOLERANCE, BOUND = 2e-4, 1e-3  # absolute, of logits of scale 1; ‖a − b‖ / ‖b‖ of each gradient tensor
LOGIT_FLOOR, GRADIENT_FLOOR = 5e-5, 2e-4  # the reference's own noise must stay below

PATTERNS = {
    "270M": dict(num_hidden_layers=18, layer_types=([S] * 5 + [F]) * 3),  # its layers, thin
    "1B": dict(num_hidden_layers=26, layer_types=(([S] * 5 + [F]) * 5)[:26], head_dim=16),
    "capped, linear rope": dict(
        old_style=True,
        final_logit_softcapping=5.0,
        num_key_value_heads=2,
        rope_parameters={
            S: dict(rope_type="default", rope_theta=5_000.0),
            F: dict(rope_type="linear", rope_theta=500_000.0, factor=8.0),
        },
    ),
}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gemma3")
    return gemma3.make(folder, **PATTERNS[request.param]), load_model(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    gemma3.make(folder)
    return load_model(folder)


@pytest.mark.parametrize("lengths", [(1,), (8,), (9,), (41, 7, 30), (75,)])
def test_logits(pair, lengths):
    """Within and beyond the window of 8, right-padded."""
    reference, ours = pair
    batch = rows(*lengths)
    valid = batch["attention_mask"].astype(bool)
    floor, expected = tiny.logit_floor(reference, batch), tiny.reference_logits(reference, batch)
    difference = np.abs(np.array(ours(**batch)) - expected)[valid].max()
    print(f"{lengths}: difference {difference:.1e}, reference's own floor {floor:.1e}")
    assert 0.3 < expected.std() < 3 and floor < LOGIT_FLOOR
    assert difference <= TOLERANCE


def test_the_two_rotations_and_the_scale_matter(pair):
    """Were the thetas swapped, the scale head_dim^−1/2 or the norms not 1 + w, the comparison would show it."""
    _, ours = pair
    batch = rows(40)
    expected = np.array(ours(**batch))
    attention = [layer.self_attn for layer in ours.model.layers]
    held = [(a._periods, a.scale) for a in attention]
    full = next(a for a in attention if a.kind == F)
    for a in attention:
        a._periods = full._periods
    assert np.abs(np.array(ours(**batch)) - expected).max() > 100 * TOLERANCE
    for a, (periods, scale) in zip(attention, held, strict=True):
        a._periods, a.scale = periods, 2 * scale
    assert np.abs(np.array(ours(**batch)) - expected).max() > 100 * TOLERANCE
    for a, (_, scale) in zip(attention, held, strict=True):
        a.scale = scale
    assert np.array_equal(np.array(ours(**batch)), expected)


def torch_gradients(reference, batch, labels, weights):
    """(loss, path -> (dA, dB)) in our orientation, with PEFT's LoRA of rank 3 and alpha 6."""
    from peft import LoraConfig, inject_adapter_in_model

    if not hasattr(reference, "adapters"):
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=sorted(weights)), reference)
        reference.adapters = {n: m for n, m in reference.named_modules() if hasattr(m, "lora_A")}
        with torch.no_grad():
            for path, (a, b) in weights.items():
                reference.adapters[path].lora_A["default"].weight.copy_(torch.tensor(a.T))
                reference.adapters[path].lora_B["default"].weight.copy_(torch.tensor(b.T))
    reference.zero_grad()
    loss = reference(**{k: torch.tensor(v) for k, v in batch.items()}, labels=torch.tensor(labels)).loss
    loss.backward()
    grads = {
        path: tuple(getattr(m, f"lora_{x}")["default"].weight.grad.numpy().T.copy() for x in "AB")
        for path, m in reference.adapters.items()
    }
    return loss.item(), grads


@pytest.mark.parametrize("name", ["270M", "capped, linear rope"])
@pytest.mark.parametrize("lengths", [(30,), (41, 7, 30)])
def test_gradients_of_adapters(name, lengths, tmp_path):
    reference, ours = gemma3.make(tmp_path, **PATTERNS[name]), load_model(tmp_path)
    paths = apply_lora(ours, "decoder", 3, 6.0)
    assert len(paths) == 7 * ours.spec.text.num_hidden_layers
    weights = random_lora({p: layer.weight.shape for p, layer in lora_layers(ours).items()}, 3)
    set_lora_parameters(ours, {f"{p}.lora_{n}": mx.array(w) for p, ab in weights.items() for n, w in zip("ab", ab)})  # noqa: B905
    batch = rows(*lengths)
    labels = np.where(batch["attention_mask"], batch["input_ids"], IGNORE_INDEX)
    labels[:, :3] = IGNORE_INDEX
    expected, theirs = torch_gradients(reference, batch, labels, weights)
    reference.set_attn_implementation("sdpa")
    floor = max(relative_differences(torch_gradients(reference, batch, labels, weights)[1], theirs).values())

    def mean_loss(trained):
        ours.update(trained)
        total, count, _ = loss_and_count(ours, batch, labels)
        return total / count

    loss, grads = mx.value_and_grad(mean_loss)(ours.trainable_parameters())
    flat = {n: np.array(g) for n, g in tree_flatten(grads)}
    found = {p: (flat[f"{p}.lora_a"], flat[f"{p}.lora_b"]) for p in paths}
    worst = max(relative_differences(found, theirs).values())
    print(f"{name} {lengths}: worst {worst:.1e}, reference's own floor {floor:.1e}")
    assert floor < GRADIENT_FLOOR and abs(loss.item() - expected) <= 1e-5
    assert worst <= BOUND


def test_left_padding(pair):
    """With padding on the left, logits at tokens are those of the row alone."""
    _, ours = pair
    alone = rows(19)["input_ids"]
    ids = np.concatenate([np.zeros((1, 6), np.int64), alone], axis=1)
    mask = (np.arange(25) >= 6).astype(np.int64)[None]
    padded = np.array(ours(input_ids=ids, attention_mask=mask))
    assert np.isfinite(padded).all()
    assert np.abs(padded[:, 6:] - np.array(ours(input_ids=alone))).max() <= TOLERANCE


@pytest.mark.parametrize("cuts", [(0, 13, 14, 35, 60), tuple(range(61))])
def test_cached_equals_uncached(model, cuts):
    ids = rows(60)["input_ids"]
    expected, cache = np.array(model(input_ids=ids)), model.make_cache()
    parts = [np.array(model(input_ids=ids[:, a:b], cache=cache)) for a, b in itertools.pairwise(cuts)]
    assert np.abs(np.concatenate(parts, axis=1) - expected).max() <= TOLERANCE
    assert {cache.held(S), cache.held(F)} == {7, 60}


def test_saved_checkpoint_loads_in_transformers(tmp_path):
    from transformers import Gemma3ForCausalLM

    reference = gemma3.make(tmp_path / "made")
    save_model(load_model(tmp_path / "made"), tmp_path / "saved")
    again, info = Gemma3ForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = rows(20)
    assert np.array_equal(tiny.reference_logits(again, batch), tiny.reference_logits(reference, batch))


def test_groups_of_a_model_without_towers(model):
    assert resolve_targets(model, "decoder") == resolve_targets(model, "all") == linear_paths(model)
    assert len(resolve_targets(model, "q_proj")) == 8
    with pytest.raises(InputError, match="audio"):
        resolve_targets(model, "audio")


def test_pictures_and_foreign_ids_are_refused(model):
    with pytest.raises(InputError, match="reads text only"):
        model(input_ids=rows(4)["input_ids"], pixel_values=np.zeros((1, 9, 48)))
    with pytest.raises(InputError, match="ids are 0 to 511"):
        model(input_ids=np.array([[3, 512]]))


@pytest.mark.parametrize(
    "change,word",
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_parameters": {F: {"rope_type": "yarn"}}}, "yarn"),
        ({"layer_types": [S] * 3}, "layer_types"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_variants_that_are_not_supported(change, word):
    with pytest.raises(InputError, match=word):
        read_spec({"model_type": "gemma3_text", **gemma3.TEXT, **change})


def test_bfloat16(tmp_path):
    gemma3.make(tmp_path)
    ids = rows(20)["input_ids"]
    exact, rough = load_model(tmp_path), load_model(tmp_path, dtype="bfloat16")
    hidden = rough.hidden(input_ids=ids)
    assert hidden.dtype == mx.bfloat16 and rough.logits(hidden).dtype == mx.float32
    a, b = np.array(exact(input_ids=ids)), np.array(rough(input_ids=ids))
    assert np.abs(a - b).mean() < 0.1 * a.std()
