"""Checkpoints to models and back: layouts, spellings, damage, dtypes, and what may never train."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.models.load import load, load_model, read_header, save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(transformers' model, its folder); tests copy the folder before they change it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny.make(folder), folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint[1], tmp_path / "copy")


@pytest.fixture(scope="module")
def batch():
    return tiny.inputs("image+audio", lens=(61,), grids=((9, 3),))


def tensors(folder):
    return dict(mx.load(str(folder / "model.safetensors")))


def rewrite(folder, change):
    """Apply `change` to the dict of tensors and write the file again."""
    found = tensors(folder)
    mx.eval(found)
    change(found)
    mx.save_safetensors(str(folder / "model.safetensors"), found)


def flat(model):
    return dict(tree_flatten(model.parameters()))


def test_every_tensor_arrives(checkpoint):
    """Each parameter and buffer holds the checkpoint's values; convolutions are channels-last."""
    reference, folder = checkpoint
    ours = flat(load_model(folder))
    theirs = {n: t.numpy() for n, t in reference.state_dict().items() if n != "lm_head.weight"}
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        if ".conv.weight" in name or "conv1d.weight" in name:
            expected = np.moveaxis(expected, 1, -1)
        assert np.array_equal(np.array(ours[name]), expected), name


def test_saved_checkpoint_loads_in_transformers(checkpoint, batch, tmp_path):
    """No missing or unexpected keys there; logits bit-equal to the original's there, and to ours here."""
    from transformers import Gemma4ForConditionalGeneration

    reference, folder = checkpoint
    ours = load_model(folder)
    save_model(ours, tmp_path / "saved")
    again, info = Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert np.array_equal(tiny.reference_logits(again.eval(), batch), tiny.reference_logits(reference, batch))
    reloaded = load_model(tmp_path / "saved")
    assert reloaded.spec == ours.spec
    assert np.array_equal(np.array(reloaded(**batch)), np.array(ours(**batch)))


def test_shards_and_index(checkpoint, batch, tmp_path, monkeypatch):
    """A checkpoint in several shards, written here, is the same model."""
    ours = load_model(checkpoint[1])
    monkeypatch.setattr("gemma_mlx.models.load.SHARD_BYTES", 300_000)
    save_model(ours, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert np.array_equal(np.array(load_model(tmp_path)(**batch)), np.array(ours(**batch)))
    monkeypatch.undo()
    ours.model.language_model.norm.weight = ours.model.language_model.norm.weight * 2
    save_model(ours, tmp_path)  # one file now, over the shards
    assert np.array_equal(np.array(load_model(tmp_path)(**batch)), np.array(ours(**batch)))


def test_mlx_spelling_and_layout(folder, batch):
    """Names of MLX conversions, with convolutions channels-last already."""
    expected = np.array(load_model(folder)(**batch))

    def change(found):
        for name in list(found):
            array = found.pop(name)
            if name.endswith(("conv.weight", "conv1d.weight")):
                array = mx.contiguous(mx.moveaxis(array, 1, -1))
            name = name.removeprefix("model.")
            name = name.replace("language_model.", "language_model.model.", 1)
            found[name] = array

    rewrite(folder, change)
    assert np.array_equal(np.array(load_model(folder)(**batch)), expected)


def test_shared_layers_extra_tensors_are_dropped_and_no_others(folder, batch):
    """The key and value side of layers 6 to 9 may be there; that of layer 5 is needed, that of layer 10 unknown."""
    expected = np.array(load_model(folder)(**batch))
    prefix = "model.language_model.layers"

    def add(found):
        for layer in range(6, 10):
            for part, shape in (("k_proj", (16, 64)), ("v_proj", (16, 64)), ("k_norm", (16,)), ("v_norm", (16,))):
                found[f"{prefix}.{layer}.self_attn.{part}.weight"] = mx.random.normal(shape)
        found["lm_head.weight"] = found["model.language_model.embed_tokens.weight"]

    rewrite(folder, add)
    assert np.array_equal(np.array(load_model(folder)(**batch)), expected)
    rewrite(folder, lambda found: found.update({f"{prefix}.10.self_attn.k_proj.weight": mx.zeros((16, 64))}))
    with pytest.raises(InputError, match=r"model\.safetensors: 1 unexpected tensors: .*layers\.10\.self_attn\.k_proj"):
        load_model(folder)
    assert np.array_equal(np.array(load_model(folder, allow_unexpected=True)(**batch)), expected)


@pytest.mark.parametrize("allow", [False, True])
def test_missing_tensor_is_always_an_error(folder, allow):
    name = "model.language_model.layers.5.self_attn.k_proj.weight"
    rewrite(folder, lambda found: found.pop(name))
    with pytest.raises(InputError, match=r"1 missing tensors: .*layers\.5\.self_attn\.k_proj.*\[16, 64\]"):
        load_model(folder, allow_unexpected=allow)


def test_missing_buffer_is_an_error(folder):
    rewrite(folder, lambda found: found.pop("model.audio_tower.layers.0.self_attn.post.input_max"))
    with pytest.raises(InputError, match=r"self_attn\.post\.input_max"):
        load_model(folder)


def test_misshapen_tensor_names_file_and_both_shapes(folder):
    name = "model.language_model.layers.2.mlp.gate_proj.weight"
    rewrite(folder, lambda found: found.update({name: found[name][:-1]}))
    with pytest.raises(InputError, match=r"model\.safetensors: .*layers\.2.*\[95, 64\].*\[96, 64\]"):
        load_model(folder, allow_unexpected=True)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.9999])
