"""What is exported, and how: the values that every format's writer is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = ("hf", "peft", "mlx", "gguf")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A base model and what was trained on it.

    Attributes:
        base: the base checkpoint's folder (or GGUF file) on this machine.
        base_name: as the user named it: a Hub id or a path.
        revision: of the Hub repository, where one was named.
        adapter: an adapter's folder in this library's layout; None for the base alone.
        run: the run's folder, where there is one.
        step: the step that the adapter is of, where it is known.
        remembered: the options that the adapter must be used with (`gemma_mlx.lora.remembered_options`).
        told: lines for the user about what was chosen.
        kept: what removes a made adapter's folder once nothing needs the source.
    """

    base: Path
    base_name: str
    revision: str | None = None
    adapter: Path | None = None
    run: Path | None = None
    step: int | None = None
    remembered: Mapping[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    kept: Any = field(default=None, repr=False, compare=False)

    @property
    def public_name(self) -> str | None:
        """The base's Hub id; None where it was named by a path."""
        if Path(self.base_name).expanduser().exists() or not _HUB_ID.fullmatch(self.base_name):
            return None
        return self.base_name

    @property
    def shown_name(self) -> str:
        """The base for a reader, and in files: its Hub id, or the last part of its path, which may be private."""
        return self.public_name or Path(self.base_name).name


@dataclass(frozen=True)
class ExportOptions:
    """How to write it.

    Attributes:
        dtype: "float32", "bfloat16" or "float16" of written weights; None for the base's own.
        bits: 4, 6 or 8 for an MLX tree that is packed again; None for floating point.
        shard_bytes: the most bytes of one safetensors file.
        gguf_type: what llama.cpp's converter writes: "f32", "f16", "bf16", "q8_0"; None to follow ``dtype``.
        gguf_lora: only the adapter, as a LoRA GGUF, instead of the merged model.
        mmproj: also the towers' GGUF, where the checkpoint has towers and the converter takes them.
        quiet: show no progress.
        merge_towers: for PEFT: what lies in towers and embedders is merged into a base written beside the adapter.
        adapter_rank: for PEFT and MLX: the most columns of a layer, by its largest singular values; None for all.
    """

    dtype: str | None = None
    bits: int | None = None
    shard_bytes: int = 5 * 10**9
    gguf_type: str | None = None
    gguf_lora: bool = False
    mmproj: bool = True
    merge_towers: bool = False
    adapter_rank: int | None = None
    quiet: bool = False
