"""Quantized bases: loaded from conversions and quantized on load, against transformers with the same weights unpacked
by numpy."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3 as gemma3
from conversions import convert, replaced, unpacked
from mlx.utils import tree_flatten
from parity_cases import CASES, make_batch, random_lora, relative_differences
from parity_pairs import Pair, copy_lora, our_gradients

from gemma_mlx.errors import InputError
from gemma_mlx.lora import apply_lora, linear_paths, linear_shape, lora_layers
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.models.quantize import quantize_model, quantized_paths
from gemma_mlx.torch_backend import TorchBackend

TOLERANCE, BOUND = 2e-4, 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    tiny.make(folder, seed=10)
    return folder


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantized_on_load_equals_transformers_with_the_unpacked_weights(checkpoint, bits, tmp_path):
    weights = unpacked(checkpoint, bits)
    reference = replaced(tiny.make(tmp_path / "made", seed=10), weights, tmp_path / "unpacked")
    ours = load_model(checkpoint, quantize=bits)
    assert set(quantized_paths(ours)) == set(weights)
    for kind in ("text", "image+audio"):
        batch = tiny.inputs(kind, lens=(61,), grids=((9, 3),))
        expected = tiny.reference_logits(reference, batch)
        difference = np.abs(np.array(ours(**batch)) - expected).max()
        print(f"{bits} bits, {kind}: {difference:.1e}")
        assert difference <= TOLERANCE


def test_what_is_packed_and_what_stays_float(tmp_path):
    tiny.make(tmp_path, text=dict(hidden_size_per_layer_input=16))
    model = load_model(tmp_path, quantize=4)
    packed = quantized_paths(model)
    assert all(path.startswith("model.language_model.") for path in packed)
    leaves = {path.rsplit(".", 1)[-1] for path in packed}
    assert {"q_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens", "embed_tokens_per_layer"} <= leaves
    rest = {n: a for n, a in tree_flatten(model.parameters()) if n.rpartition(".")[0] not in packed}
    assert all(a.dtype == mx.float32 for a in rest.values())
    for word in ("vision_tower", "audio_tower", "embed_audio", "embed_vision", "norm", "layer_scalar", "input_min",
                 "relative_k_proj"):  # fmt: skip
        assert any(word in n for n in rest), word
    float_bytes = sum(a.nbytes for _, a in tree_flatten(load_model(tmp_path).model.language_model.parameters()))
    held = sum(a.nbytes for _, a in tree_flatten(model.model.language_model.parameters()))
    assert held < 0.4 * float_bytes
    assert not tree_flatten(model.trainable_parameters())


def test_peak_of_quantizing_is_below_the_float_weights(tmp_path):
    """Matrix by matrix: the peak is what is packed and one float matrix."""
    gemma3.make(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=12, layer_types=None)
    held = sum(a.nbytes for _, a in tree_flatten(load_model(tmp_path).parameters()))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(tmp_path, quantize=4)
    peak = mx.get_peak_memory() - before
    assert peak < 0.3 * held, (peak, held)
    assert sum(a.nbytes for _, a in tree_flatten(model.parameters())) < 0.2 * held


@pytest.mark.parametrize("bits,special", [(4, ()), (6, ()), (8, ()), (4, ("down_proj", "embed_tokens"))])
def test_conversion_equals_transformers_with_the_unpacked_weights(checkpoint, bits, special, tmp_path, recwarn):
    weights = convert(checkpoint, tmp_path / "mlx", bits, special)
    reference = tiny.make(tmp_path / "made", seed=10)
    there = dict(reference.named_modules())
    reference = replaced(reference, {p: w for p, w in weights.items() if p in there}, tmp_path / "unpacked")
    recwarn.clear()
    ours = load_model(tmp_path / "mlx")
    assert not [w for w in recwarn if "quantization" in str(w.message)]
    forms = quantized_paths(ours)
    assert {f.bits for p, f in forms.items() if p.endswith("down_proj")} == {8 if special else bits}
    assert {f.bits for p, f in forms.items() if p.endswith("q_proj")} == {bits}
    batch = tiny.inputs("image+audio", lens=(61,), grids=((9, 3),))
    difference = np.abs(np.array(ours(**batch)) - tiny.reference_logits(reference, batch)).max()
    print(f"{bits} bits {special}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_gradients_equal_those_of_the_dequantized_model(checkpoint, bits, tmp_path):
    """Adapters on packed and float linears, towers included, against PEFT on the unpacked weights."""
    replaced(tiny.make(tmp_path / "made", seed=10), unpacked(checkpoint, bits), tmp_path / "unpacked")
    ours = load_model(checkpoint, quantize=bits)
    pair = Pair("quantized", str(checkpoint), TorchBackend(tmp_path / "unpacked", device="cpu"), ours)
    paths = apply_lora(ours, "all,per_layer_input_gate,per_layer_projection", 3, 6.0)
    shapes = {p: linear_shape(layer.linear) for p, layer in lora_layers(ours).items()}
    weights = random_lora(shapes, 3)
    pair.theirs.add_lora(paths, 3, 6.0)
    pair.theirs.set_lora(weights)
    copy_lora(weights, ours)
    batch = make_batch(CASES["everything"])
    expected = pair.theirs.run(batch)
    loss, gradients = our_gradients(ours, batch)
    worst = max(relative_differences(gradients, expected.gradients).values())
    print(f"{bits} bits: loss {abs(loss - expected.loss):.1e}, worst gradient {worst:.1e}")
    assert abs(loss - expected.loss) <= 1e-5 and worst <= BOUND
    assert any(path in quantized_paths(ours) or f"{path}.linear" in quantized_paths(ours) for path in paths)


def test_gemma3_conversion_and_adapters(tmp_path):
    """A conversion of a text checkpoint keeps its names; adapters go on its packed linears."""
    reference = gemma3.make(tmp_path / "float")
    model = load_model(tmp_path / "float", quantize=4)
    saved = dict(tree_flatten(model.parameters()))
    shutil.copytree(tmp_path / "float", tmp_path / "mlx")
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), saved, metadata={"format": "mlx"})
    ours = load_model(tmp_path / "mlx")
    assert len(quantized_paths(ours)) == 1 + 5 * 8  # keys and values are small here
    replaced(reference, unpacked(tmp_path / "float", 4), tmp_path / "unpacked")
    batch = gemma3.rows(41, 7, 30)
    valid = batch["attention_mask"].astype(bool)
    difference = np.abs(np.array(ours(**batch)) - tiny.reference_logits(reference, batch))[valid].max()
    assert difference <= TOLERANCE
    assert linear_paths(ours) == linear_paths(load_model(tmp_path / "float"))
    assert len(apply_lora(ours, "decoder", 2)) == 56


def test_what_cannot_be_quantized_is_said(checkpoint, tmp_path):
    model = load_model(checkpoint, quantize=8)
    with pytest.raises(InputError, match=r"quantized already \(.*: 8 bits\)"):
        quantize_model(model, 4)
    with pytest.raises(InputError, match="expected one of 4, 6, 8"):
        load_model(checkpoint, quantize=5)
    with pytest.raises(InputError, match="matrices are quantized"):
        save_model(model, tmp_path / "out")
    convert(checkpoint, tmp_path / "mlx", 4)
    path = tmp_path / "mlx" / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["mode"] = "mxfp4"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="mode 'mxfp4'"):
        load_model(tmp_path / "mlx")
    config["quantization"]["mode"] = "affine"
    path.write_text(json.dumps(config))
    file = tmp_path / "mlx" / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    name = "language_model.model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name][:, :1]
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj.biases has shape"):
        load_model(tmp_path / "mlx")
