"""Gemma 3n's text decoder: transformers' ``Gemma3nTextModel`` in MLX.

Four residual streams that a layer predicts, computes one of and corrects (AltUp, arXiv 2301.13310), a learned low-rank
residual (LAuReL, arXiv 2411.07501), sparse activations in the first layers, per-layer embeddings on the streams that
are not computed. Keys and values are explicit, as in Gemma 4's decoder: owners return them, sharers take them.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.base import TiedDecoder
from gemma_mlx.models.blocks import attention
from gemma_mlx.models.cache import Cache, FullCache, SlidingCache
from gemma_mlx.models.decoder import MLP, KeysValues, Place, at_labels, rope_periods, rotate, through_layers
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.layers import RMSNorm
from gemma_mlx.ops.altup_correct import altup_correct
from gemma_mlx.ops.altup_predict import altup_predict
from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.ops.sparse_gelu import sparse_gelu
from gemma_mlx.spec_gemma3n import Gemma3nTextSpec

Streams = tuple[mx.array, mx.array]
"""The residual stream that layers compute [B, T, hidden], and the others [streams − 1, B, T, hidden]: two arrays, since
the gradient of a slice is as large as what it was cut from."""
_LEAST_MAGNITUDE = 1e-5


def _constant(value: float, like: mx.array) -> mx.array:
    """A factor in the dtype of `like`, as the reference rounds it."""
    return mx.array(value, like.dtype)


def _mean_square(x: mx.array) -> mx.array:
    return mx.mean(mx.square(x.astype(mx.float32)), axis=-1, keepdims=True)


def rescaled(x: mx.array, target: mx.array) -> mx.array:
    """x brought to the root mean square `target` [..., 1] (float32) over its last axis."""
    factor = target / mx.sqrt(mx.maximum(_mean_square(x), _LEAST_MAGNITUDE))
    return (x.astype(mx.float32) * factor).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, scale 1 (transformers' ``Gemma3nTextAttention``)."""

    def __init__(self, spec: Gemma3nTextSpec, layer: int):
        super().__init__()
        self.kind = spec.layer_types[layer]
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        hidden, d, eps = spec.hidden_size, spec.head_dim, spec.rms_norm_eps
        self.q_proj = nn.Linear(hidden, self.heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, eps)
        if layer < spec.first_kv_shared_layer:
            self.k_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
            self.v_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
            self.k_norm = RMSNorm(d, eps)
            self.v_norm = RMSNorm(d, eps, with_scale=False)
        self._periods = rope_periods(d, spec.rope_parameters[self.kind])

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)

    def keys_values(self, x: mx.array, where: Place) -> KeysValues:
        """Normed and rotated keys, normed values, each [B, kv_heads, T, d]. Only where the layer owns them."""
        k = self.k_norm(self._split(self.k_proj(x), self.kv_heads)).swapaxes(1, 2)
        v = self.v_norm(self._split(self.v_proj(x), self.kv_heads)).swapaxes(1, 2)
        return rotate(k, self._periods, where.positions), v

    def __call__(self, x: mx.array, kv: KeysValues, where: Place) -> mx.array:
        """Queries from x [B, T, hidden] on `kv` [B, kv_heads, T', d] each."""
        q = self.q_norm(self._split(self.q_proj(x), self.heads))
        q = rotate(where.by_row(q).swapaxes(1, 2), self._periods, where.positions)
        out = attention(q, *kv, 1.0, where.masks[self.kind])
        return self.o_proj(where.in_stream(out.swapaxes(1, 2).flatten(2)))


class SparseMLP(MLP):
    """down(gelu_tanh(top(gate x)) ⊙ up x), where `top` keeps about 1 − sparsity of the values."""

    def __init__(self, dims: int, width: int, sparsity: float):
        super().__init__(dims, width)
        self.sparsity = sparsity

    def __call__(self, x: mx.array) -> mx.array:
        if self.sparsity <= 0:
            return super().__call__(x)
        return self.down_proj(sparse_gelu(self.gate_proj(x), self.up_proj(x), self.sparsity))


class Laurel(nn.Module):
    """x + norm(right(left x)) (transformers' ``Gemma3nTextLaurelBlock``)."""

    def __init__(self, spec: Gemma3nTextSpec):
        super().__init__()
        self.linear_left = nn.Linear(spec.hidden_size, spec.laurel_rank, bias=False)
        self.linear_right = nn.Linear(spec.laurel_rank, spec.hidden_size, bias=False)
        self.post_laurel_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.post_laurel_norm.onto(self.linear_right(self.linear_left(x)), x)


