"""Conversions of Gemma 3n and of Gemma 4 12B, with what mlx-vlm's converter packs in them: their embedders and small
projections too."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3n as tiny3n
import torch
from conversions import convert, replaced, unpacked
from larger_pairs import AUDIO_CASES, SlidingRuns
from mlx.utils import tree_flatten
from parity_cases import make_batch

from gemma_mlx.errors import InputError
from gemma_mlx.inspection import examine
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.models.names import module_path
from gemma_mlx.models.quantize import quantized_paths

TOLERANCE = 2e-4
INPUTS_3N = {
    "text beyond the window": dict(kind="text", n_text=70),
    "clips over a batch": dict(kind="audio", lens=(61, 200), batch=2, n_text=20),
    "image": dict(kind="image"),
    "image and clip": dict(kind="image+audio", lens=(80,)),
}
TEXT_3N = dict(  # four layers, as in the parity tests; widths that the packer takes
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0], hidden_size_per_layer_input=32, laurel_rank=64,
    altup_num_inputs=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory):
    pytest.importorskip("timm")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("3n")
    tiny3n.make(folder, seed=4, text=TEXT_3N)
    return folder


def compare_3n(reference, ours, what):
    for name, shape in INPUTS_3N.items():
        batch = tiny3n.inputs(**shape)
        valid = batch["attention_mask"].astype(bool)
        expected = tiny.reference_logits(reference, batch)[valid]
        difference = np.abs(np.array(ours(**batch))[valid] - expected).max()
        print(f"{what}, {name}: {difference:.1e}")
        assert expected.std() > 0.2 and difference <= TOLERANCE, name


@pytest.mark.parametrize("bits", [4, 8])
def test_gemma3n_conversion_equals_transformers_with_the_unpacked_weights(gemma3n, bits, tmp_path):
    """Channels-last towers (the first convolution has three channels and 3 × 3 taps: its shape does not tell), packed
    decoder with LAuReL, AltUp's router and projections, per-layer inputs, and both embedders."""
    weights = convert(gemma3n, tmp_path / "mlx", bits)
    ours = load_model(tmp_path / "mlx")
    packed = quantized_paths(ours)
    assert {path for path in weights if "layers.2.self_attn.k" not in path} >= set(packed)
    assert not [p for p in weights if p not in packed and ".k_proj" not in p and ".v_proj" not in p]
    ends = {
        "laurel.linear_left", "laurel.linear_right", "altup.modality_router", "altup_projections.2",
        "altup_unembed_projections.0", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",
        "embed_tokens_per_layer", "embed_vision.embedding", "embed_audio.embedding",
        "embed_vision.embedding_projection", "embed_audio.embedding_projection",
    }  # fmt: skip
    assert not [end for end in ends if not any(path.endswith(end) for path in packed)]
    compare_3n(replaced(tiny3n.make(tmp_path / "made", seed=4, text=TEXT_3N), weights, tmp_path / "unpacked"), ours,
               f"3n conversion, {bits} bits")  # fmt: skip


def test_gemma3n_float_conversion_is_the_checkpoint_again(gemma3n, tmp_path):
    convert(gemma3n, tmp_path / "mlx", None)
    save_model(load_model(tmp_path / "mlx"), tmp_path / "saved")
    saved, expected = (mx.load(str(f / "model.safetensors")) for f in (tmp_path / "saved", gemma3n))
    assert set(saved) <= set(expected) and all(mx.array_equal(saved[n], expected[n]).item() for n in saved)


def test_gemma3n_quantized_on_load(gemma3n, tmp_path):
    weights, ours = unpacked(gemma3n, 4), load_model(gemma3n, quantize=4)
    packed = quantized_paths(ours)
    assert set(packed) == set(weights)
    assert {path.split(".")[1] for path in packed} == {"language_model"}
    for name in ("laurel", "modality_router", "prediction_coefs", "correction_coefs"):
        assert not any(name in path for path in packed)
        assert any(name in path for path, _ in tree_flatten(ours.parameters()))
    assert any("altup_projections" in path for path in packed)
    compare_3n(replaced(tiny3n.make(tmp_path / "made", seed=4, text=TEXT_3N), weights, tmp_path / "unpacked"), ours,
               "3n on load")  # fmt: skip
    assert not examine(gemma3n).problems


