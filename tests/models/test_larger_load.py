"""Names, shapes and files of Gemma 4 12B, 26B-A4B and 31B."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.models.multimodal import Gemma4
from gemma_mlx.models.names import module_path, stored_name
from gemma_mlx.spec import FULL, SLIDING, read_spec

COMMON = dict(
    hidden_size_per_layer_input=0, num_kv_shared_layers=0, attention_k_eq_v=True, sliding_window=1024,
    use_bidirectional_attention="vision", final_logit_softcapping=30.0,
)  # fmt: skip
VISION = dict(
    num_hidden_layers=27, hidden_size=1152, num_attention_heads=16, num_key_value_heads=16, head_dim=72,
    intermediate_size=4304, standardize=True, use_clipped_linears=False,
)  # fmt: skip
# Published sizes: tensors of a state_dict without the tied head, and parameters in billions.
SIZES = {
    "12B": (677, 11.960, dict(num_hidden_layers=48, hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
                      num_key_value_heads=8, num_global_key_value_heads=1)),
    "26B": (1013, 25.806, dict(num_hidden_layers=30, hidden_size=2816, intermediate_size=2112, num_attention_heads=16,
                       num_key_value_heads=8, num_global_key_value_heads=2, enable_moe_block=True, num_experts=128,
                       top_k_experts=8, moe_intermediate_size=704)),
    "31B": (1188, 31.273, dict(num_hidden_layers=60, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
                       num_key_value_heads=16, num_global_key_value_heads=4)),
}  # fmt: skip


def config_of(name):
    from transformers import Gemma4Config, Gemma4UnifiedConfig

    text = {**COMMON, **SIZES[name][2]}
    text["layer_types"] = [SLIDING if (i + 1) % 6 else FULL for i in range(text["num_hidden_layers"])]
    if name != "12B":
        return Gemma4Config(text_config=text, vision_config=VISION, audio_config=None)
    del text["hidden_size_per_layer_input"]
    return Gemma4UnifiedConfig(text_config=text, vision_config={}, audio_config={})


def spellings(config):
    """The config as transformers saves it, and as published files spell it."""
    native = json.loads(config.to_json_string(use_diff=False))
    hub = json.loads(json.dumps(native))
    full = next(iter(hub["text_config"].pop("per_layer_config").values()))
    hub["text_config"] |= dict(global_head_dim=full["head_dim"], num_global_key_value_heads=full["num_key_value_heads"])
    return native, hub


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_names_and_shapes_of_the_real_sizes(name):
    """Every tensor as transformers lays it out, without allocating one; both spellings of the config."""
    from transformers import Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration

    count, billions, _ = SIZES[name]
    config = config_of(name)
    with torch.device("meta"):
        made = Gemma4UnifiedForConditionalGeneration if name == "12B" else Gemma4ForConditionalGeneration
        theirs = {n: tuple(t.shape) for n, t in made(config).state_dict().items()}
    del theirs["lm_head.weight"]
    specs = [read_spec(spelled) for spelled in spellings(config)]
    assert specs[0] == specs[1]
    ours = {path: tuple(array.shape) for path, array in tree_flatten(Gemma4(specs[0]).parameters())}
    assert len(ours) == count and ours == theirs
    assert abs(sum(map(np.prod, ours.values())) / 1e9 - billions) < 6e-4


def test_published_names_of_12b(tmp_path):
    """Every name of transformers' own renaming rules; what transformers and we write has the published names."""
    made = tiny.make_unified(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    theirs, ours = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("theirs", "ours"))
    assert set(ours) == set(theirs)
    assert "model.vision_embedder.patch_dense.bias" in ours and "model.vision_embedder.pos_embedding" in ours
    assert "model.embed_vision.embedding_projection.weight" in ours
    for name in theirs:
        assert mx.array_equal(ours[name], theirs[name]).item(), name
        assert stored_name(module_path(name, unified=True), unified=True) == name
    modules = {n for n in made.state_dict() if n != "lm_head.weight"}
    assert {module_path(name, unified=True) for name in theirs} == modules
    assert {n for n, _ in tree_flatten(model.parameters())} == modules


def test_module_names_load_too(tmp_path):
    """A 12B file with the names of transformers' modules, as a bare state_dict has them."""
    made = tiny.make_unified(tmp_path)
    batch = dict(input_ids=np.arange(3, 20)[None])
    expected = np.array(load_model(tmp_path)(**batch))
    state = {n: mx.array(t.detach().numpy()) for n, t in made.state_dict().items() if n != "lm_head.weight"}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), state)
    assert np.array_equal(np.array(load_model(tmp_path)(**batch)), expected)


def test_saved_unified_checkpoint_loads_in_transformers(tmp_path):
    from transformers import Gemma4UnifiedForConditionalGeneration

    made = tiny.make_unified(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again, info = Gemma4UnifiedForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    for (name, a), (_, b) in zip(made.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("spelling", ["hub", "native"])
def test_larger_checkpoint_goes_round(tmp_path, spelling):
    """Experts, std_bias and per-layer heads: loaded and saved unchanged; buffers and experts never train by default."""
    tiny.make(tmp_path / "a", style=spelling, **tiny.larger(tiny.EXPERTS))
    model = load_model(tmp_path / "a")
    assert not model.trainable_parameters() or not tree_flatten(model.trainable_parameters())
    save_model(model, tmp_path / "b")
    a, b = (mx.load(str(tmp_path / f / "model.safetensors")) for f in "ab")
    assert set(a) == set(b) and all(mx.array_equal(a[n], b[n]).item() for n in a)
    model.unfreeze()
    names = {n for n, _ in tree_flatten(model.trainable_parameters())}
    assert "model.vision_tower.std_bias" not in names and "model.language_model.layers.0.layer_scalar" not in names


def test_what_does_not_exist_is_refused(tmp_path):
    tiny.make(tmp_path, **tiny.larger())
    with pytest.raises(InputError, match="vision_runs 'none'"):
        load_model(tmp_path, vision_runs="none")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["per_layer_config"] = {"0": {"num_key_value_heads": 1}}
    with pytest.raises(InputError, match=r"layer 0 \(sliding_attention\) overrides \['num_key_value_heads'\]"):
        read_spec(config)
