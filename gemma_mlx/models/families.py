"""Which class computes a checkpoint: by the `model_type` of its spec."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from gemma_mlx.models.gemma3n.model import Gemma3n
from gemma_mlx.models.multimodal import Gemma4
from gemma_mlx.models.text_only import Gemma3
from gemma_mlx.spec import ModelSpec
from gemma_mlx.spec_gemma3 import Gemma3TextSpec
from gemma_mlx.spec_gemma3n import Gemma3nSpec


def build(spec: ModelSpec) -> Any:
    """A model of the spec's family with weights still to be loaded."""
    if isinstance(spec, Gemma3nSpec):
        return Gemma3n(spec)
    return Gemma3(spec) if isinstance(spec.text, Gemma3TextSpec) else Gemma4(spec)


def float_dtype(model: Any) -> mx.Dtype:
    """The dtype of the weights that are not quantized."""
    return model.decoder.norm.weight.dtype
