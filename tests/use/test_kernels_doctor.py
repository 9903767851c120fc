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
from gemma_mlx.ops import dispatch, trust
from gemma_mlx.ops.registry import ops


@dataclasses.dataclass
class Off(Emulator):
    """A device whose results are off by a thousandth."""

    def run(self, launch):
        return [a * 1.001 if mx.issubdtype(a.dtype, mx.floating) else a for a in super().run(launch)]


class Refuses(Emulator):
    """A device whose compiler does not take one op."""

    def run(self, launch):
        if launch.kernel.name.startswith("gated_gelu"):
            raise RuntimeError("Unable to build metal library from source\nmore")
        return super().run(launch)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(trust, "cache_folder", lambda: folder)
    trust.trusted.cache_clear()
    yield folder
    trust.trusted.cache_clear()


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
    assert trust.tested() and not trust.trusted() - {"gated_gelu", "norm_residual"}
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
    assert not trust.trusted()
    wrong = [line.split()[2] for line in ran.output.splitlines() if "WRONG" in line]
    assert wrong == ["float32"] * 4


def test_a_kernel_that_fails_ends_its_own_test_only(two_ops, tmp_path):
    """The others are tested, and the JSON says what the device said."""
    with dispatch.using(Refuses()):
        ran = doctor("--out", str(tmp_path / "kernels.json"))
    assert ran.return_value == 1, ran.output
    assert ran.output.count("FAILS") == 5 and "5 of 10 within tolerance" in ran.output
    assert "  Unable to build metal library from source\n" in ran.output
    text = (tmp_path / "kernels.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)["results"]
    failed = [r for r in results if r["failure"]]
    assert {r["op"] for r in failed} == {"gated_gelu"} and all(r["failure"].endswith("more") for r in failed)
    assert {r["op"] for r in results if r["within"]} == {"norm_residual"} and "gated_gelu" not in trust.trusted()


def test_every_op_is_right():
    """At its small size in every dtype: what a Mac finds wrong is not the sizes' fault."""
    with dispatch.using(Emulator()):
        results = list(kernel_check.check_all(("small",)))
    assert {r.op for r in results} == {op.name for op in ops()} and len(results) == 3 * len(ops())
    assert not [r for r in results if not r.within]


def test_nan_is_wrong():
    assert kernel_check.difference(mx.array([1.0, float("nan")]), mx.array([1.0, 2.0])) == float("inf")


def test_where_no_kernel_runs(tmp_path):
    if dispatch.backend() is not None:
        pytest.skip("a GPU is at hand")
    with pytest.raises(InputError, match="kernels need a GPU, MLX with Metal or CUDA"):
        next(kernel_check.check_all())
    ran = doctor("--out", str(tmp_path / "kernels.json"))
    assert isinstance(ran.exception, InputError) and not list(tmp_path.rglob("*"))


def result(op, size, within, seconds=None, plain=None):
    return kernel_check.Result(op, size, "float32", 0.0, within, seconds, plain, 1)


def test_only_right_and_faster_kernels_are_trusted():
    results = [
        result("clamp", "small", True), result("clamp", "real", True, 1.0, 2.0),
        result("gated_gelu", "small", False), result("gated_gelu", "real", True, 1.0, 2.0),
        result("norm_gelu", "small", True), result("norm_gelu", "real", True, 3.0, 2.0),
        result("altup_correct", "small", True),
    ]  # fmt: skip
    assert kernel_check.faster(results) == ["clamp"]


def test_no_kernel_runs_before_the_self_test(monkeypatch):
    """On a GPU; a changed kernel has to be tested again."""
    monkeypatch.setattr(dispatch, "backend", dispatch.Metal)
    monkeypatch.delenv("GEMMA_MLX_KERNELS", raising=False)
    assert not dispatch.runs("clamp")
    trust.trust(["clamp"])
    assert dispatch.runs("clamp") and not dispatch.runs("gated_gelu")
    monkeypatch.setenv("GEMMA_MLX_KERNELS", "on")
    assert dispatch.runs("gated_gelu")
    monkeypatch.setenv("GEMMA_MLX_KERNELS", "gated_gelu")
    assert dispatch.runs("gated_gelu") and not dispatch.runs("clamp")
    monkeypatch.setenv("GEMMA_MLX_KERNELS", "auto")
    monkeypatch.setattr(trust, "_identity", lambda: "other")
    trust.trusted.cache_clear()
    assert not dispatch.runs("clamp")


def test_a_damaged_file_trusts_nothing(cache):
    trust.trust(["clamp"]).write_text("[")
    trust.trusted.cache_clear()
    assert trust.trusted() == frozenset()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("GEMMA_MLX_KERNELS", "off")
    with dispatch.using(Emulator()), pytest.raises(InputError, match="GEMMA_MLX_KERNELS is off"):
        next(kernel_check.check_all())
