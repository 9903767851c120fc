"""Merged exports: transformers loads them whole and computes what ours computes with the adapter on; every family."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from adapter_pairs import MAKERS, adapted, batches, difference, ours, randomise
from merged_pairs import Bases, fast, load_checked, tensors

from gemma_mlx.exporting.run import export
from gemma_mlx.full import train_fully, trained_places
from gemma_mlx.lora import apply_lora, lora_layers, save_adapter
from gemma_mlx.models.names import stored_name

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp)


def compare(name, model, folder, what, capsys=None):
    """Logits of ours with the adapter on, and of transformers with the exported folder, on all media."""
    reference, largest = load_checked(folder), 0.0
    for inputs in batches(name).values():
        expected = tiny.reference_logits(reference, inputs)
        assert expected.std() > 0.2
        largest = max(largest, difference(model(**inputs), expected, inputs))
    print(f"{what}: {largest:.1e}")
    assert largest <= TOLERANCE
    return reference


@pytest.mark.parametrize("name", fast(["E2B", "Gemma 3"], *MAKERS))
def test_transformers_computes_the_same_from_the_merged_export(name, bases, tmp_path):
    base = bases(name)
    model, folder = adapted(name, base, tmp_path / "adapter")
    inputs = batches(name)["text"]
    assert difference(model(**inputs), ours(name, base)(**inputs), inputs) > 0.05  # the adapter does something
    out = export(model=base, adapter=folder, out=tmp_path / "out", shard_bytes=150_000, quiet=True)
    compare(name, model, out, f"merged {name}")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    before, after = tensors(base), tensors(out)
    assert set(before) == set(after)
    changed = {stored_name(f"{path}.weight", model.spec.unified): layer for path, layer in lora_layers(model).items()}
    for tensor, value in after.items():
        if tensor not in changed:
            assert mx.array_equal(value, before[tensor], equal_nan=True).item(), tensor
            continue
        layer = changed[tensor]
        a, b, w = (np.array(x, np.float64) for x in (layer.lora_a, layer.lora_b, before[tensor]))
        assert np.abs(np.array(value) - (w + 2.0 * (a @ b).T)).max() < 2e-6
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", fast(["Gemma 3"], "E2B", "12B", "Gemma 3"))
def test_dora_keeps_its_lengths(name, bases, tmp_path):
    model, folder = adapted(name, bases(name), tmp_path / "adapter", dora=True)
    out = export(model=bases(name), adapter=folder, out=tmp_path / "out", quiet=True)
    compare(name, model, out, f"merged DoRA {name}")
    after = tensors(out)
    for path, layer in lora_layers(model).items():
        lengths = np.linalg.norm(np.array(after[stored_name(f"{path}.weight", model.spec.unified)], np.float64), axis=1)
        np.testing.assert_allclose(lengths, np.abs(np.array(layer.m)), rtol=1e-5)


FULL = {
    "E2B": "embed_tokens,subsample_conv_projection,language_model.norm,embed_vision,layers.3.mlp.down_proj",
    "26B": "experts,embed_tokens,router",
    "3n": "vision_tower,embed_audio,altup",
    "12B": "embed_vision,embed_tokens,embed_audio",
}


@pytest.mark.parametrize("name", fast([], *FULL))
def test_modules_trained_in_full(name, bases, tmp_path):
    """Embeddings (which are the head too), convolutions, norms, experts; beside adapters on the attention."""
    model, rng = ours(name, bases(name)), np.random.default_rng(1)
    apply_lora(model, "decoder.q_proj", 2, 3.0)
    randomise(model)
    paths = train_fully(model, FULL[name])
    for tensor, place in trained_places(model).items():
        if tensor.rpartition(".")[0] in paths:
            value = place.get()
            noise = rng.standard_normal(value.shape).astype(np.float32) * float(mx.abs(value).mean())
            place.put(value + 0.1 * mx.array(noise))
    save_adapter(model, tmp_path / "adapter")
    out = export(model=bases(name), adapter=tmp_path / "adapter", out=tmp_path / "out", quiet=True)
    compare(name, model, out, f"merged, {len(paths)} modules in full, {name}")
    again = ours(name, out)
    inputs = batches(name)["text"]
    assert difference(model(**inputs), again(**inputs), inputs) < 2e-5


def test_modules_trained_in_full_are_rounded_once(bases, tmp_path):
    """The base is bfloat16, the adapter's file float32: so are they in an export in float32."""
    from gemma_mlx.models.load import load_model, save_model

    base = tmp_path / "base"
    save_model(load_model(bases("Gemma 3"), dtype="bfloat16"), base)
    model = load_model(base, dtype="float32")
    train_fully(model, "model.norm")
    path, place = next(iter(trained_places(model).items()))
    trained = place.get() + 1e-4 * mx.arange(place.get().size)
    place.put(trained)
    save_adapter(model, tmp_path / "adapter")
    out = export(model=base, adapter=tmp_path / "adapter", out=tmp_path / "out", dtype="float32", quiet=True)
    assert not mx.array_equal(trained, trained.astype(mx.bfloat16).astype(mx.float32))
    assert mx.array_equal(tensors(out)[path], trained)
