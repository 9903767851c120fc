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
from gemma_mlx.spec_gemma4_unified import TEXT_DEFAULTS as UNIFIED_TEXT
from gemma_mlx.spec_gemma4_unified import UnifiedAudioSpec, UnifiedVisionSpec

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
        "max_position_embeddings", "model_type", "output_attentions",
        "output_hidden_states", "prefix", "problem_type", "return_dict", "task_specific_params",
        "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "quantization",
        "quantization_config", "transformers_version", "use_cache", "vision_soft_tokens_per_image",
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
    num_global_key_value_heads: int | None = None
    """Key and value heads of full-attention layers; None for as many as elsewhere."""
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    vision_runs: str = "sliding"
    """Where the slots of one picture see each other, if use_bidirectional_attention is "vision": in "sliding" layers
    only (within the window), or in "all" layers (whatever the window)."""

    @property
    def bidirectional_vision(self) -> bool:
        """Whether the slots of one picture or video frame see each other, so that token types are needed."""
        return self.use_bidirectional_attention == "vision"

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

    def layer_kv_heads(self, layer: int) -> int:
        """Key and value heads of `layer`."""
        other = self.num_global_key_value_heads if self.layer_types[layer] == FULL else None
        return other or self.num_key_value_heads

    def layer_k_eq_v(self, layer: int) -> bool:
        """Whether the values of `layer` are its keys before their norm and rotation."""
        return self.attention_k_eq_v and self.layer_types[layer] == FULL

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

    @property
    def input_patch(self) -> int:
        """Pixels along one side of a patch as the model takes it."""
        return self.patch_size

    @property
    def input_pooling(self) -> int:
        """Patches along one side of a soft token."""
        return self.pooling_kernel_size


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

    @property
    def frames_per_token(self) -> int:
        """Feature frames of one soft token."""
        return 4

    @property
    def max_samples(self) -> int:
        """The longest clip at 16 kHz."""
        return MAX_AUDIO_SAMPLES

    def soft_tokens(self, n_samples: int) -> int:
        """Soft tokens of a clip of `n_samples` at 16 kHz."""
        return audio_soft_tokens(n_samples)


@dataclass(frozen=True)
class ModelSpec:
    """A whole checkpoint: sub-specs, special token ids and the config.json it came from."""

    text: TextSpec
    vision: VisionSpec | UnifiedVisionSpec | None
    audio: AudioSpec | UnifiedAudioSpec | None
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
    def unified(self) -> bool:
        """Whether media come in without towers (Gemma 4 12B)."""
        return self.config.get("model_type") == "gemma4_unified"

    @property
    def dtype(self) -> str:
        """The dtype that the config names ("bfloat16" where it names none)."""
        text = self.config.get("text_config") or {}
        found = [c.get(key) for c in (self.config, text) for key in ("dtype", "torch_dtype")]
        return next((str(d).removeprefix("torch.") for d in found if d), "bfloat16")


