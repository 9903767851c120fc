"""What an adapter is, whichever program wrote it: the values that the parts of this package exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

TOWERS = frozenset({"vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder"})
"""Names of modules beside the decoder."""


def in_tower(path: str) -> bool:
    """Whether a module or tensor lies in a tower or its embedder."""
    return not TOWERS.isdisjoint(path.split("."))


@dataclass(frozen=True)
class LowRank:
    """The change of one linear: ΔW = scale · (A · B)ᵀ, and DoRA's lengths where it has them.

    Attributes:
        a: [in, rank], in the dtype that the file has.
        b: [rank, out], likewise.
        scale: what the product counts.
        m: DoRA's lengths [out]; None for LoRA.
        alpha: as a PEFT file names it, where the adapter comes from one.
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """One adapter, read from a folder.

    Attributes:
        where: the file that its tensors come from, for messages.
        layout: "gemma_mlx", "peft", "mlx-lm" or "mlx-vlm": who wrote it.
        layers: path of the linear -> its change. Paths are those of the file in transformers' spelling;
            `gemma_mlx.adapters.fitting.fit` finds the model's own.
        modules: paths of the modules that were trained in full.
        full: tensor name -> weight of these modules.
        torch_axes: `full` has torch's layouts (PEFT), not MLX's.
        dropout: that it was trained with.
        rslora: PEFT's rank-stabilised scale (alpha / √rank) made `scale` out of `alpha`.
        base: name of the base model, where the file says it.
        revision: of the base, likewise.
        options: what it must be used with (prompts, audio window, …); written by this library alone.
        config: the file adapter_config.json as it is.
    """

    where: Path
    layout: str
    layers: Mapping[str, LowRank]
    modules: tuple[str, ...] = ()
    full: Mapping[str, mx.array] = field(default_factory=dict)
    torch_axes: bool = False
    dropout: float = 0.0
    rslora: bool = False
    base: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        """Whether a layer has DoRA's lengths."""
        return any(layer.m is not None for layer in self.layers.values())

    def only(self, keep: Callable[[str], bool]) -> Adapter:
        """The part of it whose paths `keep` chooses."""
        return replace(
            self,
            layers={path: layer for path, layer in self.layers.items() if keep(path)},
            modules=tuple(path for path in self.modules if keep(path)),
            full={name: tensor for name, tensor in self.full.items() if keep(name)},
        )
