"""config.json spellings and token counts, against transformers' own configs and processors."""

import copy
import json
import warnings

import numpy as np
import pytest
import tiny

from gemma_mlx.errors import InputError
from gemma_mlx.spec import (
    FULL,
    IMAGE_BUDGETS,
    MAX_AUDIO_SAMPLES,
    audio_soft_tokens,
    image_size,
    image_soft_tokens,
    read_spec,
)


@pytest.fixture(scope="module")
def config():
    return json.loads(tiny.config().to_json_string(use_diff=False)) | {"model_type": "gemma4"}


def hub(config):
    """The same config as published files spell it."""
    out = copy.deepcopy(config)
    out["text_config"].pop("per_layer_config")
    out["text_config"] |= {"global_head_dim": 32, "num_global_key_value_heads": None}
    return out


def test_both_spellings_give_one_spec(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native, published = read_spec(config), read_spec(hub(config))
    assert native == published
    assert (native.text.head_dim, native.text.global_head_dim) == (16, 32)
    assert native.eoa_token_id == tiny.EOA and native.audio.subsampling_conv_channels == (128, 8)


def test_layers_as_transformers_resolves_them(config):
    theirs, text = tiny.config().text_config, read_spec(config).text
    assert text.num_hidden_layers == 10 and text.first_kv_shared_layer == 6
    for i, mode in enumerate(theirs.kv_sharing_modes):
        assert (mode == "reuse") == (text.kv_provider(i) != i)
        assert text.layer_head_dim(i) == theirs.per_layer_config[i].head_dim
    assert [text.kv_provider(i) for i in (6, 8, 9)] == [5, 5, 4]
    assert [text.layer_intermediate_size(i) for i in (5, 6)] == [96, 192]


def test_config_without_layer_types_has_every_sixth_full(config):
    config = copy.deepcopy(config)
    del config["text_config"]["layer_types"], config["text_config"]["per_layer_config"]
    config["text_config"] |= {"num_hidden_layers": 12, "global_head_dim": 32}
    text = read_spec(config).text
    assert [i for i, kind in enumerate(text.layer_types) if kind == FULL] == [5, 11]


@pytest.mark.parametrize("part", [None, "text_config", "vision_config", "audio_config"])
def test_unknown_key_is_a_warning_that_names_it(config, part):
    config = copy.deepcopy(config)
    (config if part is None else config[part])["hidden_flavour"] = 3
    with pytest.warns(UserWarning, match="hidden_flavour") as caught:
        read_spec(config)
    assert len(caught) == 1
    assert part is None or part in str(caught[0].message)


def test_vision_rope_type_default_is_axial(config):
    config = copy.deepcopy(config)
    config["vision_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    assert read_spec(config).vision.rope_theta == 100.0


def test_a_checkpoint_without_towers(config):
    spec = read_spec({**config, "vision_config": None, "audio_config": None})
    assert spec.vision is None and spec.audio is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
        ({"text_config": {"enable_moe_block": True}}, "enable_moe_block needs num_experts"),
        (
            {"text_config": dict(enable_moe_block=True, num_experts=4, moe_intermediate_size=8, top_k_experts=5)},
            "top_k_experts is 5; expected 1 to 4",
        ),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "use_bidirectional_attention is 'all'"),
        ({"text_config": {"layer_types": ["full_attention"] * 3}}, "expected 10 entries"),
        ({"text_config": {"rope_parameters": {"full_attention": {}}}}, "no entry for 'sliding_attention'"),
        ({"text_config": {"num_kv_shared_layers": 7}}, "no earlier layer to share with"),
        ({"text_config": {"per_layer_config": {"3": {"num_key_value_heads": 4}}}}, "layer 3"),
        ({"audio_config": {"attention_context_right": 2}}, "attention_context_right"),
        ({"vision_config": {"hidden_activation": "relu"}}, "vision_config"),
    ],
)
def test_what_is_not_supported_is_refused(config, change, message):
    config = copy.deepcopy(config)
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message):
        read_spec(config)


def test_unreadable_config_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: not found"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        read_spec(tmp_path)


def reference_audio_tokens(n_samples):
    """The reference's mask arithmetic step by step, vectorised over clip lengths.

    Frames of 321 samples, 160 apart, over 160 zeros and the clip padded to a multiple of 128; a frame is valid where
    its last sample is one of the clip; two subsampling layers keep every second mask entry each.
    """
    n = np.asarray(n_samples)[:, None]
    padded = -(-n // 128) * 128
    end = np.arange(3000)[None] * 160 + 320  # last sample of a frame, the 160 zeros included
    exists = end < padded + 160
    valid = exists & (end - 160 < n)
    return valid[:, ::2][:, ::2].sum(axis=1)


def test_audio_tokens_of_every_length():
    """Every clip length from 161 to 480,000 samples."""
    ours = np.array([audio_soft_tokens(n) for n in range(161, MAX_AUDIO_SAMPLES + 1)])
    lengths = np.arange(161, MAX_AUDIO_SAMPLES + 1)
    # The counts change only where a length passes a multiple of 160: between, both sides are one number.
    block = (lengths - 1) // 160
    first = np.flatnonzero(np.diff(block, prepend=0))
    last = np.append(first[1:] - 1, len(lengths) - 1)
    for at in (first, last, (first + last) // 2):
        expected = np.concatenate([reference_audio_tokens(lengths[part]) for part in np.array_split(at, 8)])
        assert np.array_equal(ours[at], expected)
    assert all(np.array_equal(ours[a : b + 1], np.full(b + 1 - a, ours[a])) for a, b in zip(first, last, strict=True))
    assert ours[-1] == 750 and ours[0] == 1


def test_audio_tokens_of_sampled_lengths_through_the_feature_extractor():
    """The formula above, and ours, against transformers' feature extractor and processor arithmetic themselves."""
    from transformers import Gemma4AudioFeatureExtractor

    extractor = Gemma4AudioFeatureExtractor()
    rng = np.random.default_rng(0)
    lengths = [161, 320, 321, 480, 799, 800, 801, 960, 961, *rng.integers(161, 60_000, 40).tolist(), 480_000, 500_000]
    for n in lengths:
        out = extractor([rng.standard_normal(n).astype(np.float32) * 0.1])
        mask = np.asarray(out["input_features_mask"][0])
        assert mask[::2][::2].sum() == audio_soft_tokens(n) == reference_audio_tokens([min(n, 480_000)])[0], n


@pytest.mark.parametrize("n", [0, 1, 160])
def test_clips_too_short_have_no_tokens(n):
    assert audio_soft_tokens(n) == 0


@pytest.mark.parametrize("budget", IMAGE_BUDGETS)
def test_image_sizes(budget):
    """2,000 random sizes, thin and tiny ones among them, against transformers' resize rule."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    rng = np.random.default_rng(budget)
    sizes = np.exp(rng.uniform(0, np.log(6000), (2000, 2))).astype(int)
    sizes[:50, 0] = 1
    sizes[50:100, 1] = rng.integers(1, 5, 50)
    for height, width in sizes.tolist():
        expected = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        assert image_size(height, width, budget) == expected, (height, width)
        patches = (expected[0] // 16) * (expected[1] // 16)
        assert image_soft_tokens(height, width, budget) == patches // 9 <= budget


def test_image_without_pixels_is_refused():
    with pytest.raises(InputError, match="picture of 0x7"):
        image_size(7, 0)


def test_image_example_sizes():
    assert image_size(500, 500) == (768, 768) and image_soft_tokens(500, 500) == 256
    assert image_size(1080, 1920) == (576, 1056) and image_soft_tokens(1080, 1920) == 264
