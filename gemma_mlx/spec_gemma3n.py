"""config.json of a Gemma 3n checkpoint (E2B, E4B) as a spec; field names are ``Gemma3nConfig``'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.spec import FULL, MAX_AUDIO_SAMPLES, SLIDING, ModelSpec, TextSpec, known_fields

MODEL_TYPE = "gemma3n"

_PATTERN = 5  # every fifth layer is full where the config does not say
_SPARSE_LAYERS, _SPARSITY = 10, 0.95
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_NO_TOKEN = -1  # no id equals it
_TEXT_READ_HERE = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern")
_VISION_INERT = (
    "architecture", "do_pooling", "label_names", "num_classes", "pretrained_cfg", "model_args", "num_labels",
)  # fmt: skip


@dataclass(frozen=True)
class Gemma3nTextSpec(TextSpec):
    """The decoder: AltUp streams, LAuReL, sparse activations, shared keys and values."""

    vocab_size: int = 262_400
    hidden_size: int = 2048
    intermediate_size: int | tuple[int, ...] = 16_384
    """MLP width of all layers, or of each."""
    num_hidden_layers: int = 35
    num_key_value_heads: int = 2
    num_kv_shared_layers: int = 15
    final_logit_softcapping: float | None = 30.0
    altup_active_idx: int = 0
    altup_coef_clip: float | None = 120.0
    altup_correct_scale: bool = True
    altup_num_inputs: int = 4
    laurel_rank: int = 64
    activation_sparsity_pattern: tuple[float, ...] = ()

    def layer_head_dim(self, layer: int) -> int:
        """Head size of `layer`: the same for all."""
        return self.head_dim

    def layer_intermediate_size(self, layer: int) -> int:
        """MLP width of `layer`."""
        width = self.intermediate_size
        return width if isinstance(width, int) else width[layer]


@dataclass(frozen=True)
class Gemma3nVisionSpec:
    """The vision tower: timm's ``mobilenetv5_300m_enc``, and the vocabulary rows that its embedder owns."""

    hidden_size: int = 2048
    vocab_size: int = 128
    vocab_offset: int = 262_144
    rms_norm_eps: float = 1e-6
    channel_multiplier: float = 1.0
    """Widths relative to the published tower (timm's argument of that name)."""
    tokens_each: int = 256
    """Soft tokens of every picture."""


@dataclass(frozen=True)
class Gemma3nAudioSpec:
    """The audio tower, and the vocabulary rows that its embedder owns."""

    hidden_size: int = 1536
    vocab_size: int = 128
    vocab_offset: int = 262_272
    input_feat_size: int = 128
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    conf_attention_chunk_size: int = 12
    conf_attention_context_left: int = 13
    conf_attention_context_right: int = 0
    conf_attention_logit_cap: float = 50.0
    conf_num_attention_heads: int = 8
    conf_num_hidden_layers: int = 12
    conf_conv_kernel_size: int = 5
    conf_reduction_factor: int = 4
    conf_residual_weight: float = 0.5
    sscp_conv_channel_size: tuple[int, int] = (128, 32)
    sscp_conv_group_norm_eps: float = 1e-3
    tokens_each: int = 188
    """Soft tokens of every clip, whatever its length."""

    @property
    def max_samples(self) -> int:
        """Samples at 16 kHz beyond which a clip is cut: 30 s."""
        return MAX_AUDIO_SAMPLES


@dataclass(frozen=True)
class Gemma3nSpec(ModelSpec):
    """A whole Gemma 3n checkpoint."""

    eoi_token_id: int = 262_144
    image_token_id: int = 262_145
    video_token_id: int = _NO_TOKEN
    eoa_token_id: int = 262_272
    audio_token_id: int = 262_273


def _per_layer(value: Any, layers: int, where: str) -> tuple:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * layers
    if len(values) != layers:
        raise InputError(f"{where}: {len(values)} entries; expected one value or one for each of {layers} layers")
    return values