class AltUp(nn.Module):
    """Predicts all streams from all streams, and corrects them by what the active one became (``Gemma3nTextAltUp``).

    In training the two coefficient matrices are clamped to ±`altup_coef_clip`. The reference clamps the first one's
    stored values, so that its gradient is that at the clamped value, everywhere; and the second one's use, so that
    its gradient is zero outside the bound.
    """

    def __init__(self, spec: Gemma3nTextSpec):
        super().__init__()
        self.streams, self.clip, hidden = spec.altup_num_inputs, spec.altup_coef_clip, spec.hidden_size
        self.correct_output_scale = mx.zeros((hidden,))
        self.correction_coefs = nn.Linear(self.streams, self.streams, bias=False)
        self.prediction_coefs = nn.Linear(self.streams, self.streams**2, bias=False)
        self.modality_router = nn.Linear(hidden, self.streams, bias=False)
        self.router_norm = RMSNorm(hidden, spec.rms_norm_eps)
        self._scale = 1.0 / hidden

    def _coefficients(self, linear: nn.Linear, modalities: mx.array, through: bool) -> mx.array:
        if not self.training or self.clip is None or not isinstance(linear, nn.Linear) or "scales" in linear:
            return linear(modalities)
        clamped = mx.clip(linear.weight, -self.clip, self.clip)
        if through:
            clamped = linear.weight + mx.stop_gradient(clamped - linear.weight)
        return modalities @ clamped.T

    def _modalities(self, x: mx.array) -> mx.array:
        """[B, T, streams] in (−1, 1)."""
        x = self.router_norm(x)
        return mx.tanh(self.modality_router(x * _constant(self._scale, x)).astype(mx.float32)).astype(x.dtype)

    def predict(self, streams: Streams) -> Streams:
        """Each stream plus a mix of all."""
        mix = self._coefficients(self.prediction_coefs, self._modalities(streams[0]), through=True)
        mix = mix.reshape(*mix.shape[:-1], self.streams, self.streams)  # [B, T, to, from]
        return altup_predict(*streams, mix)

    def shares(self, activated: mx.array) -> mx.array:
        """[B, T, streams]: the share of each stream in what the layer's result adds to the active one's prediction."""
        return self._coefficients(self.correction_coefs, self._modalities(activated), through=False) + 1


class DecoderLayer(nn.Module):
    """One layer over all streams (transformers' ``Gemma3nTextDecoderLayer``)."""

    def __init__(self, spec: Gemma3nTextSpec, layer: int):
        super().__init__()
        hidden, eps, width = spec.hidden_size, spec.rms_norm_eps, spec.hidden_size_per_layer_input
        self.self_attn = Attention(spec, layer)
        self.mlp = SparseMLP(hidden, spec.layer_intermediate_size(layer), spec.activation_sparsity_pattern[layer])
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.altup = AltUp(spec)
        self.laurel = Laurel(spec)
        self.per_layer_input_gate = nn.Linear(hidden, width, bias=False)
        self.per_layer_projection = nn.Linear(width, hidden, bias=False)
        self.post_per_layer_input_norm = RMSNorm(hidden, eps)
        self.correct_scale = spec.altup_correct_scale

    def __call__(
        self,
        streams: Streams,
        per_layer_input: mx.array,
        where: Place,
        kv: KeysValues | None = None,
        cache: SlidingCache | FullCache | None = None,
        picked: Place | None = None,
    ) -> tuple[Streams, KeysValues]:
        """One layer over all streams.

        Args:
            per_layer_input: [B, T, hidden_size_per_layer_input], this layer's; added to all streams but the first.
            kv: the provider's keys and values where this layer shares them; None where it owns its own.
            cache: of this layer, where it owns its keys and values.
            picked: of the label positions, where the streams go on with them alone once keys and values are made.

        Returns:
            The new streams, and the keys and values that were attended to.
        """
        active, rest = self.altup.predict(streams)
        normed = self.input_layernorm(active)
        if kv is None:
            kv = self.self_attn.keys_values(normed, where)
            if cache is not None:
                kv = cache.update(*kv)
        if picked is not None:
            active, rest, normed, per_layer_input = map(picked.pick, (active, rest, normed, per_layer_input))
            where = picked
        x = self.post_attention_layernorm.onto(self.self_attn(normed, kv, where), active)
        x = (x + self.laurel(normed)) / math.sqrt(2)
        x = self.post_feedforward_layernorm.onto(self.mlp(self.pre_feedforward_layernorm(x)), x)
        shares = self.altup.shares(x)
        first = active + shares[..., :1] * (x - active)
        scaled = first * self.altup.correct_output_scale.astype(first.dtype) if self.correct_scale else first
        gated = gated_gelu(self.per_layer_input_gate(scaled), per_layer_input)
        added = self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return (first, altup_correct(active, rest, x, shares[..., 1:], added)), kv


