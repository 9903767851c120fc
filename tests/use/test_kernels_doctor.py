"""`doctor --kernels`: right and wrong kernels, the JSON, and machines on which none runs."""

import dataclasses
import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from metal.emulator import Emulator

from gemma_mlx import kernel_check
from gemma_mlx.cli.doctor import command
from gemma_mlx.errors import InputError
from gemma_mlx.ops import dispatch
from gemma_mlx.ops.registry import ops


@dataclasses.dataclass
class Off(Emulator):
    """A device whose results are off by a thousandth."""

    def run(self, launch):
        return [a * 1.001 if mx.issubdtype(a.dtype, mx.floating) else a for a in super().run(launch)]


@pytest.fixture
def two_ops(monkeypatch):
    """Two ops at a size that the emulator manages, timed once."""
    chosen = [op for op in ops() if op.name in ("gated_gelu", "norm_residual")]
    small = [dataclasses.replace(op, sizes=dict.fromkeys(("small", "real"), op.sizes["small"])) for op in chosen]
    monkeypatch.setattr(kernel_check, "ops", lambda: small)
    monkeypatch.setattr(kernel_check, "REPEATS", 1)
    monkeypatch.setattr(kernel_check, "CALLS", 1)


def doctor(*options):
    return CliRunner().invoke(command, ["--kernels", *options], standalone_mode=False)


def test_right_kernels(two_ops, tmp_path):
    with dispatch.using(Emulator()):
        ran = doctor("--out", str(tmp_path / "kernels.json"))
    assert ran.return_value == 0, ran.output
    assert "10 of 10 within tolerance" in ran.output and "WRONG" not in ran.output
    made = json.loads((tmp_path / "kernels.json").read_text())
    assert made["backend"] == "emulator" and made["mlx"] == mx.__version__
    assert {r["op"] for r in made["results"]} == {"gated_gelu", "norm_residual"}
    assert all(r["error"] < 2e-2 and r["moved"] > 0 for r in made["results"])
    assert all((r["seconds"] is None) == (r["size"] == "small") for r in made["results"])


def test_wrong_kernels(two_ops):
    """A thousandth is told in float32, and lies within bfloat16's rounding."""
    with dispatch.using(Off()):
        ran = doctor()
    assert ran.return_value == 1
    wrong = [line.split()[2] for line in ran.output.splitlines() if "WRONG" in line]
    assert wrong == ["float32"] * 4


def test_nan_is_wrong():
    assert kernel_check.difference(mx.array([1.0, float("nan")]), mx.array([1.0, 2.0])) == float("inf")


def test_where_no_kernel_runs(tmp_path):
    if dispatch.backend() is not None:
        pytest.skip("a GPU is at hand")
    with pytest.raises(InputError, match="kernels need a GPU, MLX with Metal or CUDA"):
        next(kernel_check.check_all())
    ran = doctor("--out", str(tmp_path / "kernels.json"))
    assert isinstance(ran.exception, InputError) and not list(tmp_path.iterdir())


def test_switched_off(monkeypatch):
    monkeypatch.setenv("GEMMA_MLX_KERNELS", "off")
    with dispatch.using(Emulator()), pytest.raises(InputError, match="GEMMA_MLX_KERNELS is off"):
        next(kernel_check.check_all())
