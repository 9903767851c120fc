"""Which device the operations are chosen for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_assumed: bool | None = None


def on_gpu() -> bool:
    """Whether the default device is a GPU, or is to be taken for one."""
    return mx.default_device().type == mx.gpu if _assumed is None else _assumed


@contextmanager
def assumed_gpu() -> Iterator[None]:
    """Within the block operations are chosen as for a GPU; to trace, not to compute."""
    global _assumed
    held, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = held