class TextModel(TiedDecoder):
    """Embeddings, per-layer embeddings, streams, decoder layers, final norm and the tied head."""

    def __init__(self, spec: Gemma3nTextSpec):
        super().__init__()
        self.spec = spec
        hidden, packed = spec.hidden_size, spec.num_hidden_layers * spec.hidden_size_per_layer_input
        self.embed_tokens = nn.Embedding(spec.vocab_size, hidden)
        self.layers = [DecoderLayer(spec, i) for i in range(spec.num_hidden_layers)]
        self.norm = RMSNorm(hidden, spec.rms_norm_eps)
        self.embed_tokens_per_layer = nn.Embedding(spec.vocab_size_per_layer_input, packed)
        self.per_layer_model_projection = nn.Linear(hidden, packed, bias=False)
        self.per_layer_projection_norm = RMSNorm(spec.hidden_size_per_layer_input, spec.rms_norm_eps)
        others = range(1, spec.altup_num_inputs)
        self.altup_projections = [nn.Linear(hidden, hidden, bias=False) for _ in others]
        self.altup_unembed_projections = [nn.Linear(hidden, hidden, bias=False) for _ in others]

    def per_layer_rows(self, input_ids: mx.array) -> mx.array:
        """Rows [B, T, layers · width] by token id; ids beyond the table (vision's and audio's) take row 0."""
        within = (input_ids >= 0) & (input_ids < self.spec.vocab_size_per_layer_input)
        return self.embed_tokens_per_layer(mx.where(within, input_ids, 0))

    def per_layer_inputs(self, input_ids: mx.array, embeddings: mx.array, rows: mx.array | None = None) -> mx.array:
        """Per-layer embeddings [B, T, layers, width]: a row by token id plus a projection of the spliced embeddings.

        `rows`: those of `per_layer_rows`, if they were read before.
        """
        spec = self.spec
        shape = (*input_ids.shape, spec.num_hidden_layers, spec.hidden_size_per_layer_input)
        rows = self.per_layer_rows(input_ids) if rows is None else rows
        rows = (rows * _constant(spec.hidden_size_per_layer_input**0.5, rows)).reshape(shape)
        context = self.per_layer_model_projection(embeddings)
        context = (context * _constant(spec.hidden_size**-0.5, context)).reshape(shape)
        return (self.per_layer_projection_norm(context) + rows) * _constant(2.0**-0.5, context)

    def __call__(
        self,
        embeddings: mx.array,
        per_layer: mx.array,
        where: Place,
        cache: Cache | None = None,
        labels: LabelRows | None = None,
        recompute: int = 0,
    ) -> mx.array:
        """Embeddings [B, T, hidden] (soft tokens spliced in) -> hidden states [B, T, hidden] after the final norm.

        Args:
            per_layer: as from `per_layer_inputs`.
            where: as from `place`, made with the same `cache`.
            labels: of a training loss: hidden states [N, hidden] of these positions alone. The last layer that owns
                keys and values makes them for all positions, and goes on with these, in all streams.
            recompute: the gradient recomputes every such layer (1: all, 0: none) instead of keeping what it needs.
        """
        picked, streams = at_labels(where, labels, embeddings.shape[1], embeddings.dtype), self.spread(embeddings)
        streams = through_layers(self.layers, self.spec, streams, per_layer, where, cache, picked, recompute)
        if cache is not None:
            cache.offset += embeddings.shape[1]
        x = self.norm(self.gather(streams))
        return x if labels is None else x[0]

    def spread(self, x: mx.array) -> Streams:
        """[B, T, hidden] -> streams: itself, and projections of the same magnitude."""
        target = mx.sqrt(_mean_square(x))
        return x, mx.stack([rescaled(project(x), target) for project in self.altup_projections])

    def gather(self, streams: Streams) -> mx.array:
        """Streams -> [B, T, hidden]: the mean of the first and of projections of the others in its magnitude."""
        first, others = streams
        target = mx.sqrt(_mean_square(first))
        pairs = zip(self.altup_unembed_projections, others, strict=True)
        return mx.mean(mx.stack([first, *(rescaled(project(s), target) for project, s in pairs)]), axis=0)
