"""A checkpoint's config.json as dataclasses, and how many soft tokens a picture or a clip becomes.

Field names are those of transformers' ``Gemma4Config`` and its text, vision and audio configs. Nothing heavy is
imported here: data workers and models both read it.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import config as gguf_config
from gemma_mlx.gguf_file import is_gguf

SLIDING, FULL = "sliding_attention", "full_attention"

SAMPLE_RATE = 16_000
MAX_AUDIO_SAMPLES = 480_000
"""Longer clips are cut to this many samples (30 s) by the reference's feature extractor."""
IMAGE_BUDGETS = (70, 140, 280, 560, 1120)
"""The soft-token budgets that the reference's image processor accepts."""

_HOP = 160
_ROPE_DEFAULTS = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
# Keys that configs carry and that do not change what the model computes (or only in ways refused below).
_INERT_KEYS = frozenset(
    {
        "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures", "attention_dropout",
        "attn_implementation", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype",
        "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
        "max_position_embeddings", "model_type", "moe_intermediate_size", "num_experts", "output_attentions",
        "output_hidden_states", "prefix", "problem_type", "return_dict", "task_specific_params",
        "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k_experts", "torch_dtype",
        "quantization", "quantization_config", "transformers_version", "use_cache", "vision_soft_tokens_per_image",
    }
)


@dataclass(frozen=True)
class TextSpec:
    """The decoder. Sizes are in elements; `layer_types` has one entry a layer."""

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int = 512
    """Head size of full-attention layers."""
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int | list[int] = 1
    bos_token_id: int = 2
    rope_parameters: dict[str, dict[str, Any]] = field(default_factory=lambda: _ROPE_DEFAULTS)
    attention_bias: bool = False
    sliding_window: int = 512
    layer_types: tuple[str, ...] = ()
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = None
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    enable_moe_block: bool = False
    use_double_wide_mlp: bool = False

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that owns no keys or values; the number of layers where none is shared."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def kv_provider(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, or the last unshared one of its type."""
        if layer < self.first_kv_shared_layer:
            return layer
        own = [i for i in range(self.first_kv_shared_layer) if self.layer_types[i] == self.layer_types[layer]]
        return own[-1]

    def layer_head_dim(self, layer: int) -> int:
        """Head size of `layer`."""
        return self.global_head_dim if self.layer_types[layer] == FULL else self.head_dim

    def layer_intermediate_size(self, layer: int) -> int:
        """MLP width of `layer`."""
        return self.intermediate_size * (2 if self.use_double_wide_mlp and layer >= self.first_kv_shared_layer else 1)


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "axial", "rope_theta": 100.0})
    """Only the axial form exists; some files spell its type "default"."""
    pooling_kernel_size: int = 3
    patch_size: int = 16
    position_embedding_size: int = 10_240
    use_clipped_linears: bool = False
    standardize: bool = False
    default_output_length: int = 280
    """Soft-token budget of a picture unless one is asked for."""
    global_head_dim: int | None = None
    """Present in some files; the tower has one head size."""

    @property
    def rope_theta(self) -> float:
        """Base of the axial rotary frequencies."""
        return float(self.rope_parameters.get("rope_theta", 100.0))


@dataclass(frozen=True)
class AudioSpec:
    """The audio tower."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "silu"
    subsampling_conv_channels: tuple[int, int] = (128, 32)
    conv_kernel_size: int = 5
    residual_weight: float = 0.5
    attention_chunk_size: int = 12
    attention_context_left: int = 13
    attention_context_right: int = 0
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    use_clipped_linears: bool = True
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    output_proj_dims: int = 1536
    attention_window: int = 12
    """Keys a frame attends to, itself included: 12 as in transformers, or 13 as in Google's JAX release."""


@dataclass(frozen=True)
class ModelSpec:
    """A whole checkpoint: sub-specs, special token ids and the config.json it came from."""

    text: TextSpec
    vision: VisionSpec | None
    audio: AudioSpec | None
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    image_token_id: int = 258_880
    video_token_id: int = 258_884
    boa_token_id: int = 256_000
    eoa_token_id: int = 258_883
    audio_token_id: int = 258_881
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """config.json as read, to be written again beside saved weights."""

    @property
    def dtype(self) -> str:
        """The dtype that the config names ("bfloat16" where it names none)."""
        text = self.config.get("text_config") or {}
        found = [c.get(key) for c in (self.config, text) for key in ("dtype", "torch_dtype")]
        return next((str(d).removeprefix("torch.") for d in found if d), "bfloat16")


