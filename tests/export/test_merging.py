"""Adapters folded into a loaded model, against NumPy in float64 and the model with the adapter on."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_pairs import randomise
from conversions import unpack
from mlx.utils import tree_flatten

from gemma_mlx.adapters.attach import attach
from gemma_mlx.lora import DoRALinear, LoRALinear, apply_lora, lora_layers, module_at, save_adapter
from gemma_mlx.merging import float_rows, merge, merged_rows
from gemma_mlx.models.load import load_model


def exact(layer, base):
    """The merged weight in float64."""
    a, b = (np.array(x, np.float64) for x in (layer.lora_a, layer.lora_b))
    whole = base + layer.scale * (a @ b).T
    if isinstance(layer, DoRALinear):
        whole *= (np.array(layer.m, np.float64) / np.linalg.norm(whole, axis=1))[:, None]
    return whole


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(("out", "inner", "rank"), [(7, 64, 1), (33, 128, 5), (1, 64, 64)])
def test_merged_rows_are_the_formula(kind, bits, out, inner, rank):
    rng = np.random.default_rng(out)
    linear = nn.Linear(inner, out, bias=False)
    linear.weight = mx.array(rng.standard_normal((out, inner)).astype(np.float32))
    base = np.array(linear.weight, np.float64)
    if bits:
        linear = linear.to_quantized(group_size=64, bits=bits)
        base = unpack(linear.weight, linear.scales, linear.biases, bits).astype(np.float64)
    layer = kind(linear, rank, 2.5 * rank)
    layer.lora_b = mx.array(rng.standard_normal((rank, out)).astype(np.float32))
    if kind is DoRALinear:
        layer.m = mx.array(rng.uniform(0.5, 2, out).astype(np.float32))
    expected = exact(layer, base)
    tolerance = 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(np.array(merged_rows(layer)) - expected).max() < tolerance
    for rows in (slice(0, 1), slice(out // 2, out), slice(out - 1, out)):
        assert np.abs(np.array(merged_rows(layer, rows)) - expected[rows]).max() < tolerance
        assert np.abs(np.array(float_rows(linear, rows)) - base[rows]).max() < tolerance


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_model_computes_the_same_after_the_merge(checkpoint_folder, tmp_path, bits, dora):
    model = load_model(checkpoint_folder, quantize=bits)
    apply_lora(model, "all", 3, 4.0, dora=dora)
    randomise(model)
    rng = np.random.default_rng(0)
    inputs = {"input_ids": rng.integers(30, 400, (2, 40))}
    before, layers = np.array(model(**inputs)), lora_layers(model)
    untouched = {n: a for n, a in tree_flatten(model.parameters()) if not n.startswith(tuple(layers))}
    assert merge(model) == list(layers)
    assert np.abs(np.array(model(**inputs)) - before).max() < 1e-4
    assert not lora_layers(model) and not tree_flatten(model.trainable_parameters())
    assert {type(module_at(model, path)) for path in layers} == {nn.Linear}
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], a, equal_nan=True).item() for name, a in untouched.items())
    for path, layer in layers.items():  # in a tower, the linear inside the clips
        clipped = any(f"{path.removesuffix('.linear')}.{bound}" in after for bound in ("input_min", "output_max"))
        assert clipped == path.endswith(".linear")
        assert np.abs(np.array(after[f"{path}.weight"]) - exact(layer, np.array(float_rows(layer.linear)))).max() < 2e-5


def test_a_bias_stays_and_bfloat16_is_rounded_once(checkpoint_folder):
    model = load_model(checkpoint_folder, dtype="bfloat16")
    path = "model.language_model.layers.0.self_attn.q_proj"
    linear = module_at(model, path)
    linear.bias = mx.arange(linear.weight.shape[0]).astype(mx.bfloat16)
    apply_lora(model, "decoder.q_proj", 2, 4.0)
    randomise(model)
    layer = lora_layers(model)[path]
    expected = exact(layer, np.array(linear.weight.astype(mx.float32), np.float64))
    merge(model)
    merged = module_at(model, path)
    assert merged.weight.dtype == mx.bfloat16 and mx.array_equal(merged.bias, linear.bias).item()
    step = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    assert (np.abs(np.array(merged.weight.astype(mx.float32)) - expected) <= step / 2 + 1e-7).all()


def test_a_merged_model_can_take_the_next_adapter(checkpoint_folder, tmp_path):
    other = load_model(checkpoint_folder)
    apply_lora(other, "decoder", 2, 4.0)
    randomise(other)
    save_adapter(other, tmp_path / "a")
    model = load_model(checkpoint_folder)
    attach(model, tmp_path / "a")
    assert merge(model) and merge(model) == []
    ids = {"input_ids": np.arange(40, 80)[None]}
    once = np.array(model(**ids))
    attach(model, tmp_path / "a")
    assert np.abs(np.array(model(**ids)) - once).max() > 0.01
