"""config.json of a Gemma 3 text checkpoint (270M, 1B) as a spec; field names are ``Gemma3TextConfig``'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.spec import FULL, SLIDING, ModelSpec, TextSpec, known_fields

MODEL_TYPE = "gemma3_text"

_PATTERN = 6  # every sixth layer is full where the config does not say
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_READ_HERE = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern",
    "_sliding_window_pattern", "attn_logit_softcapping", "cache_implementation", "quantization", "quantization_config",
)  # fmt: skip
_NO_TOKEN = -1  # no id equals it


@dataclass(frozen=True)
class Gemma3TextSpec(TextSpec):
    """The decoder of Gemma 3: one head size, no shared keys and values, no per-layer embeddings."""

    vocab_size: int = 262_208
    num_hidden_layers: int = 26
    sliding_window: int = 4096
    hidden_size_per_layer_input: int = 0
    query_pre_attn_scalar: float = 256.0
    """Scores are divided by its square root."""

    def layer_head_dim(self, layer: int) -> int:
        """Head size of `layer`: the same for all."""
        return self.head_dim


def _layer_types(config: dict[str, Any], layers: int, where: str) -> tuple[str, ...]:
    pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PATTERN)
    types = tuple(config.get("layer_types") or (SLIDING if (i + 1) % pattern else FULL for i in range(layers)))
    if len(types) != layers or set(types) - {SLIDING, FULL}:
        raise InputError(f"{where}.layer_types: expected {layers} of {SLIDING!r} or {FULL!r}, found {list(types)}")
    return types


def _rope(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Rotary parameters by attention type, from `rope_parameters` or from the three keys of older files."""
    given = config.get("rope_parameters") or {}
    old = {FULL: dict(config.get("rope_scaling") or {}), SLIDING: {}}
    thetas = {FULL: config.get("rope_theta"), SLIDING: config.get("rope_local_base_freq")}
    out = {}
    for kind in (SLIDING, FULL):
        own = {**old[kind], **(given.get(kind) or {})}
        form = own.get("rope_type", own.get("type", "default"))
        out[kind] = {"rope_type": "default", "rope_theta": float(own.get("rope_theta") or thetas[kind] or _THETA[kind])}
        if form == "linear":  # all pairs, every period longer by the factor
            out[kind] |= {"rope_type": "proportional", "partial_rotary_factor": 1.0, "factor": float(own["factor"])}
        elif form != "default":
            raise InputError(f"{where}: rope_type {form!r} of {kind}; expected 'default' or 'linear'")
    return out


def gemma3_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a `gemma3_text` config.

    Raises:
        InputError: a variant that is not supported.
    """
    known = known_fields(Gemma3TextSpec, config, where, _READ_HERE)
    layers = known.get("num_hidden_layers", Gemma3TextSpec.num_hidden_layers)
    for name in ("use_bidirectional_attention", "attn_logit_softcapping", "attention_bias"):
        if config.get(name):
            raise InputError(f"{where}.{name} is {config[name]!r}: not supported for {MODEL_TYPE}")
    if known.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise InputError(f"{where}.hidden_activation is {known['hidden_activation']!r}; expected 'gelu_pytorch_tanh'")
    if not config.get("tie_word_embeddings", True):
        raise InputError(f"{where}.tie_word_embeddings is false: an output matrix of its own is not supported")
    known |= {
        "layer_types": _layer_types(config, layers, where),
        "rope_parameters": _rope(config, where),
        "use_bidirectional_attention": None,
    }
    media = ("boi", "eoi", "image", "video", "boa", "eoa", "audio")
    return ModelSpec(
        text=Gemma3TextSpec(**known),
        vision=None,
        audio=None,
        config=config,
        **{f"{name}_token_id": _NO_TOKEN for name in media},
    )
