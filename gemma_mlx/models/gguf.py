"""Weights of a GGUF file, unpacked to floating point, under this library's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import open_gguf

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""llama.cpp's name of a part of a layer -> its module."""


def gguf_path(name: str) -> str | None:
    """The module path of a GGUF tensor's name; None where nothing is known of it."""
    if name in _TOP:
        return _TOP[name]
    found = _BLOCK.fullmatch(name)
    part = PARTS.get(found[2]) if found else None
    return f"model.layers.{found[1]}.{part}.weight" if part else None


def check_gguf(path: str | Path, wanted: dict[str, tuple[int, ...]], allow_unexpected: bool = False) -> dict[str, Any]:
    """Module path -> the file's tensor of every parameter, nothing unpacked yet.

    Args:
        wanted: module path -> shape of every parameter of the model.

    Raises:
        InputError: a tensor is missing, misshapen or unexpected.
    """
    reader, found = open_gguf(path), {}
    unexpected = sorted(t.name for t in reader.tensors if gguf_path(t.name) not in wanted)
    if unexpected and not allow_unexpected:
        raise InputError(
            f"{path}: {len(unexpected)} unexpected tensors, {unexpected[0]} first; --allow-unexpected ignores them"
        )
    for tensor in reader.tensors:
        name = gguf_path(tensor.name)
        if name not in wanted:
            continue
        shape, expected = tuple(int(n) for n in reversed(tensor.shape.tolist())), wanted[name]
        if shape != expected:
            raise InputError(
                f"{path}: {tensor.name} has shape {list(shape)}, the file's metadata make it {list(expected)}"
            )
        found[name] = tensor
    if missing := sorted(set(wanted) - set(found)):
        raise InputError(f"{path}: {len(missing)} missing tensors, {missing[0]} first; convert the model again")
    return found


def gguf_weights(
    path: str | Path, wanted: dict[str, tuple[int, ...]], dtype: mx.Dtype, allow_unexpected: bool = False
) -> list[tuple[str, mx.array]]:
    """(module path, weight) of every tensor of a file, in `dtype`; packed ones are unpacked one by one.

    llama.cpp's norms multiply by the stored weight, Gemma 3's by one more than the checkpoint's: the one is taken off.

    Raises:
        InputError: as `check_gguf`, or a tensor is packed in a way that `gguf` cannot unpack.
    """
    tensors, weights = check_gguf(path, wanted, allow_unexpected), []
    from gguf import dequantize

    for name, tensor in tensors.items():
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise InputError(f"{path}: {tensor.name} is packed as {kind}, which cannot be unpacked here") from None
        array = mx.array(values.reshape(wanted[name]))
        array = (array - 1.0 if "norm" in tensor.name else array).astype(dtype)
        mx.eval(array)
        weights.append((name, array))
    return weights
