"""A whole training step with every kernel emulated, against the same step without: loss and each adapter's gradient.

Within 1e-4, float32: kernels round once where plain MLX rounds after each operation, and sum in another order.
"""

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


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_with_kernels_equals_one_without(name, tmp_path, record):
    MAKERS[name](tmp_path)
    model = adapted_model(tmp_path)
    step, batch = Step(model, 1.0, False), ragged(name)
    plain = gradients(step, batch)
    with dispatch.using(Emulator()) as emulator:
        emulated = gradients(step, batch)
    assert len({launch.kernel for launch in emulator.records}) >= KERNELS[name]
    assert all(np.isfinite(g).all() for g in emulated[1].values())
    assert abs(emulated[0] - plain[0]) <= BOUND * abs(plain[0])
    worst = furthest(emulated[1], plain[1])
    record("kernels emulated against plain MLX, gradients", name, worst)
    assert worst <= BOUND
