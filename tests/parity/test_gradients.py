"""Gradients of every adapter weight (decoder, both towers, embedders) against torch's autograd, float32."""

import dataclasses

import numpy as np
import pytest
from parity_cases import CASES, make_batch, relative_differences
from parity_pairs import noisy, our_gradients

from gemma_mlx.lora import GROUPS

BOUND = 1e-3  # ‖a − b‖ / ‖b‖ of each tensor


@pytest.mark.parametrize("case", CASES)
def test_gradients(adapted, case, judge):
    batch = make_batch(CASES[case])
    expected = adapted.theirs.run(batch)
    loss, gradients = our_gradients(adapted.ours, batch)
    assert abs(loss - expected.loss) <= 1e-5
    again = (adapted.theirs.run(b).gradients for b in noisy(adapted.theirs, batch))
    floor = max(max(relative_differences(g, expected.gradients).values()) for g in again)
    differences = relative_differences(gradients, expected.gradients)
    worst = max(differences, key=differences.get)
    judge(f"gradients {adapted.name}", f"{case}: {worst}", floor, differences[worst], BOUND, least=5e-5)


def test_every_group_has_gradients(adapted):
    """The comparison above is of something: a batch of everything moves both matrices of every adapter."""
    gradients = adapted.theirs.run(make_batch(CASES["everything"])).gradients
    for group, roots in GROUPS.items():
        assert any(root in path for path in gradients for root in roots), group
    assert all(np.linalg.norm(g) > 1e-7 for pair in gradients.values() for g in pair)


def test_padded_pictures_give_no_nan(adapted):
    """A picture in much padding, and one of padding only, give the gradients of the picture alone."""
    batch = make_batch(CASES["two images over a batch"])
    _, alone = our_gradients(adapted.ours, batch)
    wide = make_batch(CASES["two images over a batch"], patches=144)
    pixels = np.zeros((3, 144, wide.pixel_values.shape[-1]), np.float32)
    positions = np.full((3, 144, 2), -1, np.int32)
    pixels[[0, 2], :36], positions[[0, 2], :36] = batch.pixel_values, batch.image_position_ids
    wide = dataclasses.replace(wide, pixel_values=pixels, image_position_ids=positions)
    _, gradients = our_gradients(adapted.ours, wide)
    assert all(np.isfinite(g).all() for pair in gradients.values() for g in pair)
    assert max(relative_differences(gradients, alone).values()) <= BOUND
