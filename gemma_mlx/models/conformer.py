"""What the audio towers of all families share: causal convolution, tables of distances.

The families import these from here and never from each other.
"""

from __future__ import annotations

from gemma_mlx.models.gemma4.audio import _limited as limited
from gemma_mlx.models.gemma4.audio import depthwise_causal_conv, relative_positions

__all__ = ["depthwise_causal_conv", "limited", "relative_positions"]
