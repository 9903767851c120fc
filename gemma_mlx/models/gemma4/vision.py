"""Gemma 4's vision tower: patches -> soft tokens.

Module names are transformers' (``Gemma4VisionModel``), so that a checkpoint name is a module path.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.lanes import pause
from gemma_mlx.models.layers import BufferModule, ClippedLinear, RMSNorm, trains, unit_range
from gemma_mlx.ops.flash_matrix import flash_matrix, keeps_no_scores
from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.ops.patch_positions import patch_positions
from gemma_mlx.ops.qk_norm_rope import qk_norm_rope
from gemma_mlx.ops.vision_pool import vision_pool

Rope = tuple[mx.array, mx.array]


def soft_token_index(image_position_ids: np.ndarray | mx.array, pooling: int) -> np.ndarray:
    """Where the soft tokens of a padded batch of pictures lie once padding is dropped.

    Counting needs concrete values, so this is numpy and runs before a step is traced.

    Args:
        image_position_ids: [N, P, 2] integer (x, y) of each patch, −1 in padding patches.
        pooling: patches along one side of a soft token.

    Returns:
        int32 [n_total]: rows of the tower's output [N · ceil(P / pooling²), D], picture by picture, row by row.

    Raises:
        InputError: a picture's patches do not fill whole cells of pooling × pooling.
    """
    ids = np.asarray(image_position_ids)
    valid = (ids != -1).all(-1)
    cells = -(-ids.shape[1] // pooling**2)
    index = []
    for i, row in enumerate(valid):
        n = int(row.sum())
        if n:
            width, height = ids[i][row].max(0) + 1
            if width % pooling or height % pooling or n != width * height:
                raise InputError(
                    f"image_position_ids[{i}]: {n} patches in a grid of {width} × {height} do not fill cells of "
                    f"{pooling} × {pooling}; resize pictures to multiples of {pooling} patches"
                )
        index.append(np.arange(n // pooling**2) + i * cells)
    return np.concatenate(index).astype(np.int32) if index else np.zeros(0, np.int32)


def _cell_order(position_ids: mx.array, padding: mx.array, pooling: int, span: int) -> mx.array:
    """[N, P] permutation that brings the patches of each pooling cell together, cells row by row, padding last.

    All other layers treat patches as a set with positions, so the tower permutes them once, as soon as they are
    embedded (fewer numbers than pixels), and pooling becomes a reshape. `span` exceeds every x.
    """
    x, y = position_ids[..., 0], position_ids[..., 1]
    cell = (y // pooling) * span + x // pooling
    key = cell * pooling**2 + (y % pooling) * pooling + x % pooling
    return mx.argsort(mx.where(padding, mx.iinfo(mx.int32).max, key), axis=-1)


class PatchEmbedder(nn.Module):
    """Pixels in [0, 1] and patch positions -> embeddings (transformers' ``Gemma4VisionPatchEmbedder``)."""

    def __init__(self, spec):
        super().__init__()
        self.input_proj = nn.Linear(3 * spec.patch_size**2, spec.hidden_size, bias=False)
        self.position_embedding_table = mx.ones((2, spec.position_embedding_size, spec.hidden_size))

    def __call__(self, pixel_values: mx.array, position_ids: mx.array) -> mx.array:
        pixels = (2 * (unit_range(pixel_values) - 0.5)).astype(self.position_embedding_table.dtype)
        return patch_positions(self.input_proj(pixels), self.position_embedding_table, position_ids)


def axial_rope(position_ids: mx.array, head_dim: int, theta: float, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """cos and sin [N, P, 1, 2, head_dim / 4] for positions [N, P, 2]; float32 angles, cast to `dtype`.

    The first half of a head turns with x, the second with y, each with frequencies theta^(−2i / (head_dim / 2))
    (transformers' ``Gemma4VisionRotaryEmbedding``).
    """
    half = head_dim // 2
    rates = theta ** (-mx.arange(0, half, 2, dtype=mx.float32) / half)
    angle = position_ids[:, :, None, :, None].astype(mx.float32) * rates
    return mx.cos(angle).astype(dtype), mx.sin(angle).astype(dtype)


class VisionAttention(nn.Module):
    """All-to-all attention among a picture's patches (transformers' ``Gemma4VisionAttention``), scale 1.

    Called with x [N, P, hidden_size]; rope: cos and sin, as `axial_rope` gives them; mask: additive, [N, 1, 1, P];
    lengths: int [N], patches that are no padding, which lies behind them, to keep no scores for a gradient, or None.
    """

    def __init__(self, spec):
        super().__init__()
        hidden, clip = spec.hidden_size, spec.use_clipped_linears
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.q_proj = ClippedLinear(hidden, self.heads * self.head_dim, clip)
        self.k_proj = ClippedLinear(hidden, self.kv_heads * self.head_dim, clip)
        self.v_proj = ClippedLinear(hidden, self.kv_heads * self.head_dim, clip)
        self.o_proj = ClippedLinear(self.heads * self.head_dim, hidden, clip)
        self.q_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
        self.v_norm = RMSNorm(self.head_dim, spec.rms_norm_eps, with_scale=False)

    def __call__(self, x: mx.array, rope: Rope, mask: mx.array, lengths: mx.array | None = None) -> mx.array:
        n, p, _ = x.shape
        q = self.q_proj(x).reshape(n, p, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(n, p, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(n, p, self.kv_heads, self.head_dim)
        q, k, v = qk_norm_rope(q, k, v, self.q_norm.weight, self.k_norm.weight, *rope, self.q_norm.eps)
        if lengths is not None:
            return self.o_proj(flash_matrix(q, k, v, 1.0, lengths).reshape(n, p, -1))
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(n, p, -1))


class VisionMLP(nn.Module):
    """down(gelu_tanh(gate x) · up x), transformers' ``Gemma4VisionMLP``."""

    def __init__(self, spec):
        super().__init__()
        hidden, inner, clip = spec.hidden_size, spec.intermediate_size, spec.use_clipped_linears
        self.gate_proj = ClippedLinear(hidden, inner, clip)
        self.up_proj = ClippedLinear(hidden, inner, clip)
        self.down_proj = ClippedLinear(inner, hidden, clip)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class VisionEncoderLayer(nn.Module):
    """Norms before and after attention and MLP (transformers' ``Gemma4VisionEncoderLayer``)."""

    def __init__(self, spec):
        super().__init__()
        self.self_attn = VisionAttention(spec)
        self.mlp = VisionMLP(spec)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            setattr(self, f"{name}_layernorm", RMSNorm(spec.hidden_size, spec.rms_norm_eps))

    def __call__(self, x: mx.array, *among: Rope | mx.array | None) -> mx.array:
        x = pause(self.post_attention_layernorm.onto(self.self_attn(self.input_layernorm(x), *among), x))
        return pause(self.post_feedforward_layernorm.onto(self.mlp(self.pre_feedforward_layernorm(x)), x))


class VisionEncoder(nn.Module):
    """The stack of layers under the checkpoint's name ``encoder``."""

    def __init__(self, spec):
        super().__init__()
        self.layers = [VisionEncoderLayer(spec) for _ in range(spec.num_hidden_layers)]

    def __call__(self, x: mx.array, *among: Rope | mx.array | None) -> mx.array:
        """x [N, P, hidden_size] through all layers; `among`: what `VisionAttention` takes beside its x."""
        for layer in self.layers:
            x = layer(x, *among)
        return x


class VisionTower(BufferModule):
    """Patches of several pictures -> soft tokens (transformers' ``Gemma4VisionModel``).

    Args:
        spec: a vision spec with the field names of transformers' ``Gemma4VisionConfig``.
    """

    def __init__(self, spec):
        super().__init__()
        self.pooling = spec.pooling_kernel_size
        self.head_dim = spec.head_dim
        self.theta = spec.rope_theta
        self.span = spec.position_embedding_size
        self.patch_embedder = PatchEmbedder(spec)
        self.encoder = VisionEncoder(spec)
        self.standardize = spec.standardize
        if spec.standardize:
            self.add_buffer("std_bias", mx.zeros((spec.hidden_size,)))
            self.add_buffer("std_scale", mx.ones((spec.hidden_size,)))

    def __call__(
        self,
        pixel_values: np.ndarray | mx.array,
        image_position_ids: np.ndarray | mx.array,
        valid_index: mx.array | None = None,
    ) -> mx.array:
        """Soft tokens of all pictures in order, padding dropped.

        Args:
            pixel_values: [N, P, 3 · patch²], uint8 or in [0, 1].
            image_position_ids: [N, P, 2] integers, −1 in padding patches. Pictures of any shapes and order of patches.
            valid_index: `soft_token_index(image_position_ids, pooling)` as an array; give it where this call is
                traced (compiled), since it cannot be computed there.

        Returns:
            [n_total, hidden_size] in the dtype of the weights, before ``embed_vision``.
        """
        if valid_index is None:
            valid_index = mx.array(soft_token_index(image_position_ids, self.pooling))
        dense = self.encode(mx.array(pixel_values), mx.array(image_position_ids))
        return mx.take(dense.reshape(-1, dense.shape[-1]), valid_index, axis=0)

    def encode(self, pixel_values: mx.array, image_position_ids: mx.array) -> mx.array:
        """The padded form: [N, ceil(P / pooling²), hidden_size], valid soft tokens first, finite junk behind them.

        Pure array operations of shapes known beforehand: can be traced, compiled and differentiated.
        """
        positions = image_position_ids.astype(mx.int32)
        x = self.patch_embedder(pixel_values, positions)
        x, positions = self._ordered(x, positions)
        padding = (positions == -1).all(axis=-1)
        # A large finite number: with −inf a picture of padding only would give NaN, also in gradients.
        mask = mx.where(padding, mx.finfo(x.dtype).min / 2, 0).astype(x.dtype)[:, None, None, :]
        rope = axial_rope(positions, self.head_dim, self.theta, x.dtype)
        return self._pool(self.encoder(x, rope, mask, self._lengths(padding)))

    def _lengths(self, padding: mx.array) -> mx.array | None:
        """int [N], where attention is to be differentiated by a kernel; elsewhere MLX's own is as good or better."""
        if trains(self) and keeps_no_scores():
            return (~padding).sum(axis=1).astype(mx.int32)
        return None

    def _ordered(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Embedded patches in the order of pooling cells, filled up to whole cells with padding."""
        fill = -x.shape[1] % self.pooling**2
        if fill:
            x = mx.pad(x, [(0, 0), (0, fill), (0, 0)])
            positions = mx.pad(positions, [(0, 0), (0, fill), (0, 0)], constant_values=-1)
        order = _cell_order(positions, (positions == -1).all(axis=-1), self.pooling, self.span)[..., None]
        return mx.take_along_axis(x, order, axis=1), mx.take_along_axis(positions, order, axis=1)

    def _pool(self, x: mx.array) -> mx.array:
        """Mean over each cell, times sqrt(hidden_size), standardised where the checkpoint says so; float32 inside."""
        standard = (self.std_bias, self.std_scale) if self.standardize else ()
        return vision_pool(x, self.pooling**2, x.shape[-1] ** 0.5, *(a.astype(x.dtype) for a in standard))