def test_truncated_file_names_it(folder, keep):
    """Cut at any place: before the header's length, within the header, within the data."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"model\.safetensors: .*download"):
        load_model(folder)


def test_corrupt_header_names_the_tensor(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    at = data.index(b'"shape":[512,64]')
    file.write_bytes(data[:at] + b'"shape":[511,64]' + data[at + 16 :])
    with pytest.raises(InputError, match=r"model\.safetensors: .*header is corrupt"):
        load_model(folder)


def test_not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip file" * 20)
    with pytest.raises(InputError, match="not a safetensors file"):
        load_model(folder)


def test_shard_missing_from_the_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_mlx.models.load.SHARD_BYTES", 300_000)
    save_model(load_model(checkpoint[1]), tmp_path)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=rf"index\.json: names {gone.name}, missing"):
        load_model(tmp_path)


def test_index_that_misplaces_a_tensor(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_mlx.models.load.SHARD_BYTES", 300_000)
    save_model(load_model(checkpoint[1]), tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(n for n, f in index["weight_map"].items() if f == files[0])
    index["weight_map"][name] = files[1]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{name} should be in {files[1]}"):
        load_model(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="weight_map"):
        load_model(tmp_path)


def test_folder_without_weights(tmp_path, checkpoint):
    shutil.copy(checkpoint[1] / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)


def test_infinite_clip_bounds_survive(folder, batch, tmp_path):
    """In either dtype, through loading and saving; still scalars of shape []."""
    names = (
        "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max",
        "model.audio_tower.layers.1.lconv1d.linear_end.output_min",
    )
    rewrite(folder, lambda f: f.update({names[0]: mx.array(float("inf")), names[1]: mx.array(-float("inf"))}))
    for dtype in ("float32", "bfloat16"):
        model = load_model(folder, dtype=dtype)
        assert np.isfinite(np.array(model(**batch))).all()
        save_model(model, tmp_path / dtype)
        saved = flat(load_model(tmp_path / dtype))
        for name, sign in zip(names, (1, -1), strict=True):
            assert saved[name].shape == () and saved[name].item() == sign * float("inf")
        shapes = {t.name: t.shape for t in read_header(tmp_path / dtype / "model.safetensors")}
        assert shapes[names[0]] == ()


def test_buffers_never_train(checkpoint):
    """Loaded frozen; after unfreeze() everything trains but layer scalars and clip bounds."""
    reference, folder = checkpoint
    model = load_model(folder)
    assert not tree_flatten(model.trainable_parameters())
    buffers = {n for n, _ in reference.named_buffers()} & set(flat(model))
    assert len(buffers) == 10 + 4 * (2 * 7 + 2 * 10)
    for unfreeze in (model.unfreeze, lambda: model.unfreeze(keys=["layer_scalar", "input_min", "weight"])):
        unfreeze()
        assert not buffers & {n for n, _ in tree_flatten(model.trainable_parameters())}
    model.unfreeze()
    assert {n for n, _ in tree_flatten(model.trainable_parameters())} == set(flat(model)) - buffers


def test_loading_reads_no_weights(folder):
    """Lazy: values are those that the file has at first use, after loading."""
    name = "model.language_model.norm.weight"
    model = load_model(folder)
    with (folder / "model.safetensors").open("r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        start = json.loads(f.read(length))[name]["data_offsets"][0]
        f.seek(8 + length + start)
        f.write(np.full(64, 7.5, np.float32).tobytes())
    assert np.array_equal(np.array(flat(model)[name]), np.full(64, 7.5, np.float32))


def test_dtypes(folder):
    for dtype in ("float32", "bfloat16"):
        model = load_model(folder, dtype=dtype)
        assert {str(a.dtype) for a in flat(model).values()} == {f"mlx.core.{dtype}"}
    with pytest.raises(InputError, match="dtype 'int8'"):
        load_model(folder, dtype="int8")


def test_bfloat16_checkpoint_is_float32_on_a_cpu(folder, tmp_path):
    save_model(load_model(folder, dtype="bfloat16"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    expected = mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16
    assert load_model(tmp_path).model.language_model.norm.weight.dtype == expected


def test_model_with_an_adapter_is_not_saved_as_a_checkpoint(folder, tmp_path):
    model = load_model(folder)
    model.model.language_model.layers[0].mlp.extra = mx.zeros((2, 2))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.extra; merge"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_audio_window_is_a_switch(folder, batch):
    twelve, thirteen = (load_model(folder, audio_window=w) for w in (12, 13))
    assert thirteen.spec.audio.attention_window == 13
    assert np.abs(np.array(twelve(**batch)) - np.array(thirteen(**batch))).max() > 1e-3


def test_load_from_a_folder_without_tokenizer(folder, batch):
    model, processor = load(folder)
    assert np.array_equal(np.array(model(**batch)), np.array(load_model(folder)(**batch)))
    assert processor is not None


def test_load_refuses(folder):
    with pytest.raises(InputError, match="quantize 3: expected one of 4, 6, 8"):
        load(folder, quantize=3)
    with pytest.raises(InputError, match="no such folder"):
        load("/no/such/folder")
    with pytest.raises(InputError, match="nobody/nothing: not a local folder, and the Hub did not give it"):
        load("nobody/nothing")
