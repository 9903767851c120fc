"""Both families' whole vision towers with emulated kernels equal those without: soft tokens and every gradient.

Within 1e-4 in float32: of the largest soft token, and of ‖gradient‖ for each tensor.
"""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from metal.emulator import Emulator
from mlx.utils import tree_flatten, tree_map_with_path

from gemma_mlx.models.gemma3n import vision
from gemma_mlx.models.gemma3n.vision import VisionTower as MobileTower
from gemma_mlx.models.gemma4.vision import VisionTower
from gemma_mlx.ops import dispatch
from gemma_mlx.spec import VisionSpec
from gemma_mlx.spec_gemma3n import Gemma3nVisionSpec

BOUND = 1e-4
SHARED = {"norm_residual", "norm_residual_backward", "norm_residual_weight"}
ATTENTION = {"flash_matrix", "flash_matrix_queries", "flash_matrix_keys"}
HEADS = {
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_weights",
    "gated_gelu",
    "gated_gelu_backward",
    "vision_pool",
    "patch_positions",
}
PIXELS = {"norm_gelu", "norm_gelu_backward", "norm_gelu_weight"} | {
    "depthwise_conv", "depthwise_conv_backward", "depthwise_conv_weight"
}  # fmt: skip


def randomised(tower, seed=0):
    """Weights near 1 on norms, wide clips, values of scale 1 elsewhere."""
    random = np.random.default_rng(seed)

    def value(path, array):
        made = random.standard_normal(array.shape)
        leaf = path.rsplit(".", 1)[-1]
        if leaf.endswith(("_min", "_max")):
            made = (-2.5 if leaf.endswith("_min") else 2.5) + 0.2 * made
        elif leaf == "gamma":
            made = 0.3 + 0.1 * made
        elif array.ndim == 1 and leaf != "bias":
            made = (1 + 0.2 * made) * (array.size**-0.5 if "q_norm" in path else 1)
        elif array.ndim > 1 and "table" not in path:
            made /= np.sqrt(np.prod(array.shape[1:]))
        return mx.array(made.astype(np.float32))

    tower.update(tree_map_with_path(value, tower.parameters()))
    return tower


def both(tower, run):
    """Soft tokens and the gradients of all weights for random cotangents."""

    def loss(weights):
        tower.update(weights)
        out = run()
        return sum((mx.random.normal(a.shape, key=mx.random.key(i)) * a).sum() for i, a in enumerate(out)), out

    (_, out), gradients = mx.value_and_grad(loss)(tower.trainable_parameters())
    gradients = dict(tree_flatten(gradients))
    mx.eval(out, gradients)
    return [np.array(a) for a in out], {name: np.array(a) for name, a in gradients.items()}


def compare(tower, run, kernels):
    plain, plain_gradients = both(tower, run)
    with dispatch.using(Emulator()) as emulator:
        ours, gradients = both(tower, run)
    assert {record.kernel for record in emulator.records} >= kernels
    for a, b in zip(ours, plain, strict=True):
        assert np.abs(b).max() > 0.1 and np.abs(a - b).max() <= BOUND * np.abs(b).max()
    norms = {name: (np.linalg.norm(a - plain_gradients[name]), np.linalg.norm(a)) for name, a in gradients.items()}
    print(f"{len(emulator.records)} launches; worst gradient {max(a / b for a, b in norms.values() if b):.1e}")
    for name, (away, norm) in norms.items():
        assert away <= BOUND * norm, name
    return norms


@pytest.mark.parametrize(("kv_heads", "standardize"), [(2, False), (1, True)])
def test_gemma4(kv_heads, standardize):
    """Two pictures, one shorter, and one of padding only."""
    config = {**tiny.VISION, "num_key_value_heads": kv_heads, "standardize": standardize}
    tower = randomised(VisionTower(VisionSpec(**config)))
    pixels, positions, _ = tiny.image_inputs(((9, 3), (6, 6), (3, 3)), 40)
    pixels[2], positions[2] = 0, -1
    compare(tower, lambda: [tower(mx.array(pixels.astype(np.float32)), positions)], SHARED | ATTENTION | HEADS)


def test_a_tower_that_does_not_train_keeps_the_attention_of_mlx():
    tower = randomised(VisionTower(VisionSpec(**tiny.VISION)))
    tower.freeze()
    pixels, positions, _ = tiny.image_inputs(((6, 6),), 36)
    with dispatch.using(Emulator()) as emulator:
        mx.eval(tower(mx.array(pixels.astype(np.float32)), positions))
    ran = {record.kernel for record in emulator.records}
    assert "qk_norm_rope" in ran and not ran & ATTENTION


def mobile():
    return randomised(MobileTower(Gemma3nVisionSpec(hidden_size=64, channel_multiplier=0.125)))


def test_a_block_of_each_kind_of_gemma3n(monkeypatch):
    """Every kernel and both attentions of all stages, in few blocks: each width is a compilation."""
    few = [
        [("er", 3, 2, 4, 64), ("er", 3, 1, 4, 64)],
        [("uir", 5, 3, 2, 1, 64), ("uir", 3, 0, 1, 1, 64)],
        [("uir", 0, 5, 2, 1, 64), ("mqa", 2, 16, 2, 64), ("uir", 0, 0, 1, 1, 64)],
        [("mqa", 2, 16, 1, 64)],
    ]
    monkeypatch.setattr(vision, "_blocks", lambda: few)
    tower = randomised(vision.MobileNetV5(Gemma3nVisionSpec(hidden_size=64, channel_multiplier=1)))
    pixels = mx.random.uniform(shape=(1, 48, 40, 3), key=mx.random.key(3))
    norms = compare(tower, lambda: tower.stages(pixels)[-1:], SHARED | ATTENTION | PIXELS)
    assert all((norm > 0) != name.startswith("msfa") for name, (_, norm) in norms.items())


@pytest.mark.slow
def test_gemma3n():
    tower = mobile()
    pixels = mx.random.uniform(shape=(1, 3, 256, 256), key=mx.random.key(3))
    compare(tower, lambda: [tower(pixels)], SHARED | ATTENTION | PIXELS)
