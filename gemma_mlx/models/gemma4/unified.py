"""Gemma 4 12B's encoder-free pictures: merged patches -> soft tokens, without a tower.

Module names are transformers' (``Gemma4UnifiedVisionEmbedder``); published files have other names for the tensors, see
`gemma_mlx.models.names`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.layers import MultimodalEmbedder, unit_range
from gemma_mlx.spec_gemma4_unified import UnifiedVisionSpec


def _normed(norm: nn.LayerNorm, x: mx.array, rows: int) -> mx.array:
    """LayerNorm of x [..., n] whose sums are taken over n / rows values first, then over rows, the mean's twice.

    On a CPU MLX adds one by one: over the 6,912 values of a bright patch the mean is off by 5e-5, which the division by
    a small deviation makes 4e-3.
    """
    parts = x.astype(mx.float32).reshape(*x.shape[:-1], rows, -1)
    for _ in range(2):  # the second time over small numbers, whose sum is nearly exact
        parts = parts - parts.mean(-1, keepdims=True).mean(-2, keepdims=True)
    variance = mx.square(parts).mean(-1, keepdims=True).mean(-2, keepdims=True)
    out = (parts * mx.rsqrt(variance + norm.eps)).reshape(x.shape)
    return (out * norm.weight + norm.bias).astype(x.dtype)


class UnifiedVisionEmbedder(nn.Module):
    """LayerNorm, dense, LayerNorm, plus a position's two vectors, LayerNorm, then the multimodal embedder."""

    def __init__(self, spec: UnifiedVisionSpec, text_dims: int):
        super().__init__()
        patch_dims, dims = 3 * spec.input_patch**2, spec.mm_embed_dim
        self.patch_rows = 3 * spec.input_patch
        self.patch_ln1 = nn.LayerNorm(patch_dims)
        self.patch_dense = nn.Linear(patch_dims, dims)
        self.patch_ln2 = nn.LayerNorm(dims)
        self.pos_embedding = mx.zeros((spec.mm_posemb_size, 2, dims))
        self.pos_norm = nn.LayerNorm(dims)
        self.multimodal_embedder = MultimodalEmbedder(dims, text_dims, spec.rms_norm_eps)

    def __call__(self, pixel_values: mx.array, image_position_ids: mx.array) -> mx.array:
        """Soft tokens [N, P, text_dims], junk in padding.

        Args:
            pixel_values: [N, P, 3 · patch²], uint8 or in [0, 1], one merged patch a soft token.
            image_position_ids: int [N, P, 2], (x, y) in merged patches, −1 in padding.
        """
        x = _normed(self.patch_ln1, unit_range(pixel_values).astype(self.pos_embedding.dtype), self.patch_rows)
        x = self.patch_ln2(self.patch_dense(x))
        for axis in (0, 1):
            at = image_position_ids[..., axis]
            rows = mx.take(self.pos_embedding[:, axis], mx.maximum(at, 0), axis=0)
            x = x + mx.where((at >= 0)[..., None], rows, 0).astype(x.dtype)
        return self.multimodal_embedder(self.pos_norm(x))
