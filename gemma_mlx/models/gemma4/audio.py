"""Gemma 4's audio tower: log-mel frames -> soft tokens, a conformer with banded relative attention.

Module names are transformers' (``Gemma4AudioModel``), so that a checkpoint name is a module path. Convolution weights
are channels-last, as MLX has them. The architecture is that of the Universal Speech Model (arXiv 2303.01037).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.conformer import relative_positions
from gemma_mlx.models.layers import ClippedLinear, RMSNorm
from gemma_mlx.ops.banded_attention import banded_attention
from gemma_mlx.ops.custom import contiguous
from gemma_mlx.ops.device import on_gpu
from gemma_mlx.ops.glu_conv import glu_conv, limited
from gemma_mlx.ops.norm_relu import norm_relu


def soft_token_index(input_features_mask: np.ndarray | mx.array) -> np.ndarray:
    """Where the soft tokens of a padded batch of clips lie once padding is dropped.

    Counting needs concrete values, so this is numpy and runs before a step is traced.

    Args:
        input_features_mask: bool [M, F], true on valid frames.

    Returns:
        int32 [m_total]: rows of the tower's output [M · ceil(F / 4), D], clip by clip.
    """
    return np.flatnonzero(np.asarray(input_features_mask)[:, ::4]).astype(np.int32)


def _strided_conv(x: mx.array, weight: mx.array) -> mx.array:
    """3 × 3 convolution, stride 2, padding 1: x [M, T, F, C], weight [O, 3, 3, C] -> [M, ceil(T/2), ceil(F/2), O].

    MLX's CPU convolution has a slow gradient to its input; nine matrix products take 2/3 of its time forward and 1/4
    forward and backward (8 × 100 × 64 × 128 channels: 51 -> 34 ms, 848 -> 192 ms). With one input channel, whose
    input is data and needs no gradient, windows are cheap and one product takes half the convolution's time (16 × 150
    × 128 to 128 channels: 46 -> 24 ms). On a GPU the convolution it is.
    """
    if on_gpu():
        return mx.conv2d(x, weight, stride=2, padding=1)
    return _strided_conv_by_windows(x, weight) if x.shape[-1] == 1 else _strided_conv_by_taps(x, weight)


def _strided_conv_by_windows(x: mx.array, weight: mx.array) -> mx.array:
    m, t, f, _ = x.shape
    out_t, out_f = (t + 1) // 2, (f + 1) // 2
    x = contiguous(mx.pad(x[..., 0], [(0, 0), (1, 1), (1, 1)]))
    row = x.shape[2]
    windows = mx.as_strided(x, (m, out_t, out_f, 3, 3), (x.shape[1] * row, 2 * row, 2, row, 1))
    return windows.reshape(m, out_t, out_f, 9) @ weight.reshape(-1, 9).T


def _strided_conv_by_taps(x: mx.array, weight: mx.array) -> mx.array:
    m, t, f, channels = x.shape
    out_t, out_f = (t + 1) // 2, (f + 1) // 2
    x = mx.pad(x, [(0, 0), (1, 2), (1, 2), (0, 0)])[:, : 2 * out_t + 2, : 2 * out_f + 2]
    x = x.reshape(m, out_t + 1, 2, out_f + 1, 2, channels)  # rows and columns as (pair, parity): taps are plain slices
    taps = ((i, j) for i in range(3) for j in range(3))
    return sum(
        x[:, i // 2 : i // 2 + out_t, i % 2, j // 2 : j // 2 + out_f, j % 2] @ weight[:, i, j].T for i, j in taps
    )


class SubsampleLayer(nn.Module):
    """Stride-2 convolution, LayerNorm over channels, ReLU: half the frames, half the bins.

    Called with x [M, T, F, C], and bool [M, ceil(T / 2)] or None: frames of the result that are to be 0.
    """

    def __init__(self, in_channels: int, out_channels: int, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=eps, bias=False)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = _strided_conv(x.astype(self.conv.weight.dtype), self.conv.weight)
        return norm_relu(x, self.norm.weight, self.norm.eps, mask)


class SubsampleProjection(nn.Module):
    """[M, F, 128] features -> [M, ceil(F / 4), hidden_size] (``Gemma4AudioSubSampleConvProjection``)."""

    def __init__(self, spec):
        super().__init__()
        first, second = spec.subsampling_conv_channels
        self.layer0 = SubsampleLayer(1, first, spec.rms_norm_eps)
        self.layer1 = SubsampleLayer(first, second, spec.rms_norm_eps)
        # The reference takes the number of bins, 128 / 4, from the number of channels of layer0.
        self.input_proj_linear = nn.Linear((first // 4) * second, spec.hidden_size, bias=False)

    def __call__(self, features: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array | None]:
        if mask is not None:
            features = features * mask[..., None].astype(features.dtype)
        x = self.layer0(features[..., None], None if mask is None else mask[:, ::2])
        x = self.layer1(x, None)
        return self.input_proj_linear(x.flatten(2)), None if mask is None else mask[:, ::4]


class AudioFeedForward(nn.Module):
    """x + weight · norm(W2 silu(W1 norm x)), transformers' ``Gemma4AudioFeedForward``."""

    def __init__(self, spec):
        super().__init__()
        hidden, clip = spec.hidden_size, spec.use_clipped_linears
        self.ffw_layer_1 = ClippedLinear(hidden, 4 * hidden, clip)
        self.ffw_layer_2 = ClippedLinear(4 * hidden, hidden, clip)
        self.pre_layer_norm = RMSNorm(hidden)
        self.post_layer_norm = RMSNorm(hidden)
        self.residual_weight = spec.residual_weight
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array) -> mx.array:
        y = self.pre_layer_norm(limited(x, self.limit))
        y = self.ffw_layer_2(nn.silu(self.ffw_layer_1(y)))
        return x + self.post_layer_norm(limited(y, self.limit)) * self.residual_weight


