"""What Gemma 4 12B reads: frames of raw samples without a limit, merged patches."""

import json

import numpy as np
import pytest
import soundfile
import tiny

from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn
from gemma_mlx.data.features import image_patches, raw_frames
from gemma_mlx.data.media import load_image
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.spec import read_spec


@pytest.fixture(scope="module")
def processor(checkpoint, tmp_path_factory):
    """The small checkpoint's tokenizer and template with a config of 12B's kind and real media sizes."""
    folder = tmp_path_factory.mktemp("unified")
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for name in ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "enable_moe_block", "num_experts"):
        config["text_config"].pop(name, None)
    config |= {"model_type": "gemma4_unified", "audio_config": {}, "vision_config": {"mm_embed_dim": 48}}
    config["text_config"] |= {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    (folder / "config.json").write_text(json.dumps(config))
    return Processor(folder, image_tokens=70)


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 20_001])
def test_raw_frames_and_token_counts(processor, samples):
    from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    expected = Gemma4UnifiedAudioFeatureExtractor()([wave], return_tensors="np")
    assert np.array_equal(raw_frames(wave), expected["input_features"][0])
    assert processor.spec.audio.soft_tokens(samples) == expected["input_features_mask"].sum()


def patches_merged(patches, positions):
    """transformers' merging, in numpy: 3 × 3 patches of 16 × 16 × 3 as one block of rows, positions of the cells."""
    width, height = positions.max(0) + 1
    grid = patches.reshape(height // 3, 3, width // 3, 3, 16, 16, 3)
    merged = grid.transpose(0, 2, 1, 4, 3, 5, 6).reshape(-1, 48 * 48 * 3)
    y, x = np.divmod(np.arange(len(merged)), width // 3)
    return merged, np.stack([x, y], -1)


@pytest.mark.parametrize("name", ["tall.png", "wide.png"])
def test_merged_patches(processor, media, name):
    """The patches of the other sizes, merged; and transformers' own processor where torchvision is there."""
    image = load_image(media / name)
    single, merged = image_patches(image, 70), image_patches(image, 70, 48, 1)
    pixels, positions = patches_merged(single.pixels, single.positions)
    assert np.array_equal(merged.pixels, pixels) and np.array_equal(merged.positions, positions)
    assert merged.soft_tokens == single.soft_tokens == len(pixels)
    try:
        from transformers.models.gemma4_unified.image_processing_gemma4_unified import patches_merge
    except Exception:
        return
    import torch

    theirs, places = patches_merge(
        torch.tensor(single.pixels)[None].float(), torch.tensor(single.positions)[None], len(pixels)
    )
    assert np.array_equal(theirs[0].numpy(), pixels) and np.array_equal(places[0].numpy(), positions)


def test_sample_and_batch(processor, media, tmp_path):
    """Slots, features and types of a row with both; a minute of sound is taken whole."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "minute.wav", (0.1 * rng.standard_normal(16_000 * 60)).astype(np.float32), 16_000)
    question = (Image(media / "wide.png"), Text("What?"), Audio(tmp_path / "minute.wav"))
    example = Example((Turn("user", question), Turn("model", (Text("the sun"),))), "here")
    sample, light = processor.sample(example), processor.sample(example, with_features=False)
    assert np.array_equal(sample.input_ids, light.input_ids)
    assert (sample.token_types == 3).sum() == 1500 and (sample.token_types == 1).sum() == sample.images[0].soft_tokens
    short = Example((Turn("user", (Audio(media / "short.wav"),)), Turn("model", (Text("fox"),))), "there")
    batch = collate([sample, processor.sample(short)], pad_id=0, pad_to_multiple=8)
    assert batch.input_features.shape == (2, 1504, 640)
    assert batch.input_features_mask.sum(1).tolist() == [1500, 8]  # 5,003 samples
    assert batch.pixel_values.shape[2] == 6912


def test_config_of_its_kind(tmp_path):
    """Defaults that differ from the other sizes; keys nobody knows are warnings here too."""
    tiny.make_unified(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = read_spec(config)
    assert spec.unified and spec.text.hidden_size_per_layer_input == 0 and spec.text.bidirectional_vision
    assert (spec.vision.input_patch, spec.vision.input_pooling, spec.audio.soft_tokens(81)) == (12, 1, 3)
    config["text_config"]["use_bidirectional_attention"] = None
    assert not read_spec(config).text.bidirectional_vision
    config["audio_config"]["flavour"] = 1
    with pytest.warns(UserWarning, match="flavour"):
        read_spec(config)
    with pytest.raises(InputError, match="model_type is 'gemma5'"):
        read_spec({**config, "model_type": "gemma5"})
