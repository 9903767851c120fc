"""Gemma 3's text decoder (270M, 1B): transformers' ``Gemma3TextModel`` in MLX."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.base import TiedDecoder
from gemma_mlx.models.blocks import attention
from gemma_mlx.models.cache import Cache, FullCache, SlidingCache
from gemma_mlx.models.decoder import MLP, KeysValues, Place, at_labels, rope_periods, rotate
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.recompute import recomputed
from gemma_mlx.spec_gemma3 import Gemma3TextSpec


class RMSNorm(nn.Module):
    """x · (mean(x²) + eps)^(−1/2) · (1 + weight) over the last axis, in float32; the result in the dtype of x.

    The sum is taken in float32, as transformers' ``Gemma3RMSNorm`` does: in bfloat16 it would lose the weight's bits.
    """

    def __init__(self, dims: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = mx.zeros((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        weight = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention, queries and keys normed, scale query_pre_attn_scalar^(−1/2) (``Gemma3Attention``)."""

    def __init__(self, spec: Gemma3TextSpec, layer: int):
        super().__init__()
        self.kind = spec.layer_types[layer]
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.scale = float(spec.query_pre_attn_scalar) ** -0.5
        hidden, d = spec.hidden_size, self.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, spec.rms_norm_eps)
        self.k_norm = RMSNorm(d, spec.rms_norm_eps)
        self._periods = rope_periods(d, spec.rope_parameters[self.kind])

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)

    def keys_values(self, x: mx.array, where: Place) -> KeysValues:
        """Normed and rotated keys, and values, each [B, kv_heads, T, d]."""
        k = self.k_norm(self._heads(self.k_proj(x), self.kv_heads)).swapaxes(1, 2)
        v = self._heads(self.v_proj(x), self.kv_heads).swapaxes(1, 2)
        return rotate(k, self._periods, where.positions), v

    def __call__(self, x: mx.array, kv: KeysValues, where: Place) -> mx.array:
        """Queries from x [B, T, hidden] on `kv` [B, kv_heads, T', d] each."""
        q = self.q_norm(self._heads(self.q_proj(x), self.heads))
        q = rotate(where.by_row(q).swapaxes(1, 2), self._periods, where.positions)
        out = attention(q, *kv, self.scale, where.masks[self.kind])
        return self.o_proj(where.in_stream(out.swapaxes(1, 2).flatten(2)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms (``Gemma3DecoderLayer``)."""

    def __init__(self, spec: Gemma3TextSpec, layer: int):
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.self_attn = Attention(spec, layer)
        self.mlp = MLP(hidden, spec.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def __call__(
        self,
        x: mx.array,
        where: Place,
        cache: SlidingCache | FullCache | None = None,
        picked: Place | None = None,
    ) -> mx.array:
        """x [B, T, hidden] -> the new stream; `cache` is this layer's.

        `picked`: of the label positions, where the stream goes on with them alone once keys and values are made.
        """
        normed = self.input_layernorm(x)
        kv = self.self_attn.keys_values(normed, where)
        if cache is not None:
            kv = cache.update(*kv)
        if picked is not None:
            where, x, normed = picked, picked.pick(x), picked.pick(normed)
        x = x + self.post_attention_layernorm(self.self_attn(normed, kv, where))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextModel(TiedDecoder):
    """Embeddings, decoder layers, final norm and the tied head."""

    def __init__(self, spec: Gemma3TextSpec):
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = [DecoderLayer(spec, i) for i in range(spec.num_hidden_layers)]
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def __call__(
        self,
        embeddings: mx.array,
        where: Place,
        cache: Cache | None = None,
        labels: LabelRows | None = None,
        recompute: int = 0,
    ) -> mx.array:
        """Embeddings [B, T, hidden] -> hidden states [B, T, hidden] after the final norm.

        Args:
            where: as from `place`, made with the same `cache`.
            labels: of a training loss: hidden states [N, hidden] of these positions alone. The last layer makes keys
                and values for all positions, and goes on with these.
            recompute: the gradient recomputes every such layer (1: all, 0: none) instead of keeping what it needs.
        """
        x, last = embeddings, len(self.layers) - 1
        picked = at_labels(where, labels, x.shape[1], x.dtype)
        for i, layer in enumerate(self.layers):
            run = recomputed(layer) if recompute and i % recompute == 0 else layer
            x = run(x, where, None if cache is None else cache.layers[i], picked if i == last else None)
        if cache is not None:
            cache.offset += embeddings.shape[1]
        return self.norm(x if labels is None else x[0])
