"""Clang from PyPI's ziglang, called without zig's own driver, and a cache of what it made."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from metal.fault import Fault

HERE = Path(__file__).parent
PRELUDE = ("metal.h", "vectors.h", "lanes.h", "atomics.h", "matrix.h", "entry.h", "runtime.h")
RUNTIME = ("runtime.cpp", "runtime.h", "memory.h", "fibers.h", "callbacks.h")
COMMON = (
    "--target=x86_64-linux-gnu", "-march=x86-64-v3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-exceptions",
    "-fno-rtti", "-nostdinc", "-ffreestanding", "-fno-stack-protector", "-fno-threadsafe-statics", "-fno-math-errno",
    "-g1", "-I", str(HERE),
)  # fmt: skip
UNDEFINED = "bounds,local-bounds,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow,alignment"
CHECKED = (
    "-mllvm", "-inline-threshold=100000",
    "-fsanitize=kernel-memory", "-fno-sanitize-memory-param-retval", "-mllvm", "-msan-track-origins=0",
    f"-fsanitize={UNDEFINED}", f"-fno-sanitize-trap={UNDEFINED}",
)  # fmt: skip
UNCHECKED = ("-O2",)
SYNTAX = ("-fsyntax-only", "-x", "c++")
SUSPECT = ("-Wconditional-uninitialized", "-Wimplicit-float-conversion")
WARNINGS = (
    "-Wno-everything", "-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=return-type",
    "-Werror=array-bounds", "-Werror=division-by-zero", "-Werror=shift-count-overflow",
    "-Werror=shift-count-negative",
)  # fmt: skip


@cache
def zig() -> str:
    """The compiler. Tests need it: one that is missing fails them."""
    try:
        import ziglang
    except ImportError:
        raise RuntimeError("no compiler for the Metal emulator: pip install ziglang (in gemma-mlx[test])") from None
    return str(Path(ziglang.__file__).parent / "zig")


def cache_folder() -> Path:
    """Compiled objects, kept between runs; ``GEMMA_MLX_EMULATOR_CACHE`` moves it."""
    given = os.environ.get("GEMMA_MLX_EMULATOR_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"gemma_mlx_emulator_{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_clang(arguments: list[str], stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([zig(), "clang", *arguments], input=stdin, capture_output=True, text=True)


@cache
def _texts(files: tuple[str, ...]) -> str:
    return "\n".join((HERE / file).read_text(encoding="utf-8") for file in files) + repr(os.stat(zig()).st_size)


def _key(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _shared_object(path: Path, text: str, flags: tuple[str, ...], of: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "made.o", Path(folder) / "made.so"
        done = run_clang([*COMMON, *flags, "-x", "c++", "-c", "-", "-o", str(made)], text)
        if done.returncode:
            raise _compile_fault(done.stderr, of)
        subprocess.run([zig(), "ld.lld", "-shared", str(made), "-o", str(linked)], check=True)
        os.replace(linked, path)


_KINDS = {
    "uninitialized": "uninitialised", "shift count": "shift", "by zero": "division-by-zero",
    "array index": "out-of-bounds",
}  # fmt: skip


_TO_BFLOAT = re.compile(
    r"^([^:\n]+):(\d+):\d+: warning: (implicit conversion .*precision: .* to '[^']*(?:bfloat|__bf16)"
    r"[^']*'.*)$",
    re.MULTILINE,
)


def _compile_fault(messages: str, of: str, kind: str | None = None) -> Fault:
    found = re.search(r"^([^:\n]+):(\d+):\d+: (?:fatal )?error: (.*)$", messages, re.MULTILINE)
    if not found:
        return Fault(kind or "compile", of, 0, messages.strip())
    file, line, message = found.groups()
    kind = kind or next((k for part, k in _KINDS.items() if part in message), "compile")
    return Fault(kind, file, int(line), message)


def runtime_library() -> Path:
    path = cache_folder() / f"runtime_{_key(_texts(RUNTIME), COMMON)}.so"
    if not path.exists():
        _shared_object(path, '#include "runtime.cpp"\n', ("-O2", "-fno-builtin"), "runtime.cpp")
    return path


def _check(text: str, name: str) -> tuple[str, ...]:
    """What clang says of the text, and how far it may be optimised.

    First without address spaces, so that what is wrong with them only is told apart. A variable that some way through
    the text leaves unset would be optimised to what the other ways set, so such a text is not optimised.
    """
    done = run_clang([*COMMON, *WARNINGS, *SUSPECT, *SYNTAX, "-"], text)
    if done.returncode:
        raise _compile_fault(done.stderr, name)
    if found := _TO_BFLOAT.search(done.stderr):
        file, line, message = found.groups()
        raise Fault("compile", file, int(line), f"{message}; Metal wants a static_cast")
    maybe_unset = "[-Wconditional-uninitialized]" in done.stderr
    done = run_clang([*COMMON, *WARNINGS, *SYNTAX, "-DCHECK_ADDRESS_SPACES", "-"], text)
    if done.returncode:
        raise _compile_fault(done.stderr, name, "address-space")
    return ("-O0",) if maybe_unset else ("-O1",)


def kernel_library(text: str, name: str, checks: bool, optimise: bool = True) -> Path:
    """The kernel's shared object. `optimise`: where that hides nothing.

    Raises:
        Fault: "address-space", "uninitialised", "compile" … : what clang says of the text.
    """
    flags = (*WARNINGS, *(CHECKED if checks else UNCHECKED))
    path = cache_folder() / f"{name[:40]}_{_key(text, _texts(PRELUDE), COMMON, flags, SUSPECT, optimise)}.so"
    if not path.exists():
        level = _check(text, name) if checks else ()
        _shared_object(path, text, (*flags, *(level if optimise else ("-O0",))), name)
    return path
