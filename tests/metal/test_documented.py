"""The kernels of MLX's documentation run unchanged, and give what torch gives in float64."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from metal.emulator import SCHEDULES, Emulator, Fault
from metal.inline import Inline, launch, only

from gemma_mlx.ops.kernel import Launch

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def text(name: str) -> str:
    return (Path(__file__).parent / "documented" / f"{name}.metal").read_text()


@every_schedule
def test_exp(schedule):
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float16)
    outputs = {"out": (x.shape, mx.float16)}
    made = launch(
        Emulator(schedule), text("exp"), {"inp": mx.array(x)}, outputs, (64, 1, 1), (256, 1, 1),
        template={"T": mx.float32},
    )  # fmt: skip
    assert np.allclose(np.array(only(made)), np.exp(x.astype(np.float64)), rtol=1e-3)


@every_schedule
def test_exp_of_strided(schedule):
    x = mx.array(np.random.default_rng(0).standard_normal((4, 16)).astype(np.float16))[::2]
    kernel = Inline("strided", ("inp",), ("out",), text=text("exp_strided"), strided=True)
    given = Launch(kernel, (x,), {"T": mx.float32}, (32, 1, 1), (256, 1, 1), (x.shape,), (mx.float16,))
    made = only(Emulator(schedule).run(given))
    assert np.allclose(np.array(made), np.exp(np.array(x).astype(np.float64)), rtol=1e-3)


def sampled(seed: int = 0, reach: float = 0.7):
    """x [2, 8, 6, 5] and places [2, 4, 3, 2] up to `reach` of the way to its border."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 8, 6, 5)).astype(np.float32)
    return x, random.uniform(-reach, reach, (2, 4, 3, 2)).astype(np.float32)


def exact(x, grid, cotangent):
    """Result and gradients of torch's bilinear grid_sample."""
    x, grid = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, grid))
    out = torch.nn.functional.grid_sample(x.permute(0, 3, 1, 2), grid, align_corners=False).permute(0, 2, 3, 1)
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return [a.detach().numpy() for a in (out, x.grad, grid.grad)]


def forward(emulator, x, grid):
    shape = (*grid.shape[:3], x.shape[3])
    made = launch(
        emulator, text("grid_sample"), {"x": mx.array(x), "grid": mx.array(grid)}, {"out": (shape, mx.float32)},
        (int(np.prod(shape)), 1, 1), (256, 1, 1), template={"T": mx.float32},
    )  # fmt: skip
    return only(made)


@every_schedule
def test_grid_sample(schedule):
    x, grid = sampled()
    found = np.array(forward(Emulator(schedule), x, grid))
    assert np.abs(found - exact(x, grid, np.ones_like(found))[0]).max() <= 1e-5


def test_grid_sample_reads_outside_at_the_border():
    """It loads before it masks, which a GPU forgives and the emulator does not."""
    x, grid = sampled()
    grid[0, 0, 0] = -1
    with pytest.raises(Fault, match="out-of-bounds"):
        forward(Emulator(), x, grid)


@every_schedule
def test_grid_sample_gradient(schedule):
    """Atomic sums in device memory, a SIMD sum, places beyond the border."""
    x, grid = sampled(reach=1.0)
    cotangent = np.random.default_rng(1).standard_normal((*grid.shape[:3], x.shape[3])).astype(np.float32)
    inputs = {"x": mx.array(x), "grid": mx.array(grid), "cotangent": mx.array(cotangent)}
    made = launch(
        Emulator(schedule), text("grid_sample_grad"), inputs,
        {"x_grad": (x.shape, mx.float32), "grid_grad": (grid.shape, mx.float32)},
        (int(np.prod(grid.shape[:3])) * 32, 1, 1), (256, 1, 1), template={"T": mx.float32}, init=0.0, atomic=True,
    )  # fmt: skip
    for ours, theirs in zip(made, exact(x, grid, cotangent)[1:], strict=True):
        assert np.abs(np.array(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()
