"""An adapter's folder -> `Adapter`, whichever program wrote it: this library, PEFT, mlx-lm or mlx-vlm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.adapters import mlx_layout, peft_layout
from gemma_mlx.adapters.adapter import Adapter
from gemma_mlx.config import ADAPTER
from gemma_mlx.errors import InputError
from gemma_mlx.lora import ADAPTER_CONFIG as CONFIG
from gemma_mlx.lora import ADAPTER_WEIGHTS as MLX_WEIGHTS

PEFT_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def find_adapter(name: str | Path, revision: str | None = None) -> Path:
    """The adapter's folder: itself, the one in a run's folder, or the local copy of a Hub repository.

    Raises:
        InputError: there is none.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    if (folder / ADAPTER / CONFIG).is_file():
        return folder / ADAPTER
    text = str(name)
    if not folder.exists() and text.count("/") == 1 and not text.startswith(("/", ".", "~")):
        return _downloaded(text, revision)
    raise InputError(f"{name}: no adapter here ({CONFIG} with {MLX_WEIGHTS} or {PEFT_WEIGHTS} is needed)")


def _downloaded(name: str, revision: str | None) -> Path:
    from gemma_mlx.models.load import resolve

    try:
        folder = resolve(name, revision)
    except InputError as error:
        raise InputError(str(error).replace("model ", "adapter ", 1)) from None
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter {name}: this Hub repository holds no {CONFIG}, so it is no adapter")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        InputError: it is not there, or not JSON of the right kind.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no adapter here ({CONFIG} is missing)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an adapter's config ({type(error).__name__}: {error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not an adapter's config (a JSON object is needed)")
    return config


def layout_of(folder: Path, config: dict[str, Any]) -> str:
    """Who wrote the folder: "gemma_mlx", "peft", "mlx-lm" or "mlx-vlm".

    Raises:
        InputError: the weights are missing, or a pickle.
    """
    if "peft_type" in config:
        if (folder / PEFT_WEIGHTS).is_file():
            return "peft"
        if (folder / PICKLE).is_file():
            raise InputError(
                f"{folder / PICKLE}: a pickle, which can run code as it is read; save it as safetensors with PEFT "
                "(save_pretrained) and give that folder"
            )
        raise InputError(f"{folder}: no adapter here ({PEFT_WEIGHTS} is missing)")
    if not (folder / MLX_WEIGHTS).is_file():
        raise InputError(f"{folder}: no adapter here ({CONFIG} and {MLX_WEIGHTS} are needed)")
    if "gemma_mlx" in config:
        return "gemma_mlx"
    return "mlx-vlm" if "rank" in config or "base_quantization" in config else "mlx-lm"


def read_adapter(folder: str | Path, revision: str | None = None) -> Adapter:
    """The adapter in a folder (or a run's folder, or a Hub repository); its tensors are not read from disk yet.

    Raises:
        InputError: there is none, its files are damaged or do not belong together, or it is of a kind that this
            library cannot apply.
    """
    folder = find_adapter(folder, revision)
    config = read_config(folder)
    layout = layout_of(folder, config)
    path = folder / (PEFT_WEIGHTS if layout == "peft" else MLX_WEIGHTS)
    try:
        tensors = mx.load(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    read = peft_layout.read if layout == "peft" else mlx_layout.read
    try:
        return read(path, layout, config, dict(tensors))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:  # rank_pattern holds expressions
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / CONFIG}: not an adapter's config ({type(error).__name__}: {error})") from None
