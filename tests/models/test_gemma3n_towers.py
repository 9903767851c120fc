"""Gemma 3n's towers, part by part, against timm and transformers, float32, every weight random."""

import mlx.core as mx
import numpy as np
import pytest
import tiny_gemma3n as tiny3n
import torch

from gemma_mlx.errors import InputError
from gemma_mlx.models.gemma3n.audio import AudioTower, CumulativeGroupNorm
from gemma_mlx.models.gemma3n.vision import same_padding
from gemma_mlx.models.load import load_model
from gemma_mlx.spec_gemma3n import Gemma3nAudioSpec

pytest.importorskip("timm")
STAGES = ("stem", "stage 0", "stage 1", "stage 2", "stage 3", "fusion")
SHARE = 1e-5  # ‖a − b‖ / ‖b‖ of one stage fed the reference's own input


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("towers3n")
    return tiny3n.make(folder, seed=0).model, load_model(folder).model


def their_stages(tower, pixels):
    with torch.no_grad():
        outputs = [tower.conv_stem(torch.tensor(pixels))]
        for stage in tower.blocks:
            outputs.append(stage(outputs[-1]))
        outputs.append(tower.msfa(outputs[-2:]))
    return [o.permute(0, 2, 3, 1).numpy() for o in outputs]


def relative(a, b):
    return float(np.linalg.norm(np.array(a) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("size", [(256, 256), (256, 512)])
def test_each_vision_stage(pair, size):
    """Every stage on the reference's input to it, square and not; then the whole tower."""
    theirs, ours = pair[0].vision_tower.timm_model, pair[1].vision_tower.timm_model
    pixels = np.random.default_rng(0).random((1, 3, *size)).astype(np.float32)
    expected = their_stages(theirs, pixels)
    x = mx.array(pixels).transpose(0, 2, 3, 1)
    found = [ours.conv_stem(x)]
    for stage, before in zip(ours.blocks, expected, strict=False):
        y = mx.array(before)
        for block in stage:
            y = block(y)
        found.append(y)
    found.append(ours.msfa(mx.array(expected[-3]), mx.array(expected[-2])))
    for name, a, b in zip(STAGES, found, expected, strict=True):
        print(f"{size} {name} {b.shape}: {relative(a, b):.1e}")
        assert a.shape == b.shape and relative(a, b) <= SHARE, name
    moved = their_stages(theirs, (pixels + 1e-7 * np.random.default_rng(1).standard_normal(pixels.shape)).astype("f"))
    whole, floor = relative(ours(x), expected[-1]), relative(moved[-1], expected[-1])
    print(f"{size} whole tower: {whole:.1e}, floor {floor:.1e}")
    assert whole <= 2e-4 and whole <= 10 * max(floor, 2e-5)


@pytest.mark.parametrize("size", [(96, 96), (97, 130), (64, 33)])
def test_stages_of_odd_sizes(pair, size):
    """Sizes that leave halves, up to the third stage: the padding that "same" convolutions need is uneven."""
    theirs, ours = pair[0].vision_tower.timm_model, pair[1].vision_tower.timm_model
    pixels = np.random.default_rng(2).random((2, 3, *size)).astype(np.float32)
    with torch.no_grad():
        y = theirs.blocks[:3](theirs.conv_stem(torch.tensor(pixels))).permute(0, 2, 3, 1).numpy()
    assert relative(ours.stages(mx.array(pixels).transpose(0, 2, 3, 1))[3], y) <= 1e-4


def test_pictures_of_no_whole_grid_are_refused(pair):
    with pytest.raises(InputError, match="multiples of 256"):
        pair[1].vision_tower(mx.zeros((1, 3, 96, 96)))


def test_same_padding():
    assert [same_padding(*a) for a in ((8, 3, 2), (8, 5, 2), (7, 3, 2), (9, 5, 1))] == [(0, 1), (1, 2), (1, 1), (2, 2)]


def test_image_soft_tokens(pair):
    theirs, ours = pair
    pixels = np.random.default_rng(3).random((2, 3, 256, 256)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.get_image_features(torch.tensor(pixels), return_dict=True).pooler_output.numpy()
    assert relative(ours.soft_tokens("image", pixels), expected.reshape(-1, expected.shape[-1])) <= 2e-4


@pytest.mark.parametrize("frames", [1, 7, 1499])
def test_cumulative_group_norm(frames):
    """With its relu, against the reference and its definition in float64, over as many steps as 30 seconds have."""
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioCumulativeGroupNorm

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, frames, 8, 4)) * 3 + 5).astype(np.float32)
    weight = (1 + 0.2 * rng.standard_normal(4)).astype(np.float32)
    theirs, ours = Gemma3nAudioCumulativeGroupNorm(4, (8,), 1e-3), CumulativeGroupNorm(4, 1e-3)
    theirs.weight.data, ours.weight = torch.tensor(weight), mx.array(weight)
    with torch.no_grad():
        expected = torch.relu(theirs(torch.tensor(x))).numpy()
    values, count = x.astype(np.float64), 32 * np.arange(1, frames + 1)[None, :, None, None]
    centred = values - np.cumsum(values.sum((2, 3), keepdims=True), 1) / count
    variance = np.cumsum((centred**2).sum((2, 3), keepdims=True), 1) / count
    exact = np.maximum(centred / np.sqrt(variance + 1e-3) * weight, 0)
    found = np.array(ours(mx.array(x)))
    print(f"{frames} steps: ours {np.abs(found - exact).max():.1e}, reference {np.abs(expected - exact).max():.1e}")
    assert np.abs(found - exact).max() <= 1e-5 and np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize("lens", [(80,), (1,), (13, 97, 64), (203, 210)])
def test_audio_tower(pair, lens):
    """States and validity of clips past the window of 13, alone and padded."""
    theirs, ours = pair[0].audio_tower, pair[1].audio_tower
    features, mask = tiny3n.audio_inputs(lens)
    features = features - 11.5 * ~mask[..., None]  # padding is not zero: it holds the log floor
    with torch.no_grad():
        out = theirs(torch.tensor(features), ~torch.tensor(mask), return_dict=True)
    states, valid = ours(mx.array(features), mx.array(mask))
    assert np.array_equal(np.array(valid), ~out.audio_mel_mask.numpy())
    assert relative(states, out.last_hidden_state.numpy()) <= 1e-5


def test_a_window_of_13_keys(pair):
    """A frame 12 before is heard by attention, one 13 before is not."""
    attention = pair[1].audio_tower.conformer[0].attention.attn
    x, valid = mx.random.normal((1, 40, 32)), mx.ones((1, 40), mx.bool_)
    base = np.array(attention(x, valid))
    moved = np.array(attention(x + 0.1 * (mx.arange(40) == 20)[None, :, None], valid))
    changed = np.abs(moved - base).max(axis=(0, 2)) > 0
    assert np.flatnonzero(changed).tolist() == list(range(20, 33))


def test_thirty_seconds_fill_the_slots():
    """2,997 frames become 188 vectors; with the published widths' hidden size replaced by a small one."""
    spec = Gemma3nAudioSpec(hidden_size=16, conf_num_hidden_layers=1, conf_num_attention_heads=2,
                            sscp_conv_channel_size=(4, 4))  # fmt: skip
    states, valid = AudioTower(spec)(mx.zeros((1, 2997, 128)), mx.ones((1, 2997), mx.bool_))
    assert states.shape == (1, 188, 16) and valid.all().item() and spec.tokens_each == 188
