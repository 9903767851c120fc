"""Gemma 4's text decoder: transformers' ``Gemma4TextModel`` in MLX.

Keys and values are explicit: a layer that owns them returns them, a layer that shares takes them as an argument. So
they are outputs and inputs of a checkpointed layer, and gradients of all consumers reach their provider.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.base import TiedDecoder
from gemma_mlx.models.blocks import Blocks, attention, block_size, blocks
from gemma_mlx.models.cache import Cache, FullCache, SlidingCache
from gemma_mlx.models.gemma4.experts import Experts, Router
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.layers import BufferModule, RMSNorm
from gemma_mlx.models.masks import additive_mask, positions_in_segments, vision_runs
from gemma_mlx.models.recompute import recomputed
from gemma_mlx.ops.gated_gelu import gated_gelu
from gemma_mlx.spec import FULL, SLIDING, TextSpec

KeysValues = tuple[mx.array, mx.array]
Mask = Blocks | mx.array | str | None
_NO_ROTATION = 1e30  # a period: finite, because fast-math may treat 1/inf as it likes


def _scaled(x: mx.array, factor: float) -> mx.array:
    """x · factor with the product taken in float32: MLX would first round a Python float to bfloat16."""
    return (x.astype(mx.float32) * factor).astype(x.dtype)


def rope_periods(dims: int, parameters: dict) -> mx.array:
    """Periods [dims/2] in float32 of the rotary embedding over `dims` elements, element i paired with i + dims/2.

    "default" rotates all pairs, by theta^(−2i/dims) a position; "proportional" the first `partial_rotary_factor` of
    them with the same exponents, and leaves the others alone (transformers' ``ROPE_INIT_FUNCTIONS``).
    """
    theta, rotated = float(parameters["rope_theta"]), dims // 2
    if parameters.get("rope_type") == "proportional":
        rotated = int(float(parameters.get("partial_rotary_factor", 1.0)) * dims // 2)
    periods = np.full(dims // 2, _NO_ROTATION, np.float32)
    periods[:rotated] = theta ** (2 * np.arange(rotated, dtype=np.float64) / dims)
    if parameters.get("rope_type") == "proportional":
        periods[:rotated] *= float(parameters.get("factor", 1.0))
    return mx.array(periods)


def rotate(x: mx.array, periods: mx.array, positions: int | mx.array) -> mx.array:
    """Rotary embedding of x [B, heads, T, d].

    `positions` is the first of T consecutive positions, one for all rows or int [B], or int [B or 1, T] where they are
    not consecutive.
    """
    if isinstance(positions, int) or positions.ndim == 1:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=positions, freqs=periods)
    # The reciprocal, as in mx.fast.rope: queries picked from a row turn exactly as they do within it.
    angles = positions[:, None, :, None].astype(mx.float32) * mx.reciprocal(periods)
    cos, sin = mx.cos(angles), mx.sin(angles)
    a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Place:
    """Where the queries of one call stand, for every layer alike.

    `positions` as `rotate` takes them; `masks` by attention type as `scaled_dot_product_attention` takes them: None
    (everything is seen), "causal" (lower right aligned) or an additive array; or blocks. With `labels` the stream holds
    label positions alone, [1, N, …], and positions and masks are by row: [B, n] and [B, 1, n, T].
    """

    positions: int | mx.array
    masks: dict[str, Mask]
    labels: LabelRows | None = None

    def by_row(self, x: mx.array) -> mx.array:
        """The stream's queries [B or 1, T, ...] as rows that can meet their keys."""
        return x if self.labels is None else self.labels.by_row(x)

    def in_stream(self, x: mx.array) -> mx.array:
        """What attention gives [B, T, ...] in the stream's layout."""
        return x if self.labels is None else self.labels.in_line(x)

    def pick(self, x: mx.array | None) -> mx.array | None:
        """Label positions of x [..., B, T, d], [..., 1, N, d]."""
        return None if x is None else self.labels.pick(x)

    def pick_layers(self, x: mx.array | None) -> mx.array | None:
        """Label positions of per-layer inputs [B, T, layers, width], [1, N, layers, width]."""
        return None if x is None else self.labels.pick(x.flatten(2)).reshape(1, -1, *x.shape[2:])


def at_labels(where: Place, labels: LabelRows | None, length: int, dtype: mx.Dtype) -> Place | None:
    """The place of label positions among all `length` positions of their rows, whose place is `where`."""
    if labels is None:
        return None
    columns, positions = labels.columns, where.positions
    masks: dict[str, Mask] = {}
    for kind, mask in where.masks.items():
        if isinstance(mask, Blocks):
            masks[kind] = mask.rows(columns, length, dtype)
        elif isinstance(mask, str):
            past = positions if isinstance(positions, int) else 0
            masks[kind] = additive_mask(columns + past, mx.arange(past + length), None, None, dtype)
        elif mask is None or mask.shape[0] == 1:
            masks[kind] = None if mask is None else mask[0, 0][columns][:, None]
        else:
            masks[kind] = mx.take_along_axis(mask, columns[:, None, :, None], axis=2)
    if isinstance(positions, int):
        positions = columns + positions
    elif positions.ndim == 1:
        positions = columns + positions[:, None]
    else:
        positions = mx.take_along_axis(mx.broadcast_to(positions, (columns.shape[0], length)), columns, axis=1)
    return Place(positions, masks, labels)


def place(
    spec: TextSpec,
    length: int,
    dtype: mx.Dtype,
    valid: mx.array | None = None,
    cache: Cache | None = None,
    mm_token_type_ids: mx.array | None = None,
    segment_ids: mx.array | None = None,
) -> Place:
    """The place of `length` consecutive tokens after those that `cache` has seen.

    Args:
        valid: bool [B, offset + length], false on padding; None where there is none, or only on the right (a causal
            mask hides padding on the right from every real token).
        mm_token_type_ids: int [B, length], of models whose pictures see themselves whole; None for causal attention
            alone. A picture cut over two calls sees only what has been given so far.
        segment_ids: int [B, length], the same number along each of the samples that lie end to end in a row: each
            sees itself alone and counts its positions from 0. Not with a cache.
    """
    if segment_ids is not None and cache is not None:
        raise InputError("segment_ids: packed rows are read whole; leave out the cache, or the segment_ids")
    runs = None
    if mm_token_type_ids is not None and spec.bidirectional_vision and length > 1:
        runs = vision_runs(mm_token_type_ids)
    offset = 0 if cache is None else cache.offset
    masks: dict[str, Mask] = {}
    for kind, window in ((FULL, None), (SLIDING, spec.sliding_window)):
        n_keys = length + (0 if cache is None else cache.held(kind))
        if length == 1 and segment_ids is None:  # all that a layer holds is near enough
            least, own = mx.array(mx.finfo(dtype).min, dtype), mx.array(0, dtype)
            masks[kind] = None if valid is None else mx.where(valid[:, None, None, -n_keys:], own, least)
            continue
        own_runs = runs if kind == SLIDING or spec.vision_runs == "all" else None
        if valid is None and own_runs is None and cache is None and length > block_size():
            masks[kind] = blocks(length, window, dtype, segment_ids)
            continue
        if valid is None and own_runs is None and segment_ids is None and (window is None or n_keys <= window):
            masks[kind] = None if length == 1 else "causal"
            continue
        queries = mx.arange(offset, offset + length)[None]
        keys = mx.arange(offset + length - n_keys, offset + length)
        seen = None if valid is None else valid[:, -n_keys:]
        segments = None if segment_ids is None else (segment_ids, segment_ids)
        masks[kind] = additive_mask(
            queries, keys, window, seen, dtype, own_runs, spec.vision_runs == "sliding", segments
        )
    positions = offset if cache is None else cache.positions()
    return Place(positions if segment_ids is None else positions_in_segments(segment_ids), masks)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, scale 1 (transformers' ``Gemma4TextAttention``)."""

    def __init__(self, spec: TextSpec, layer: int):
        super().__init__()
        self.kind = spec.layer_types[layer]
        self.heads, self.kv_heads = spec.num_attention_heads, spec.layer_kv_heads(layer)
        self.head_dim = spec.layer_head_dim(layer)
        self.owns_kv = layer < spec.first_kv_shared_layer
        hidden, d = spec.hidden_size, self.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, spec.rms_norm_eps)
        if self.owns_kv:
            self.k_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
            if not spec.layer_k_eq_v(layer):
                self.v_proj = nn.Linear(hidden, self.kv_heads * d, bias=False)
            self.k_norm = RMSNorm(d, spec.rms_norm_eps)
            self.v_norm = RMSNorm(d, spec.rms_norm_eps, with_scale=False)
        self._periods = rope_periods(d, spec.rope_parameters[self.kind])

    def keys_values(self, x: mx.array, where: Place) -> KeysValues:
        """Normed and rotated keys, normed values, each [B, kv_heads, T, d]. Only where the layer owns them."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        k = self.k_proj(x).reshape(shape)
        v = self.v_proj(x).reshape(shape) if "v_proj" in self else k
        k, v = self.k_norm(k).swapaxes(1, 2), self.v_norm(v).swapaxes(1, 2)
        return rotate(k, self._periods, where.positions), v

    def __call__(self, x: mx.array, kv: KeysValues, where: Place) -> mx.array:
        """Queries from x [B, T, hidden] on `kv` [B, kv_heads, T', d] each."""
        q = self.q_norm(self.q_proj(x).reshape(*x.shape[:2], self.heads, self.head_dim))
        q = rotate(where.by_row(q).swapaxes(1, 2), self._periods, where.positions)
        out = attention(q, *kv, 1.0, where.masks[self.kind])
        return self.o_proj(where.in_stream(out.swapaxes(1, 2).flatten(2)))


class MLP(nn.Module):
    """down(gelu_tanh(gate x) ⊙ up x)."""

    def __init__(self, dims: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, width, bias=False)
        self.up_proj = nn.Linear(dims, width, bias=False)
        self.down_proj = nn.Linear(width, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(BufferModule):
    """Attention, MLP and per-layer embedding, each between two norms, then the layer's scalar over the whole stream."""

    def __init__(self, spec: TextSpec, layer: int):
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.self_attn = Attention(spec, layer)
        self.mlp = MLP(hidden, spec.layer_intermediate_size(layer))
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.add_buffer("layer_scalar", mx.ones((1,)))
        if spec.enable_moe_block:
            self.router = Router(spec)
            self.experts = Experts(spec)
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        if spec.hidden_size_per_layer_input:
            self.per_layer_input_gate = nn.Linear(hidden, spec.hidden_size_per_layer_input, bias=False)
            self.per_layer_projection = nn.Linear(spec.hidden_size_per_layer_input, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)

    def __call__(
        self,
        x: mx.array,
        per_layer_input: mx.array | None,
        where: Place,
        kv: KeysValues | None = None,
        cache: SlidingCache | FullCache | None = None,
        picked: Place | None = None,
    ) -> tuple[mx.array, KeysValues]:
        """One layer over x [B, T, hidden].

        Args:
            per_layer_input: [B, T, hidden_size_per_layer_input], this layer's share.
            kv: the provider's keys and values where this layer shares them; None where it owns its own.
            cache: of this layer, where it owns its keys and values.
            picked: of the label positions, where the stream goes on with them alone once keys and values are made.

        Returns:
            The new stream, and the keys and values that were attended to.
        """
        normed = self.input_layernorm(x)
        if kv is None:
            kv = self.self_attn.keys_values(normed, where)
            if cache is not None:
                kv = cache.update(*kv)
        if picked is not None:
            where, x, normed, per_layer_input = picked, *map(picked.pick, (x, normed, per_layer_input))
        x = self.post_attention_layernorm.onto(self.self_attn(normed, kv, where), x)
        if per_layer_input is None:
            return self.post_feedforward_layernorm.onto(self._feed_forward(x), x, scale=self.layer_scalar), kv
        x = self.post_feedforward_layernorm.onto(self._feed_forward(x), x)
        gated = gated_gelu(self.per_layer_input_gate(x), per_layer_input)
        return self.post_per_layer_input_norm.onto(self.per_layer_projection(gated), x, scale=self.layer_scalar), kv

    def _feed_forward(self, x: mx.array) -> mx.array:
        """The MLP; where there are experts, plus what those give whom the router picks by the stream itself."""
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if "experts" not in self:
            return dense
        chosen = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
        return self.post_feedforward_layernorm_1.onto(dense, self.post_feedforward_layernorm_2(chosen))


def through_layers(
    layers: list[nn.Module],
    spec: TextSpec,
    x: mx.array,
    per_layer: mx.array | None,
    where: Place,
    cache: Cache | None,
    picked: Place | None,
    recompute: int,
) -> mx.array:
    """The stream x (Gemma 3n: streams) through layers of which the upper ones share keys and values.

    `picked`: as from `at_labels`; the last layer that owns keys and values makes them for all positions, and goes on
    with these. The rest as for `TextModel`.
    """
    shared: dict[int, KeysValues] = {}
    last_owner = spec.first_kv_shared_layer - 1
    for i, layer in enumerate(layers):
        provider = spec.kv_provider(i)
        run = recomputed(layer) if recompute and i % recompute == 0 else layer
        x, kv = run(
            x,
            None if per_layer is None else per_layer[:, :, i],
            where,
            kv=None if provider == i else shared[provider],
            cache=None if cache is None or provider != i else cache.layers[i],
            picked=picked if i == last_owner else None,
        )
        if provider == i:
            shared[i] = kv
        if picked is not None and i == last_owner:
            where, per_layer = picked, picked.pick_layers(per_layer)
    return x


class TextModel(TiedDecoder):
    """Embeddings, per-layer embeddings, decoder layers, final norm and the tied head."""

    def __init__(self, spec: TextSpec):
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = [DecoderLayer(spec, i) for i in range(spec.num_hidden_layers)]
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        if width := spec.hidden_size_per_layer_input:
            packed = spec.num_hidden_layers * width
            self.embed_tokens_per_layer = nn.Embedding(spec.vocab_size_per_layer_input, packed)
            self.per_layer_model_projection = nn.Linear(spec.hidden_size, packed, bias=False)
            self.per_layer_projection_norm = RMSNorm(width, spec.rms_norm_eps)

    def per_layer_inputs(
        self, input_ids: mx.array, embeddings: mx.array, rows: mx.array | None = None
    ) -> mx.array | None:
        """Per-layer embeddings [B, T, layers, width]: a row by token id plus a projection of the spliced embeddings.

        At soft slots `input_ids` must hold the pad id: the id part there is pad's row, not zero. `rows` if they were
        read before (see `Gemma4.per_layer_ids`).
        """
        width = self.spec.hidden_size_per_layer_input
        if not width:
            return None
        shape = (*input_ids.shape, self.spec.num_hidden_layers, width)
        rows = self.embed_tokens_per_layer(input_ids) if rows is None else rows
        rows = (rows * mx.array(width**0.5, rows.dtype)).reshape(shape)
        context = _scaled(self.per_layer_model_projection(embeddings), self.spec.hidden_size**-0.5)
        context = self.per_layer_projection_norm(context.reshape(shape))
        return _scaled(context + rows, 2.0**-0.5)

    def __call__(
        self,
        embeddings: mx.array,
        per_layer: mx.array | None,
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
                keys and values makes them for all positions, and goes on with these.
            recompute: the gradient recomputes every such layer (1: all, 0: none) instead of keeping what it needs.
        """
        picked = at_labels(where, labels, embeddings.shape[1], embeddings.dtype)
        x = through_layers(self.layers, self.spec, embeddings, per_layer, where, cache, picked, recompute)
        if cache is not None:
            cache.offset += embeddings.shape[1]
        return self.norm(x if labels is None else x[0])