def _rope(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Rotary parameters by attention type, from `rope_parameters` or from the keys of the published files."""
    given = config.get("rope_parameters") or {}
    old = {FULL: config.get("rope_theta"), SLIDING: config.get("rope_local_base_freq")}
    out = {}
    for kind in (SLIDING, FULL):
        own = given.get(kind) or {}
        if own.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise InputError(f"{where}: rotary embeddings other than 'default' are not supported for {MODEL_TYPE}")
        out[kind] = {"rope_type": "default", "rope_theta": float(own.get("rope_theta") or old[kind] or _THETA[kind])}
    return out


def _text_spec(config: dict[str, Any], where: str) -> Gemma3nTextSpec:
    known = known_fields(Gemma3nTextSpec, config, where, _TEXT_READ_HERE)
    layers = known.get("num_hidden_layers", Gemma3nTextSpec.num_hidden_layers)
    types = config.get("layer_types") or [SLIDING if (i + 1) % _PATTERN else FULL for i in range(layers)]
    types = _per_layer(types, layers, f"{where}.layer_types")
    if set(types) - {SLIDING, FULL}:
        raise InputError(f"{where}.layer_types: expected {SLIDING!r} or {FULL!r}, found {sorted(set(types))}")
    pattern = known.get("activation_sparsity_pattern")
    if pattern is None:
        sparse = _SPARSE_LAYERS if layers > _SPARSE_LAYERS else 0
        pattern = [_SPARSITY] * sparse + [0.0] * (layers - sparse)
    width = known.get("intermediate_size", Gemma3nTextSpec.intermediate_size)
    if isinstance(width, list):
        known["intermediate_size"] = _per_layer(width, layers, f"{where}.intermediate_size")
    known |= {
        "layer_types": types,
        "activation_sparsity_pattern": _per_layer(pattern, layers, f"{where}.activation_sparsity_pattern"),
        "rope_parameters": _rope(config, where),
    }
    spec = Gemma3nTextSpec(**known)
    wanted = {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh", "altup_active_idx": 0}
    for name, supported in wanted.items():
        if (found := getattr(spec, name)) != supported:
            raise InputError(f"{where}.{name} is {found!r}: only {supported!r} is supported for {MODEL_TYPE}")
    if not config.get("tie_word_embeddings", True):
        raise InputError(f"{where}.tie_word_embeddings is false: an output matrix of its own is not supported")
    if spec.num_kv_shared_layers and set(types) - set(types[: spec.first_kv_shared_layer]):
        raise InputError(f"{where}: shared layers have no earlier layer of their type to share with")
    return spec


def _vision_spec(config: dict[str, Any], soft_tokens: int, where: str) -> Gemma3nVisionSpec:
    known = known_fields(Gemma3nVisionSpec, config, where, _VISION_INERT)
    if (found := config.get("architecture", "mobilenetv5_300m_enc")) != "mobilenetv5_300m_enc":
        raise InputError(f"{where}.architecture is {found!r}: only 'mobilenetv5_300m_enc' is supported")
    arguments = dict(config.get("model_args") or {})
    width = float(arguments.pop("channel_multiplier", 1.0))
    if arguments:
        raise InputError(f"{where}.model_args: {sorted(arguments)} are not supported")
    return Gemma3nVisionSpec(**known, channel_multiplier=width, tokens_each=soft_tokens)


def _audio_spec(config: dict[str, Any], soft_tokens: int, where: str) -> Gemma3nAudioSpec:
    known = known_fields(Gemma3nAudioSpec, config, where, ("sscp_conv_kernel_size", "sscp_conv_stride_size"))
    for name, supported in (("sscp_conv_kernel_size", 3), ("sscp_conv_stride_size", 2)):
        if any(size != supported for pair in config.get(name, ()) for size in pair):
            raise InputError(f"{where}.{name} is {config[name]}: only {supported} is supported")
    if "sscp_conv_channel_size" in known:
        known["sscp_conv_channel_size"] = tuple(known["sscp_conv_channel_size"])
    spec = Gemma3nAudioSpec(**known, tokens_each=soft_tokens)
    left, chunk = spec.conf_attention_context_left, spec.conf_attention_chunk_size
    if spec.conf_attention_context_right != 0 or chunk < left - 1:
        raise InputError(f"{where}: attention context right of a frame, or beyond one chunk, is not supported")
    return spec


def gemma3n_spec(config: dict[str, Any], where: str) -> Gemma3nSpec:
    """The spec of a `gemma3n` config.

    Raises:
        InputError: a variant that is not supported.
    """
    also = (
        "text_config", "vision_config", "audio_config", "audio_soft_tokens_per_image", "eos_token_id", "pad_token_id",
        "bos_token_id",
    )  # fmt: skip
    known = known_fields(Gemma3nSpec, config, where, also)
    images, clips = (config.get(f"{kind}_soft_tokens_per_image") for kind in ("vision", "audio"))
    vision, audio = config.get("vision_config"), config.get("audio_config")
    return Gemma3nSpec(
        text=_text_spec(config.get("text_config") or {}, f"{where}: text_config"),
        vision=None if vision is None else _vision_spec(vision, images or 256, f"{where}: vision_config"),
        audio=None if audio is None else _audio_spec(audio, clips or 188, f"{where}: audio_config"),
        config=config,
        **{k: v for k, v in known.items() if k not in ("text", "vision", "audio", "config")},
    )