class AudioLightConv(nn.Module):
    """Gated linear, depthwise causal convolution, linear (transformers' ``Gemma4AudioLightConv1d``)."""

    def __init__(self, spec):
        super().__init__()
        hidden, clip = spec.hidden_size, spec.use_clipped_linears
        self.linear_start = ClippedLinear(hidden, 2 * hidden, clip)
        self.linear_end = ClippedLinear(hidden, hidden, clip)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, spec.conv_kernel_size, groups=hidden, bias=False)
        self.pre_layer_norm = RMSNorm(hidden, spec.rms_norm_eps)
        self.conv_norm = RMSNorm(hidden, spec.rms_norm_eps)
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array) -> mx.array:
        y, norm = self.linear_start(self.pre_layer_norm(x)), self.conv_norm
        return x + self.linear_end(glu_conv(y, self.depthwise_conv1d.weight, norm.weight, norm.eps, self.limit))


class AudioAttention(nn.Module):
    """Local causal attention with relative positions (transformers' ``Gemma4AudioAttention``), float32 inside.

    `window` counts the keys of a frame, itself included. transformers masks distance context_left − 1 although its
    table of relative positions has a row for it (12 keys); Google's JAX release attends to it (13 keys).
    """

    def __init__(self, spec, window: int):
        super().__init__()
        hidden, clip = spec.hidden_size, spec.use_clipped_linears
        self.heads, self.window, self.cap = spec.num_attention_heads, window, spec.attention_logit_cap
        self.masked = spec.attention_invalid_logits_value
        self.head_dim = hidden // self.heads
        self.distances = spec.attention_context_left - 1
        self.q_proj = ClippedLinear(hidden, hidden, clip)
        self.k_proj = ClippedLinear(hidden, hidden, clip)
        self.v_proj = ClippedLinear(hidden, hidden, clip)
        self.post = ClippedLinear(hidden, hidden, clip)
        self.relative_k_proj = nn.Linear(hidden, hidden, bias=False)
        self.per_dim_scale = mx.zeros((self.head_dim,))

    def __call__(self, x: mx.array, valid: mx.array | None) -> mx.array:
        split = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (p(x).reshape(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        table = relative_positions(self.distances, x.shape[-1], x.dtype)[-self.window :]
        relative = self.relative_k_proj(table).reshape(self.window, self.heads, self.head_dim)
        factors = self.head_dim**-0.5 / math.log(2), math.log(1 + math.e) / math.log(2)
        return self.post(
            banded_attention(q, k, v, relative, self.per_dim_scale, valid, self.cap, *factors, self.masked)
        )


class AudioLayer(nn.Module):
    """Half feed-forward, attention, light convolution, half feed-forward, norm (``Gemma4AudioLayer``)."""

    def __init__(self, spec, window: int):
        super().__init__()
        self.feed_forward1 = AudioFeedForward(spec)
        self.feed_forward2 = AudioFeedForward(spec)
        self.self_attn = AudioAttention(spec, window)
        self.lconv1d = AudioLightConv(spec)
        self.norm_pre_attn = RMSNorm(spec.hidden_size)
        self.norm_post_attn = RMSNorm(spec.hidden_size)
        self.norm_out = RMSNorm(spec.hidden_size)
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array, valid: mx.array | None) -> mx.array:
        x = self.feed_forward1(x)
        y = self.self_attn(self.norm_pre_attn(limited(x, self.limit)), valid)
        x = x + self.norm_post_attn(limited(y, self.limit))
        x = self.feed_forward2(self.lconv1d(x))
        return self.norm_out(limited(x, self.limit))


class AudioTower(nn.Module):
    """Log-mel frames of several clips -> soft tokens (transformers' ``Gemma4AudioModel``).

    Args:
        spec: an audio spec with the field names of transformers' ``Gemma4AudioConfig``.
        window: keys of a frame's attention, itself included: context_left − 1 (12, as transformers) or
            context_left (13, as Google's JAX release); None takes the spec's `attention_window`.

    Raises:
        InputError: a window or attention context that is neither of these, or an unknown activation.
    """

    def __init__(self, spec, window: int | None = None):
        super().__init__()
        window = spec.attention_window if window is None else window
        _check(spec, window)
        self.subsample_conv_projection = SubsampleProjection(spec)
        self.layers = [AudioLayer(spec, window) for _ in range(spec.num_hidden_layers)]
        self.output_proj = nn.Linear(spec.hidden_size, spec.output_proj_dims, bias=True)

    def __call__(
        self,
        input_features: np.ndarray | mx.array,
        input_features_mask: np.ndarray | mx.array,
        valid_index: mx.array | None = None,
    ) -> mx.array:
        """Soft tokens of all clips in order, padding dropped.

        Args:
            input_features: [M, F, 128] log-mel.
            input_features_mask: bool [M, F], true on valid frames.
            valid_index: `soft_token_index(input_features_mask)` as an array; give it where this call is traced
                (compiled), since it cannot be computed there.

        Returns:
            [m_total, output_proj_dims] in the dtype of the weights, before ``embed_audio``.
        """
        if valid_index is None:
            valid_index = mx.array(soft_token_index(input_features_mask))
        dense = self.encode(mx.array(input_features), mx.array(input_features_mask))
        return mx.take(dense.reshape(-1, dense.shape[-1]), valid_index, axis=0)

    def encode(self, input_features: mx.array, input_features_mask: mx.array | None) -> mx.array:
        """The padded form: [M, ceil(F / 4), output_proj_dims], finite junk where the mask is false.

        Pure array operations of shapes known beforehand: can be traced, compiled and differentiated.
        """
        mask = None if input_features_mask is None else input_features_mask.astype(mx.bool_)
        x, valid = self.subsample_conv_projection(input_features, mask)
        for layer in self.layers:
            x = layer(x, valid)
        return self.output_proj(x)


def _check(spec, window: int) -> None:
    left, right, chunk = spec.attention_context_left, spec.attention_context_right, spec.attention_chunk_size
    if window not in (left - 1, left):
        raise InputError(
            f"audio window {window}: expected {left - 1} or {left} keys (attention_context_left is {left})"
        )
    # Only then do the rows of the reference's relative table stand for the distances that its scores use.
    if right != 0 or chunk != left - 1:
        raise InputError(
            f"audio_config: attention_context_right {right}, attention_chunk_size {chunk}; supported are 0 and "
            f"attention_context_left − 1 = {left - 1}"
        )
    if spec.hidden_act != "silu":
        raise InputError(f"audio_config: hidden_act {spec.hidden_act!r}; supported is 'silu'")
