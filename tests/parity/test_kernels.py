"""A whole training step with every kernel emulated equals the step without: logits, loss, each adapter's gradient.

Within 1e-4, float32: kernels round once where plain MLX rounds after each operation, and sum in another order.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest
import tiny
import tiny_gemma3n
from metal.emulator import Emulator
from parity_pairs import PATTERNS
from test_savings import adapted_model, furthest, gradients, ragged

from gemma_mlx.ops import dispatch
from gemma_mlx.step import Step

MAKERS = {"E2B": partial(tiny.make, **PATTERNS["E2B"]), "3n": partial(tiny_gemma3n.make, seed=1)}
BOUND = 1e-4
KERNELS = {"E2B": 8, "3n": 14}
"""Different kernels that take part, at least."""


def logits(model, batch) -> np.ndarray:
    """Of the positions that are no padding."""
    found = model(**batch.inputs())
    return np.array(found)[batch.attention_mask.astype(bool)]


def without_pictures(batch):
    """The batch with text for soft tokens of pictures.

    A relative change of 1e-7 in the pixels already moves this small 3n's logits by 6e-5 to 8e-5 of the largest, through
    84 random convolutions; its vision tower has a test of its own, tests/ops/test_vision_towers.py.
    """
    ids = np.where(batch.input_ids == tiny_gemma3n.IMG, 5, batch.input_ids)
    return dataclasses.replace(batch, input_ids=ids, pixel_values=None)


@pytest.mark.parametrize("name", ["E2B", pytest.param("3n", marks=pytest.mark.slow)])
def test_a_step_with_kernels_equals_one_without(name, tmp_path, record):
    MAKERS[name](tmp_path)
    model = adapted_model(tmp_path)
    step, batch = Step(model, 1.0, False), ragged(name)
    heard = without_pictures(batch) if name == "3n" else batch
    plain, plain_logits = gradients(step, batch), logits(model, heard)
    with dispatch.using(Emulator()) as emulator:
        emulated, emulated_logits = gradients(step, batch), logits(model, heard)
    away = np.abs(emulated_logits - plain_logits).max() / np.abs(plain_logits).max()
    record("kernels emulated against plain MLX, logits", name, away)
    assert away <= BOUND
    assert len({r.kernel for r in emulator.records}) >= KERNELS[name]
    assert all(np.isfinite(g).all() for g in emulated[1].values())
    assert abs(emulated[0] - plain[0]) <= BOUND * abs(plain[0])
    worst = furthest(emulated[1], plain[1])
    record("kernels emulated against plain MLX, gradients", name, worst)
    assert worst <= BOUND
