"""Where the Metal sources lie: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def kernels_folder() -> Path:
    """The folder `kernels/` of the wheel, else of the checkout (editable or not installed at all).

    There is no package `kernels` (PyPI has one of that name), so files are found by path, never by import.
    """
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder `kernels` in {_PACKAGE} nor beside it; reinstall gemma-mlx")
