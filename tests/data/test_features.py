"""Log-mel frames and patches against transformers' extractors, bit for bit where they can be."""

import numpy as np
import pytest
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from gemma_mlx.batch import unit_range
from gemma_mlx.data.features import image_patches, log_mel
from gemma_mlx.errors import InputError
from gemma_mlx.spec import IMAGE_BUDGETS, audio_soft_tokens, image_soft_tokens


def test_mel_of_a_known_signal():
    """Values of transformers 5.23 on a chirp, 130 frames with the batch's padding."""
    t = np.arange(20_837) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * (300 + 900 * t) * t)
    wave += 0.05 * np.sin(2 * np.pi * 3100 * t)
    mel = np.zeros((130, 128))
    frames = log_mel(wave.astype(np.float32))
    mel[: len(frames)] = frames
    assert mel.mean() == pytest.approx(-4.027813, abs=1e-5) and mel.std() == pytest.approx(3.006131, abs=1e-5)
    assert mel.max() == pytest.approx(3.3834362, abs=1e-5) and mel[50, 64] == pytest.approx(-5.387718, abs=1e-5)
    assert mel[10, :4] == pytest.approx([-6.9077554, -2.3180413, -3.4811172, -2.6824894], abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_mel_equals_the_reference(seed):
    """Batches of odd lengths, the shorter first; silence, noise, tones and clipped samples; 1e-5 on every value."""
    rng = np.random.default_rng(seed)
    lengths = [161, 320, 321, 480, *rng.integers(400, 60_000, 4).tolist()]
    waves = [(rng.standard_normal(n) * rng.choice([0, 1e-4, 0.1, 2.0])).astype(np.float32) for n in lengths]
    waves[-1] += np.sin(np.arange(lengths[-1])).astype(np.float32)
    out = Gemma4AudioFeatureExtractor()(waves)
    for wave, expected, mask in zip(waves, out["input_features"], out["input_features_mask"], strict=True):
        found = log_mel(wave)
        assert found.dtype == np.float32 and len(found) == mask.sum() and mask[: len(found)].all()
        assert np.abs(found - expected[mask]).max() <= 1e-5
        assert not expected[~mask].any()  # what a batch pads with
        assert audio_soft_tokens(len(wave)) == -(-len(found) // 4)


@pytest.mark.parametrize("seconds", [0.02, 1.92, 1.93, 4.7, 15.0])
def test_mel_is_the_reference_s_to_the_last_bit(seconds):
    """Speech-like loudness, in stretches of frames that end inside, at and behind a border."""
    rng = np.random.default_rng(int(100 * seconds))
    n = int(seconds * 16_000) + 1
    wave = rng.standard_normal(n) * np.clip(np.sin(np.arange(n) / 900), 0, None) * 0.2
    wave = (wave + 0.001 * rng.standard_normal(n)).astype(np.float32)
    out = Gemma4AudioFeatureExtractor()([wave])
    found, expected = log_mel(wave), out["input_features"][0][out["input_features_mask"][0]]
    assert np.abs(found - expected).max() <= 5e-7  # float64 sums in another order, rounded once
    assert (found == expected).mean() >= 0.9999


def test_bands_are_the_matrix_product():
    from gemma_mlx.data.features import mel_filters
    from gemma_mlx.data.mel import Bands

    spectrum = np.random.default_rng(2).exponential(size=(257, 5)).astype(np.float32)
    found = Bands(mel_filters())(spectrum)
    assert found.dtype == np.float64 and not found[0].any()  # the first filter is empty
    assert np.abs(found - mel_filters().T @ spectrum).max() <= 1e-12


def test_mel_of_30_seconds_and_more():
    wave = np.random.default_rng(0).standard_normal(500_000).astype(np.float32)
    out = Gemma4AudioFeatureExtractor()([wave])
    found = log_mel(wave)
    assert found.shape == (2999, 128)
    assert np.abs(found - out["input_features"][0][out["input_features_mask"][0]]).max() <= 1e-5


@pytest.mark.parametrize("wave", [np.zeros(1000, np.int16), np.zeros((2, 1000), np.float32), np.zeros(1000)])
def test_wrong_sample_format(wave):
    with pytest.raises(InputError, match="wrong sample format"):
        log_mel(wave)


@pytest.mark.parametrize("samples", [0, 160])
def test_empty_audio(samples):
    with pytest.raises(InputError, match="empty audio"):
        log_mel(np.zeros(samples, np.float32))


@pytest.mark.parametrize("budget", IMAGE_BUDGETS)
def test_patches_equal_the_reference(budget):
    """Random sizes, enlarged and reduced, long and narrow: 1/255 on at least 99.9 % of the values (found: on all)."""
    rng = np.random.default_rng(budget)
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    sizes = [*rng.integers(8, 700, (4, 2)).tolist(), [3000, 20], [16, 900], [48, 48], [5, 7]]
    for height, width in sizes:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[: height // 2] = rng.integers(0, 256, 3)
        expected = processor(image, return_tensors="np")
        found = image_patches(image, budget)
        n = len(found.pixels)
        close = np.abs(unit_range(found.pixels) - expected["pixel_values"][0, :n]) <= 1 / 255
        assert close.mean() >= 0.999, (height, width)
        assert np.array_equal(found.positions, expected["image_position_ids"][0, :n])
        assert (expected["image_position_ids"][0, n:] == -1).all() and not expected["pixel_values"][0, n:].any()
        assert found.soft_tokens == expected["num_soft_tokens_per_image"][0] == image_soft_tokens(height, width, budget)


def test_an_image_of_the_target_size_is_not_resampled():
    image = np.random.default_rng(0).integers(0, 256, (768, 768, 3), dtype=np.uint8)
    patches = image_patches(image, 280)
    assert np.array_equal(patches.pixels[1].reshape(16, 16, 3), image[:16, 16:32])
    assert patches.positions[1].tolist() == [1, 0] and patches.positions[48].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3)])
def test_zero_size_image(shape):
    with pytest.raises(InputError, match="zero-size image"):
        image_patches(np.zeros(shape, np.uint8))


def test_image_of_another_format():
    with pytest.raises(InputError, match="expected uint8"):
        image_patches(np.zeros((9, 9), np.uint8))


def test_a_picture_s_digest_is_that_of_its_pixels_and_their_places():
    r = np.random.default_rng(0)
    pictures = [r.integers(0, 256, (48 * a, 48 * b, 3), dtype=np.uint8) for a, b in ((1, 2), (2, 1), (1, 2))]
    pictures[1] = np.zeros_like(pictures[1])
    flat = [image_patches(p) for p in (*pictures, np.zeros((48, 96, 3), np.uint8), pictures[0].copy())]
    digests = [patches.digest() for patches in flat]
    assert digests[0] == digests[4] and len(set(digests[:4])) == 4