@pytest.mark.parametrize("bits", [4, 8])
def test_12b_conversion_equals_transformers_with_the_unpacked_weights(bits, tmp_path, monkeypatch):
    """Embedders without towers, packed (at widths that the packer takes): pictures and raw samples."""
    monkeypatch.setitem(tiny.VISION, "patch_size", 8)
    for name, size in (("patch_size", 8), ("mm_embed_dim", 64), ("output_proj_dims", 64)):
        monkeypatch.setitem(tiny.UNIFIED_VISION, name, size)
    monkeypatch.setitem(tiny.UNIFIED_AUDIO, "audio_embed_dim", 64)
    reference = tiny.make_unified(tmp_path / "float", seed=0)
    weights = convert(tmp_path / "float", tmp_path / "mlx", bits)
    ours = load_model(tmp_path / "mlx")
    packed = quantized_paths(ours)
    for name in ("embed_audio.embedding_projection", "multimodal_embedder.embedding_projection", "patch_dense"):
        assert any(path.endswith(name) for path in packed), name
    weights = {module_path(f"{path}.weight", unified=True): w for path, w in weights.items()}
    replaced(reference, weights, tmp_path / "unpacked")
    theirs = SlidingRuns(tmp_path / "unpacked", device="cpu")
    for name, case in AUDIO_CASES.items():
        batch = make_batch(case, unified=True)
        valid = batch.attention_mask.astype(bool)
        difference = np.abs(np.array(ours(**batch.inputs())) - theirs.logits(batch))[valid].max()
        print(f"12B conversion, {bits} bits, {name}: {difference:.1e}")
        assert difference <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*unknown key 'vocab_size'")
@pytest.mark.parametrize("bits", [None, 4])
def test_what_mlx_lm_leaves_out_is_not_missed(bits, tmp_path):
    """It converts the decoder alone: text loads, with a warning; media are refused, and the config is saved without."""
    from mlx_lm import utils

    tiny.make(tmp_path / "float", seed=10, text=dict(num_kv_shared_layers=4))
    path = tmp_path / "float" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"vocab_size": tiny.VOCAB, **config}))  # it looks there
    theirs, config = utils.load_model(tmp_path / "float", lazy=True)
    if bits:
        theirs, config = utils.quantize_model(theirs, config, 32, bits)
    utils.save_model(tmp_path / "mlx", theirs)
    utils.save_config(config, tmp_path / "mlx" / "config.json")
    with pytest.warns(UserWarning, match="holds nothing for audio; loaded without"):
        ours = load_model(tmp_path / "mlx")
    assert ours.spec.vision is None and ours.spec.audio is None and bool(quantized_paths(ours)) == bool(bits)
    ids = np.random.default_rng(0).integers(3, 490, (1, 40))
    assert np.abs(np.array(ours(input_ids=ids)) - np.array(theirs(mx.array(ids)))).max() <= TOLERANCE
    with pytest.raises(InputError):
        ours(**tiny.inputs("image"))
    with pytest.warns(UserWarning, match="holds nothing"):
        found = examine(tmp_path / "mlx")
    assert found.family == "Gemma 4: text" and not found.problems
    if bits is None:
        save_model(ours, tmp_path / "saved")
        again = load_model(tmp_path / "saved")
        assert again.spec.vision is None and mx.array_equal(again(input_ids=ids), ours(input_ids=ids)).item()


def test_a_tower_missing_from_a_checkpoint_or_in_part_is_an_error(tmp_path):
    tiny.make(tmp_path / "float", seed=10)
    convert(tmp_path / "float", tmp_path / "mlx", 4)
    for folder, gone in (("float", "model.audio_tower."), ("float", "model.embed_audio."), ("mlx", "audio_tower.")):
        file = str(tmp_path / folder / "model.safetensors")
        tensors = {n: a for n, a in mx.load(file).items() if not n.startswith(gone)}
        mx.eval(tensors)
        mx.save_safetensors(file, tensors, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"missing tensors: .*audio"):
            load_model(tmp_path / folder)