def _known(cls: type, config: dict[str, Any], where: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of `config` that are fields of `cls` and not None; warns of keys that nothing knows."""
    names = {f.name for f in fields(cls)} - {"config", "attention_window", "vision_runs"}
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


def _full_sizes(config: dict[str, Any], types: tuple[str, ...], where: str) -> tuple[int, int | None]:
    """(head size, key and value heads or None) of full layers, from either spelling.

    That is `global_head_dim` and `num_global_key_value_heads` (which counts where keys are values), or overrides by
    layer in `per_layer_config`.
    """
    overrides = config.get("per_layer_config")
    if overrides is None:
        heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        return int(config.get("global_head_dim") or 512), heads and int(heads)
    # Keys are layer numbers, zero-padded to one width ("05"), or attention types.
    overrides = {int(k) if str(k).isdigit() else k: v for k, v in overrides.items()}
    usual = {"head_dim": config.get("head_dim", 256), "num_key_value_heads": config.get("num_key_value_heads", 4)}
    sizes = set()
    for layer, kind in enumerate(types):
        own = overrides.get(layer, overrides.get(kind, {}))
        changed = {k for k, v in own.items() if v != usual.get(k, config.get(k))}
        other = sorted(changed - usual.keys() if kind == FULL else changed)
        if other:
            raise InputError(f"{where}.per_layer_config: layer {layer} ({kind}) overrides {other}: not supported")
        if kind == FULL:
            sizes.add(tuple(int({**usual, **own}[k]) for k in usual))
    if len(sizes) != 1:
        raise InputError(
            f"{where}.per_layer_config: full layers have (head size, key-value heads) {sorted(sizes)}; expected one"
        )
    head_dim, heads = sizes.pop()
    return head_dim, heads if heads != usual["num_key_value_heads"] else None


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
    known = _known(TextSpec, config, where, ("per_layer_config", "sliding_window_pattern"))
    types = _layer_types(config, known.get("num_hidden_layers", TextSpec.num_hidden_layers), where)
    head_dim, kv_heads = _full_sizes(config, types, where)
    known |= {
        "layer_types": types,
        "global_head_dim": head_dim,
        "num_global_key_value_heads": kv_heads,
        "rope_parameters": _rope(config, where),
    }
    spec = TextSpec(**known)
    for name, supported in (
        ("attention_bias", (False,)),
        ("use_bidirectional_attention", (None, "vision")),
        ("hidden_activation", ("gelu_pytorch_tanh",)),
    ):
        if (found := getattr(spec, name)) not in supported:
            raise InputError(f"{where}.{name} is {found!r}: only {' or '.join(map(repr, supported))} is supported")
    if spec.enable_moe_block and not (spec.num_experts and spec.moe_intermediate_size):
        raise InputError(f"{where}: enable_moe_block needs num_experts, top_k_experts and moe_intermediate_size")
    if spec.enable_moe_block and not 1 <= (spec.top_k_experts or 0) <= spec.num_experts:
        raise InputError(f"{where}: top_k_experts is {spec.top_k_experts}; expected 1 to {spec.num_experts}")
    if not config.get("tie_word_embeddings", True):
        raise InputError(f"{where}.tie_word_embeddings is false: an output matrix of its own is not supported")
    owners = set(types[: spec.first_kv_shared_layer])
    if spec.num_kv_shared_layers and set(types) - owners:
        raise InputError(
            f"{where}: shared layers of type {sorted(set(types) - owners)} have no earlier layer to share with"
        )
    return spec


def _unified_vision_spec(config: dict[str, Any], where: str) -> UnifiedVisionSpec:
    return UnifiedVisionSpec(**_known(UnifiedVisionSpec, config, where, ("model_patch_size", "num_soft_tokens")))


def _unified_audio_spec(config: dict[str, Any], where: str) -> UnifiedAudioSpec:
    derived = ("hidden_size", "output_proj_dims", "audio_samples_per_token")  # the same number under other names
    return UnifiedAudioSpec(**_known(UnifiedAudioSpec, config, where, derived))


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
    if found == "gemma3n":
        from gemma_mlx.spec_gemma3n import gemma3n_spec

        return gemma3n_spec(config, where)
    if found not in ("gemma4", "gemma4_unified"):
        raise InputError(
            f"{where}: model_type is {found!r}; supported: 'gemma4' and 'gemma4_unified' (Gemma 4), 'gemma3n', "
            "'gemma3_text' (Gemma 3 270M and 1B)"
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
    text, vision, audio = (config.get(f"{part}_config") for part in ("text", "vision", "audio"))
    vision_spec, audio_spec = _vision_spec, _audio_spec
    if found == "gemma4_unified":
        text, vision_spec, audio_spec = {**UNIFIED_TEXT, **(text or {})}, _unified_vision_spec, _unified_audio_spec
    return ModelSpec(
        text=_text_spec(text or {}, f"{where}: text_config"),
        vision=None if vision is None else vision_spec(vision, f"{where}: vision_config"),
        audio=None if audio is None else audio_spec(audio, f"{where}: audio_config"),
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