def _known(cls: type, config: dict[str, Any], where: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of `config` that are fields of `cls` and not None; warns of keys that nothing knows."""
    names = {f.name for f in fields(cls)} - {"config", "attention_window"}
    for key in config:
        if key not in names and key not in _INERT_KEYS and key not in also:
            warnings.warn(
                f"{where}: unknown key {key!r} is ignored; the model may differ from what it asks for", stacklevel=3
            )
    return {k: v for k, v in config.items() if k in names and v is not None}


known_fields = _known  # for the other families' specs


def _layer_types(config: dict[str, Any], layers: int, where: str) -> tuple[str, ...]:
    """One attention type a layer; every sixth is full where the config has none, and the last one always is."""
    types = list(config.get("layer_types") or (SLIDING if (i + 1) % 6 else FULL for i in range(layers)))
    if len(types) != layers or set(types) - {SLIDING, FULL}:
        raise InputError(f"{where}.layer_types: expected {layers} entries of {SLIDING!r} or {FULL!r}, found {types}")
    if types[-1] != FULL:
        warnings.warn(f"{where}.layer_types: the last layer is {types[-1]!r}; it is made {FULL!r}", stacklevel=4)
        types[-1] = FULL
    return tuple(types)


def _full_head_dim(config: dict[str, Any], types: tuple[str, ...], where: str) -> int:
    """Head size of full layers from either spelling: `global_head_dim`, or overrides by layer in `per_layer_config`."""
    overrides = config.get("per_layer_config")
    if overrides is None:
        return int(config.get("global_head_dim") or 512)
    # Keys are layer numbers, zero-padded to one width ("05"), or attention types.
    overrides = {int(k) if str(k).isdigit() else k: v for k, v in overrides.items()}
    head_dim, sizes = config.get("head_dim", 256), set()
    for layer, kind in enumerate(types):
        own = overrides.get(layer, overrides.get(kind, {}))
        other = sorted(k for k, v in own.items() if k != "head_dim" and v != config.get(k))
        if other or (kind == SLIDING and own.get("head_dim", head_dim) != head_dim):
            raise InputError(
                f"{where}.per_layer_config: layer {layer} ({kind}) overrides {other or ['head_dim']}: not supported"
            )
        if kind == FULL:
            sizes.add(int(own.get("head_dim", head_dim)))
    if len(sizes) != 1:
        raise InputError(f"{where}.per_layer_config: full layers have head sizes {sorted(sizes)}; expected one size")
    return sizes.pop()


def _rope(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    rope = config.get("rope_parameters") or _ROPE_DEFAULTS
    for kind in (SLIDING, FULL):
        if not isinstance(rope.get(kind), dict):
            raise InputError(f"{where}.rope_parameters: no entry for {kind!r}")
        if (found := rope[kind].get("rope_type", "default")) not in ("default", "proportional"):
            raise InputError(
                f"{where}.rope_parameters.{kind}: rope_type {found!r}; expected 'default' or 'proportional'"
            )
    return {kind: dict(rope[kind]) for kind in (SLIDING, FULL)}


def _text_spec(config: dict[str, Any], where: str) -> TextSpec:
    known = _known(
        TextSpec, config, where, ("per_layer_config", "num_global_key_value_heads", "sliding_window_pattern")
    )
    types = _layer_types(config, known.get("num_hidden_layers", TextSpec.num_hidden_layers), where)
    known |= {
        "layer_types": types,
        "global_head_dim": _full_head_dim(config, types, where),
        "rope_parameters": _rope(config, where),
    }
    spec = TextSpec(**known)
    for name, supported in (
        ("enable_moe_block", False),
        ("attention_k_eq_v", False),
        ("attention_bias", False),
        ("use_bidirectional_attention", None),
        ("hidden_activation", "gelu_pytorch_tanh"),
    ):
        if (found := getattr(spec, name)) != supported:
            raise InputError(f"{where}.{name} is {found!r}: only {supported!r} is supported (Gemma 4 E2B and E4B)")
    if not config.get("tie_word_embeddings", True):
        raise InputError(f"{where}.tie_word_embeddings is false: an output matrix of its own is not supported")
    owners = set(types[: spec.first_kv_shared_layer])
    if spec.num_kv_shared_layers and set(types) - owners:
        raise InputError(
            f"{where}: shared layers of type {sorted(set(types) - owners)} have no earlier layer to share with"
        )
    return spec


def _vision_spec(config: dict[str, Any], where: str) -> VisionSpec:
    spec = VisionSpec(**_known(VisionSpec, config, where))
    if spec.attention_bias or spec.hidden_activation != "gelu_pytorch_tanh":
        raise InputError(f"{where}: attention_bias and activations other than 'gelu_pytorch_tanh' are not supported")
    return spec


def _audio_spec(config: dict[str, Any], where: str) -> AudioSpec:
    known = _known(AudioSpec, config, where)
    if "subsampling_conv_channels" in known:
        known["subsampling_conv_channels"] = tuple(known["subsampling_conv_channels"])
    spec = AudioSpec(**known)
    if spec.hidden_act != "silu" or spec.attention_context_right != 0:
        raise InputError(f"{where}: only hidden_act 'silu' and attention_context_right 0 are supported")
    return spec


def read_spec(source: str | Path | dict[str, Any]) -> ModelSpec:
    """The spec of a checkpoint folder, of a config.json, of its content as a dict, or of a GGUF file.

    Keys that nothing here knows are warnings naming them.

    Raises:
        InputError: no or unreadable config.json, another `model_type`, or a variant that is not supported.
    """
    if isinstance(source, dict):
        config, where = source, "config"
    elif is_gguf(source):
        config, where = gguf_config(source), str(source)
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        where = str(path)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: not found; a checkpoint folder holds config.json") from None
        except (ValueError, OSError) as e:
            raise InputError(f"{path}: not readable as JSON ({e})") from None
    found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if found == "gemma3_text":
        from gemma_mlx.spec_gemma3 import gemma3_spec

        return gemma3_spec(config, where)
    if found != "gemma4":
        raise InputError(
            f"{where}: model_type is {found!r}; supported: 'gemma4' (Gemma 4 E2B and E4B), 'gemma3_text' (Gemma 3 270M "
            "and 1B)"
        )
    # The last token id is the one that the files spell "index".
    known = _known(
        ModelSpec,
        config,
        where,
        (
            "text_config",
            "vision_config",
            "audio_config",
            "eoa_token_index",
            "eos_token_id",
            "pad_token_id",
            "bos_token_id",
        ),
    )
    if "eoa_token_index" in config:
        known["eoa_token_id"] = config["eoa_token_index"]
    vision, audio = config.get("vision_config"), config.get("audio_config")
    return ModelSpec(
        text=_text_spec(config.get("text_config") or {}, f"{where}: text_config"),
        vision=None if vision is None else _vision_spec(vision, f"{where}: vision_config"),
        audio=None if audio is None else _audio_spec(audio, f"{where}: audio_config"),
        config=config,
        **{k: v for k, v in known.items() if k not in ("text", "vision", "audio")},
    )


def audio_frames(n_samples: int) -> int:
    """Valid log-mel frames of a clip of `n_samples` at 16 kHz; samples beyond 30 s do not count.

    Frame i is valid where sample 160·(i+1) exists (transformers' ``Gemma4AudioFeatureExtractor``).
    """
    return max(0, min(n_samples, MAX_AUDIO_SAMPLES) - 1) // _HOP


def audio_soft_tokens(n_samples: int) -> int:
    """Soft tokens of a clip of `n_samples` at 16 kHz: a quarter of its valid frames, rounded up; 750 at most.

    0 for clips of up to 160 samples (10 ms), which cannot be used.
    """
    return -(-audio_frames(n_samples) // 4)


def image_size(height: int, width: int, budget: int = 280, patch: int = 16, pool: int = 3) -> tuple[int, int]:
    """(height, width) in pixels to which a picture is resized: the aspect ratio kept, at most `budget` soft tokens.

    Both sides are multiples of patch·pool; small pictures are enlarged (transformers' ``Gemma4ImageProcessor``).

    Raises:
        InputError: a side is zero or the picture cannot be given one whole cell within the budget.
    """
    if min(height, width) <= 0:
        raise InputError(f"picture of {width}x{height} pixels: both sides must be at least 1")
    cell = patch * pool
    pixels = budget * pool**2 * patch**2
    factor = math.sqrt(pixels / (height * width))
    new_height = math.floor(factor * height / cell) * cell
    new_width = math.floor(factor * width / cell) * cell
    if not new_height and not new_width:
        raise InputError(f"picture of {width}x{height} pixels: a budget of {budget} soft tokens leaves it no cell")
    if not new_height:
        new_height, new_width = cell, min(width // height, budget) * cell
    elif not new_width:
        new_height, new_width = min(height // width, budget) * cell, cell
    return new_height, new_width


def image_soft_tokens(height: int, width: int, budget: int = 280, patch: int = 16, pool: int = 3) -> int:
    """Soft tokens of a picture of this size (after the resize of `image_size`): one for each pool×pool patches."""
    new_height, new_width = image_size(height, width, budget, patch, pool)
    return (new_height // (patch * pool)) * (new_width // (patch * pool))
