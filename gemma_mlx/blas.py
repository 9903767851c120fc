"""A fast BLAS for MLX on a Linux CPU. Import this before ``mlx.core``; elsewhere it does nothing.

The Linux CPU wheel of MLX bundles the reference BLAS (about 7 GFLOP/s in float32). Its symbols are resolved at load
time, so an OpenBLAS that is already in the global namespace is taken instead: 60 to 270 GFLOP/s on the same machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import sys
import tempfile
from pathlib import Path

ENVIRONMENT_VARIABLE = "GEMMA_MLX_BLAS"
"""A path to a BLAS library to load, or ``off``."""

loaded: str | None = None
"""The library that was loaded, or None."""


def _candidates() -> list[str]:
    """Libraries to try: the environment's, the one of the `cmeel-openblas` wheel, the system's."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return [] if chosen == "off" else [chosen]
    wheels = [Path(p) / "cmeel.prefix" / "lib" for p in sys.path if p.endswith("site-packages")]
    found = [str(f) for folder in wheels for f in sorted(folder.glob("libopenblas*.so*"))]
    system = ctypes.util.find_library("openblas")
    return found + ([system] if system else [])


def _wheel_runtime() -> tuple[Path, Path] | None:
    """(libgfortran, libquadmath) that the mlx-cpu wheel carries under hashed names, or None."""
    for folder in (Path(p) / "mlx_cpu.libs" for p in sys.path if p.endswith("site-packages")):
        fortran, quad = sorted(folder.glob("libgfortran-*.so*")), sorted(folder.glob("libquadmath-*.so*"))
        if fortran and quad:
            return fortran[0], quad[0]
    return None


def _provide_fortran_runtime() -> None:
    """Make `libgfortran.so.5` known to the loader on a machine that has none.

    OpenBLAS wheels name it as a dependency without carrying it; MLX's wheel carries it as `libgfortran-HASH.so`. A
    loaded library satisfies a dependency by its SONAME, so a private copy with the standard SONAME written back does.
    """
    runtime = _wheel_runtime()
    if runtime is None:
        return
    fortran, quad = runtime
    old, new = fortran.name.encode() + b"\0", b"libgfortran.so.5\0"
    image = fortran.read_bytes()
    if image.count(old) != 1 or len(new) > len(old):
        return
    with tempfile.TemporaryDirectory() as folder:  # the loader keeps the mapping after the file is gone
        copy = Path(folder) / "libgfortran.so.5"
        copy.write_bytes(image.replace(old, new.ljust(len(old), b"\0")))
        ctypes.CDLL(str(quad), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)


def _try(path: str) -> bool:
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def load() -> str | None:
    """Load the first BLAS that can be loaded, with its symbols global; returns its path or None."""
    if not sys.platform.startswith("linux"):
        return None
    candidates = _candidates()
    for path in candidates:
        if _try(path):
            return path
    if candidates:
        with contextlib.suppress(OSError):
            _provide_fortran_runtime()
    return next((path for path in candidates if _try(path)), None)


if "mlx.core" not in sys.modules:
    loaded = load()
