"""Both families' whole audio towers with emulated kernels equal those without: soft tokens and every gradient.

Within 1e-4 in float32: of the largest soft token, and of ‖gradient‖ for each tensor. Clips longer than the attention's
window, a shorter one in the same batch, odd lengths.
"""

import mlx.core as mx
import pytest
import tiny
import tiny_gemma3n
from test_vision_towers import compare, randomised

from gemma_mlx.models.gemma3n.audio import AudioTower as ConformerTower
from gemma_mlx.models.gemma4.audio import AudioTower
from gemma_mlx.spec import AudioSpec
from gemma_mlx.spec_gemma3n import Gemma3nAudioSpec

ATTENTION = {"banded_attention", "banded_attention_backward", "banded_attention_relative"}
CONVOLUTION = {"glu_conv", "glu_conv_backward", "glu_conv_weights"}
SUBSAMPLING = {
    "gemma4": {"norm_relu", "norm_relu_backward", "norm_relu_weight", "clamp", "clamp_backward"},
    "gemma3n": {
        "cumulative_norm_stats", "cumulative_norm_scan", "cumulative_norm", "cumulative_norm_pulls",
        "cumulative_norm_unscan", "cumulative_norm_backward", "cumulative_norm_weight",
    },
}  # fmt: skip


@pytest.mark.parametrize("lens", [(101, 61), (67,)])
def test_gemma4(lens):
    tower = randomised(AudioTower(AudioSpec(**tiny.AUDIO)))
    features, mask, _ = tiny.audio_inputs(lens)
    kernels = ATTENTION | CONVOLUTION | SUBSAMPLING["gemma4"]
    compare(tower, lambda: [tower(mx.array(features), mask)], kernels)


@pytest.mark.parametrize("lens", [(80, 61), (67,)])
def test_gemma3n(lens):
    names = Gemma3nAudioSpec.__dataclass_fields__
    tower = randomised(ConformerTower(Gemma3nAudioSpec(**{k: v for k, v in tiny_gemma3n.AUDIO.items() if k in names})))
    features, mask = tiny_gemma3n.audio_inputs(lens)
    kernels = ATTENTION | CONVOLUTION | SUBSAMPLING["gemma3n"]
    compare(tower, lambda: [tower(mx.array(features), mx.array(mask))[0]], kernels)
