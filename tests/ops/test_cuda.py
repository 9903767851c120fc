"""Every kernel's CUDA form compiles, without a GPU; when one is taken is said by `dispatch`."""

import platform
import sys
from collections import defaultdict
from functools import cache

import mlx.core as mx
import pytest
from nvrtc import CompileError, compiled, identity, program

from gemma_mlx.kernel_counts import launches_of
from gemma_mlx.ops import dispatch
from gemma_mlx.ops.kernel import Kernel, Launch
from gemma_mlx.ops.registry import ops

ON_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(not ON_LINUX, reason="NVIDIA's compiler comes with the tests on Linux, x86-64")
ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
OPS = [op for op in ops() if all(kernel.cuda for kernel in op.kernels)]


@cache
def forms(sizes: tuple[str, ...]) -> dict[tuple, Launch]:
    """Every text that the ops' sizes ask for."""
    found = {}
    for op in OPS:
        for size in sizes:
            for dtype in DTYPES:
                forward, gradients = launches_of(op, size, dtype)
                found |= {identity(launch): launch for launch in (*forward, *gradients)}
    return found


def by_headers(launches) -> dict[tuple, list[Launch]]:
    groups = defaultdict(list)
    for launch in launches:
        groups[launch.kernel.headers].append(launch)
    return groups


def test_every_kernel_has_a_launch():
    launched = {launch.kernel.name for launch in forms(("small",)).values()}
    assert launched == {kernel.name for op in OPS for kernel in op.kernels}


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_all_compile(architecture):
    """Small sizes in every dtype; many functions in one text, since NVIDIA's headers take most of the time."""
    for launches in by_headers(forms(("small",)).values()).values():
        code = compiled(program(launches), architecture)
        assert all(f"k{i}".encode() in code for i in range(len(launches)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_compile_alone_at_every_size(architecture):
    """Each in a text of its own, as MLX compiles it; templates of the checkpoints' sizes too."""
    for launch in forms(("small", "real")).values():
        compiled(program([launch]), architecture)


def test_the_compiler_refuses():
    """What Metal has and the prelude has not is an error, not silence."""
    launch = next(iter(forms(("small",)).values()))
    with pytest.raises(CompileError, match="simdgroup_float8x8"):
        compiled(program([launch]).replace("__global__ void k0", "simdgroup_float8x8 m;\n__global__ void k0"), "sm_80")


def test_a_kernel_without_a_cuda_form_stays_in_plain_mlx(monkeypatch):
    class OnCuda:
        name = "cuda"

    kernel = Kernel("clamp", ("x", "low", "high"), ("out", "within"), cuda=False)
    op = next(op for op in ops() if op.name == "clamp")
    other = type(op)(**{**op.__dict__, "kernels": (kernel,)})
    monkeypatch.setattr("gemma_mlx.ops.registry.ops", lambda: [other])
    dispatch.has_cuda_form.cache_clear()
    try:
        with dispatch.using(OnCuda()):
            assert not dispatch.runs("clamp")
    finally:
        dispatch.has_cuda_form.cache_clear()
