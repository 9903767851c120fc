"""What the text decoders of all families share: positions, masks, the gated MLP, shared keys and values.

The families import these from here and never from each other.
"""

from __future__ import annotations

from gemma_mlx.models.gemma4.text import (
    MLP,
    KeysValues,
    Place,
    at_labels,
    place,
    rope_periods,
    rotate,
    through_layers,
)
from gemma_mlx.models.masks import additive_mask

__all__ = [
    "MLP",
    "KeysValues",
    "Place",
    "additive_mask",
    "at_labels",
    "place",
    "rope_periods",
    "rotate",
    "through_layers",
]
