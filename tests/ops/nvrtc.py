"""Kernels as MLX hands them to NVIDIA's compiler, and that compiler; no GPU is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx

from gemma_mlx.ops.kernel import Launch, text_of

TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t",
    mx.uint32: "uint32_t", mx.uint8: "uint8_t", mx.bool_: "bool", mx.int64: "int64_t",
}  # fmt: skip
"""``dtype_to_cuda_type`` of mlx/backend/cuda/utils.cpp."""

MLX = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using int32_t = int; using uint32_t = unsigned int; using uint8_t = unsigned char; using int64_t = long long;
namespace mlx::core::cu {
template <typename V> struct Ten {
  V values[10];
  __device__ V operator[](int i) const { return values[i]; }
};
using Shape = Ten<int32_t>;
using Strides = Ten<int64_t>;
}
"""
"""What kernels see of MLX's own mlx/backend/cuda/device/utils.cuh, which no CPU wheel has: the types of shapes and
strides, and the headers of 16-bit floats."""


def generated(launch: Launch, name: str) -> str:
    """A launch's function: ``build_kernel`` of mlx/backend/cuda/custom_kernel.cpp after its headers."""
    kernel, parameters = launch.kernel, []
    for x, given in zip(kernel.inputs, launch.inputs, strict=True):
        parameters.append(f"const {TYPES[given.dtype]}* {x}")
        for suffix, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if given.ndim > 0 and f"{x}_{suffix}" in kernel.body:
                parameters.append(f"const __grid_constant__ {kind} {x}_{suffix}")
    parameters += [f"{TYPES[dtype]}* {x}" for x, dtype in zip(kernel.outputs, launch.dtypes, strict=True)]
    constants = "".join(map(_constant, launch.template.items()))
    listed = ",\n    ".join(parameters)
    return (
        f"namespace mlx::core::cu {{\n\n__global__ void {name}(\n    {listed}) {{\n{constants}\n{kernel.body}\n}}\n\n}}"
        " // namespace mlx::core::cu\n"
    )


def _constant(item: tuple) -> str:
    name, value = item
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"  constexpr int {name} = {value};\n"
    return f"  using {name} = {TYPES[value]};\n"


def program(launches: Sequence[Launch]) -> str:
    """One text with a function for each launch, for kernels of the same headers: k0, k1 …"""
    (headers,) = {launch.kernel.headers for launch in launches}
    functions = [generated(launch, f"k{i}") for i, launch in enumerate(launches)]
    return "\n".join([MLX, text_of("cuda.h"), *map(text_of, headers), *functions])


def identity(launch: Launch) -> tuple:
    """What decides a launch's text."""
    return (
        launch.kernel.name, tuple(map(repr, launch.template.items())), tuple(x.dtype for x in launch.inputs),
        tuple(x.ndim > 0 for x in launch.inputs), launch.dtypes,
    )  # fmt: skip


class CompileError(Exception):
    """NVRTC's log."""


def _packages() -> Path:
    import nvidia

    return Path(next(iter(nvidia.__path__)))


@cache
def _library() -> ctypes.CDLL:
    folder = _packages() / "cuda_nvrtc" / "lib"
    ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(next(folder.glob("libnvrtc.so.*"))))


def _text(program: ctypes.c_void_p, size: Callable, read: Callable) -> bytes:
    count = ctypes.c_size_t()
    size(program, ctypes.byref(count))
    text = ctypes.create_string_buffer(count.value)
    read(program, text)
    return text.raw


def compiled(text: str, architecture: str) -> bytes:
    """The machine code of a text for ``sm_80`` …, with the options of mlx/backend/cuda/jit_module.cpp.

    Raises:
        CompileError: it does not compile.
    """
    nvrtc, made = _library(), ctypes.c_void_p()
    options = [
        b"--device-as-default-execution-space", f"--gpu-architecture={architecture}".encode(),
        f"--include-path={_packages() / 'cuda_runtime' / 'include'}".encode(),
    ]  # fmt: skip
    if nvrtc.nvrtcCreateProgram(ctypes.byref(made), text.encode(), b"kernels.cu", 0, None, None):
        raise CompileError("no program")
    try:
        if nvrtc.nvrtcCompileProgram(made, len(options), (ctypes.c_char_p * len(options))(*options)):
            raise CompileError(_text(made, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode())
        return _text(made, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(made))
