"""Fine-tune Gemma on audio, images and text with LoRA, in MLX.

The notebook interface, imported lazily: worker processes that import `gemma_mlx.data` never load MLX.
"""

from __future__ import annotations

import importlib
from typing import Any

from gemma_mlx import blas as _blas  # OpenBLAS must be in place before anything imports mlx.core

__version__ = "0.1.0"

_EXPORTS = {
    "load": "gemma_mlx.models.load",
    "finetune": "gemma_mlx.loop",
    "evaluate": "gemma_mlx.evaluation",
    "generate": "gemma_mlx.generation",
    "export": "gemma_mlx.exporting.run",
    "attach": "gemma_mlx.adapters.attach",
    "detach": "gemma_mlx.adapters.attach",
    "swap": "gemma_mlx.adapters.attach",
    "transcribe": "gemma_mlx.long_audio",
    "TrainConfig": "gemma_mlx.config",
    "InputError": "gemma_mlx.errors",
}
__all__ = [
    "InputError", "TrainConfig", "attach", "detach", "evaluate", "export", "finetune", "generate", "load", "swap",
    "transcribe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
