"""The shapes of the published checkpoints, as their config.json gives them: for estimates and the table in docs/.

Only what differs from the family's defaults; `read_spec` takes each of them. Sizes are those of the model cards.
"""

from __future__ import annotations

from typing import Any

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _layers(count: int, period: int) -> list[str]:
    """Every `period`-th layer attends to everything."""
    return [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(count)]


def _edge(period: int, **text: Any) -> dict[str, Any]:
    """Gemma 4 E2B and E4B: per-layer embeddings, shared keys and values, clipped towers."""
    text["layer_types"] = _layers(text["num_hidden_layers"], period)
    return {
        "model_type": "gemma4", "dtype": "bfloat16", "text_config": text,
        "vision_config": {"use_clipped_linears": True}, "audio_config": {},
    }  # fmt: skip


_LARGE = {
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True, "sliding_window": 1024,
    "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0, "global_head_dim": 512,
}  # fmt: skip
_LARGE_VISION = {
    "num_hidden_layers": 27, "hidden_size": 1152, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
    "global_head_dim": 72, "intermediate_size": 4304, "standardize": True, "use_clipped_linears": False,
}  # fmt: skip


def _large(**text: Any) -> dict[str, Any]:
    """Gemma 4 26B-A4B and 31B: pictures that see themselves whole, no audio."""
    text = {**_LARGE, **text, "layer_types": _layers(text["num_hidden_layers"], 6)}
    config = {"model_type": "gemma4", "dtype": "bfloat16", "text_config": text}
    return {**config, "vision_config": _LARGE_VISION, "audio_config": None}


def _unified(**text: Any) -> dict[str, Any]:
    """Gemma 4 12B: pictures and raw samples without encoders."""
    text = {**_LARGE, **text, "layer_types": _layers(text["num_hidden_layers"], 6)}
    del text["hidden_size_per_layer_input"]
    config = {"model_type": "gemma4_unified", "dtype": "bfloat16", "text_config": text}
    return {**config, "vision_config": {}, "audio_config": {}}


def _nano(layers: int, width: int, shared: int) -> dict[str, Any]:
    """Gemma 3n: ten sparse layers, streams, MobileNetV5 and a conformer."""
    text = {
        "num_hidden_layers": layers, "intermediate_size": [width] * layers, "num_kv_shared_layers": shared,
        "layer_types": _layers(layers, 5), "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
    }  # fmt: skip
    config = {"model_type": "gemma3n", "dtype": "bfloat16", "text_config": text}
    return {**config, "vision_config": {}, "audio_config": {}}


def _small(**text: Any) -> dict[str, Any]:
    """Gemma 3 for text alone."""
    common = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144}
    return {"model_type": "gemma3_text", "dtype": "bfloat16", **common, **text}


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gemma-4-E2B": _edge(
        5, num_hidden_layers=35, hidden_size=1536, intermediate_size=6144, num_kv_shared_layers=20,
        num_key_value_heads=1, use_double_wide_mlp=True,
    ),
    "gemma-4-E4B": _edge(
        6, num_hidden_layers=42, hidden_size=2560, intermediate_size=10_240, num_kv_shared_layers=18,
        num_key_value_heads=2,
    ),
    "gemma-4-12B": _unified(
        num_hidden_layers=48, hidden_size=3840, intermediate_size=15_360, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=1,
    ),
    "gemma-4-26B-A4B": _large(
        num_hidden_layers=30, hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
        num_global_key_value_heads=2, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gemma-4-31B": _large(
        num_hidden_layers=60, hidden_size=5376, intermediate_size=21_504, num_attention_heads=32,
        num_key_value_heads=16, num_global_key_value_heads=4,
    ),
    "gemma-3n-E2B": _nano(30, 8192, 10),
    "gemma-3n-E4B": _nano(35, 16_384, 15),
    "gemma-3-270m": _small(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma-3-1b": _small(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26),
}  # fmt: skip
"""Name of the base model (the instruction-tuned one has the same shapes) -> config.json."""
