"""Checkpoint tensor names and layouts, and those of this library's modules.

Module paths are transformers' names. Other spellings of the same checkpoint (MLX conversions without the leading
``model.``, with channels-last convolutions and with experts under ``switch_glu``) are translated here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemma_mlx.spec import ModelSpec

_CONVOLUTION = re.compile(r"\.(conv|depthwise_conv1d|conv_exp|conv_pwl|down_conv|proj)\.weight$")
_SHARED_KV = re.compile(r"^model\.language_model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_TIED_HEADS = frozenset({"lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"})
_PARTS = ("language_model.", "vision_tower.", "vision_embedder.", "audio_tower.", "embed_vision.", "embed_audio.")
_QUANTIZED_LEAF = re.compile(r"\.(scales|biases)$")


_UNIFIED = "model.vision_embedder.", "model.embed_vision."
_UNIFIED_PROJECTION = (
    "model.embed_vision.embedding_projection.",
    "model.embed_vision.multimodal_embedder.embedding_projection.",
)


def module_path(name: str, unified: bool = False) -> str:
    """The module path of a checkpoint's tensor name: transformers' name, or unchanged where nothing is known of it.

    `unified` for Gemma 4 12B, whose files and modules name the parts of the vision embedder differently.
    """
    name = name.replace(".experts.switch_glu.", ".experts.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    path = f"model.{name}" if name.startswith(_PARTS) else name
    for stored, module in (_UNIFIED, _UNIFIED_PROJECTION) if unified else ():
        if path.startswith(stored):
            return module + path.removeprefix(stored)
    return path


def stored_name(path: str, unified: bool = False) -> str:
    """The name that published files have for a module path: `module_path` the other way round."""
    for stored, module in (_UNIFIED_PROJECTION, _UNIFIED) if unified else ():
        if path.startswith(module):
            return stored + path.removeprefix(module)
    return path


def may_be_dropped(name: str, spec: ModelSpec) -> bool:
    """Whether a checkpoint may hold this tensor (a module path) although the model has no use for it.

    That is the key and value side of layers that share another layer's, which the published files hold and nothing
    reads, and the head, which is the embedding again.
    """
    if _QUANTIZED_LEAF.sub(".weight", name) in _TIED_HEADS:
        return True
    found = _SHARED_KV.match(name)
    return bool(found) and spec.text.first_kv_shared_layer <= int(found[1]) < spec.text.num_hidden_layers


def is_shared_kv(path: str) -> bool:
    """Whether a module path names a key or value tensor of a layer, which the layer may share with another."""
    return bool(_SHARED_KV.match(path))


def to_mlx_axes(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], channels_last: bool = False
) -> tuple[int, ...] | None:
    """Axes that bring a checkpoint tensor to the module's layout; None where it stays as it is.

    Convolutions are [out, in, *kernel] in torch's layout and [out, *kernel, in] in MLX's. The shape tells which one a
    file has; where both fit (3 × 3 on three colours), `channels_last` does.
    """
    axes = _to_mlx(name, shape, wanted)
    return None if channels_last and shape == wanted else axes


def _to_mlx(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...] | None:
    if not _CONVOLUTION.search(name) or len(shape) != len(wanted) or len(shape) < 3:
        return None
    axes = (0, *range(2, len(shape)), 1)
    return axes if tuple(shape[a] for a in axes) == wanted else None


def part_of(path: str) -> str:
    """The part of the model that a path lies in, such as ``model.vision_tower``."""
    return ".".join(path.split(".")[:2])


def channels_last_parts(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The parts that a file holds in MLX's layout: those with a convolution that torch's layout does not explain.

    Args:
        stored: module path of each stored tensor -> its shape.
        wanted: path of each of the model's tensors -> its shape.
    """
    return {
        part_of(path)
        for path, shape in stored.items()
        if _CONVOLUTION.search(path) and len(shape) > 2 and shape == wanted.get(path)
        and _to_mlx(path, shape, shape) is None
    }  # fmt: skip


def to_torch_axes(name: str, rank: int) -> tuple[int, ...] | None:
    """Axes that bring a module's tensor to torch's layout; None where the two agree."""
    if not _CONVOLUTION.search(name) or rank < 3:
        return None
    return (0, rank - 1, *range(1, rank - 1))
