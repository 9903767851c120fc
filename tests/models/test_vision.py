"""The vision tower against transformers' Gemma4VisionModel, every weight and buffer random, float32."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import tiny
import torch
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.models.gemma4.vision import VisionTower, soft_token_index

TOLERANCE = 2e-4  # absolute, soft tokens of scale sqrt(32) ≈ 6


@pytest.fixture(scope="module")
def pair():
    theirs, spec = reference.vision()
    ours = VisionTower(spec)
    reference.copy_weights(theirs, ours)
    return theirs, ours


def run_theirs(theirs, pixels, positions):
    with torch.no_grad():
        return theirs(torch.tensor(pixels), torch.tensor(positions)).last_hidden_state.numpy()


@pytest.mark.parametrize(
    ("grids", "patches"),
    [
        (((6, 6),), 36),
        (((6, 6), (9, 3)), 54),
        (((3, 12), (3, 3), (15, 6)), 90),
        (((9, 6), (6, 9), (3, 3), (12, 12)), 144),
        (((3, 3),), 630),  # the budget of 70 soft tokens, nearly all of it padding
        (((30, 21), (33, 18)), 630),
        (((30, 42), (60, 21)), 1260),  # 140
        (((60, 42), (9, 30)), 2520),  # 280
    ],
)
def test_soft_tokens(pair, grids, patches):
    theirs, ours = pair
    pixels, positions, counts = tiny.image_inputs(grids, patches, seed=len(grids))
    expected = run_theirs(theirs, pixels, positions)
    got = np.array(ours(pixels, positions.astype(np.int32)))
    assert got.shape == expected.shape == (sum(counts), 32)
    assert np.abs(got - expected).max() <= TOLERANCE
    assert np.abs(expected).mean() > 1  # the tolerance means something


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(63, 78), (63, 63), (63, 159)])
def test_largest_budgets(grid):
    """560 and 1,120 soft tokens, in one layer of one head: the reference needs 0.4 GB for each score matrix."""
    sizes = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, position_embedding_size=160)
    theirs, spec = reference.vision(**sizes)
    ours = VisionTower(spec)
    reference.copy_weights(theirs, ours)
    pixels, positions, counts = tiny.image_inputs((grid,), 5040 if grid[1] < 100 else 10080)
    expected = run_theirs(theirs, pixels, positions)
    assert np.abs(np.array(ours(pixels, positions)) - expected).max() <= TOLERANCE
    assert len(expected) == counts[0]


def test_clips_cut(pair):
    """The comparison above goes through active clips: some values are cut at both ends of a linear."""
    theirs, _ = pair
    pixels, positions, _ = tiny.image_inputs(((6, 6), (9, 3)), 54)
    inputs, outputs = reference.truncated(theirs, lambda: run_theirs(theirs, pixels, positions))
    assert inputs > 1e-3 and outputs > 1e-3


@pytest.mark.parametrize(("clipped", "standardize", "kv_heads"), [(False, True, 2), (True, True, 1), (False, False, 1)])
def test_other_configurations(clipped, standardize, kv_heads):
    theirs, spec = reference.vision(
        3, use_clipped_linears=clipped, standardize=standardize, num_key_value_heads=kv_heads, patch_size=2
    )
    ours = VisionTower(spec)
    reference.copy_weights(theirs, ours)
    pixels, positions, _ = tiny.image_inputs(((6, 9), (3, 3)), 54, patch=2)
    expected = run_theirs(theirs, pixels, positions)
    assert np.abs(np.array(ours(pixels, positions)) - expected).max() <= TOLERANCE


def test_padding_and_order_of_patches_change_nothing(pair):
    _, ours = pair
    pixels, positions, _ = tiny.image_inputs(((6, 6), (9, 3)), 36)
    alone = np.array(ours(pixels, positions))
    padded, padded_positions, _ = tiny.image_inputs(((6, 6), (9, 3)), 50)  # 50: not even whole cells
    padded[:, :36] = pixels
    assert np.abs(np.array(ours(padded, padded_positions)) - alone).max() <= 2e-5
    order = np.random.default_rng(0).permutation(36)
    assert np.abs(np.array(ours(pixels[:, order], positions[:, order])) - alone).max() <= 2e-5


def gradients(ours, pixels, positions, weight):
    """d Σ weight · soft tokens of all inputs and parameters."""

    def loss(parameters, pixels):
        ours.update(parameters)
        return (ours(pixels, positions) * weight).sum()

    return mx.grad(loss, argnums=(0, 1))(ours.parameters(), mx.array(pixels))


def test_gradients(pair):
    theirs, ours = pair
    pixels, positions, counts = tiny.image_inputs(((9, 3), (6, 6)), 54)
    weight = np.random.default_rng(0).standard_normal((sum(counts), 32)).astype(np.float32)
    x = torch.tensor(pixels, requires_grad=True)
    theirs.zero_grad()
    (theirs(x, torch.tensor(positions)).last_hidden_state * torch.tensor(weight)).sum().backward()
    by_name, by_pixel = gradients(ours, pixels, positions, mx.array(weight))
    expected = {n: reference.to_mlx(n, p.grad) for n, p in theirs.named_parameters()} | {"pixels": x.grad.numpy()}
    got = dict(tree_flatten(by_name)) | {"pixels": by_pixel}
    for name, value in expected.items():
        a, b = np.array(got[name]), np.array(value)
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), name


def test_pictures_of_padding_only_give_no_nan(pair):
    _, ours = pair
    pixels, positions, _ = tiny.image_inputs(((6, 6), (3, 3), (3, 3)), 36)
    alone = np.array(ours(pixels[[0, 2]], positions[[0, 2]]))
    pixels[1], positions[1] = 0, -1
    assert np.abs(np.array(ours(pixels, positions)) - alone).max() <= 2e-5
    for _, value in tree_flatten(gradients(ours, pixels, positions, 1.0)):
        assert bool(mx.isfinite(value).all())
    only = np.full((2, 36, 2), -1, np.int32)
    assert ours(np.zeros((2, 36, 48), np.float32), only).shape == (0, 32)


def test_traced_with_the_index_given(pair):
    """Nothing but the index needs concrete values. (Left unevaluated: compiling for a CPU takes 20 s.)"""
    _, ours = pair
    pixels, positions, _ = tiny.image_inputs(((6, 6), (9, 3)), 54)
    index = mx.array(soft_token_index(positions, 3))
    compiled = mx.compile(lambda *inputs: ours(*inputs))
    assert compiled(mx.array(pixels), mx.array(positions), index).shape == (7, 32)


def test_bfloat16(pair):
    """Half precision stays half precision, and near the float32 result."""
    theirs, ours = pair
    half = VisionTower(reference.vision()[1])
    reference.copy_weights(theirs, half)
    half.set_dtype(mx.bfloat16)
    pixels, positions, _ = tiny.image_inputs(((6, 6), (9, 3)), 54)
    got, full = half(pixels, positions), ours(pixels, positions)
    assert got.dtype == mx.bfloat16
    assert float(mx.linalg.norm(got.astype(mx.float32) - full) / mx.linalg.norm(full)) < 0.05


def test_buffers_never_train(pair):
    _, spec = reference.vision(standardize=True)
    ours = VisionTower(spec)
    ours.unfreeze()
    trainable = {n.rsplit(".", 1)[-1] for n, _ in tree_flatten(ours.trainable_parameters())}
    assert trainable == {"weight", "position_embedding_table"}


def test_patches_that_do_not_fill_cells():
    _, positions, _ = tiny.image_inputs(((6, 6), (4, 3)), 36)
    with pytest.raises(InputError, match=r"image_position_ids\[1\].*4 × 3"):
        soft_token_index(positions, 3)


def test_linears_lie_under_linear(pair):
    """Adapters replace `.linear`, inside the clips."""
    _, ours = pair
    linears = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 1 + 2 * 7
    assert all(n.endswith(".linear") for n in linears if n != "patch_embedder.input_proj")
