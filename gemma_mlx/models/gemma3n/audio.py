"""Gemma 3n's audio tower: log-mel frames -> soft tokens, a conformer with banded relative attention.

Module names are transformers' (``Gemma3nAudioEncoder``). Convolution weights are channels-last, as MLX has them. The
architecture is that of the Universal Speech Model (arXiv 2303.01037).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.conformer import relative_positions
from gemma_mlx.models.layers import RMSNorm
from gemma_mlx.ops.banded_attention import banded_attention
from gemma_mlx.ops.cumulative_norm import cumulative_norm
from gemma_mlx.ops.glu_conv import glu_conv, limited
from gemma_mlx.spec_gemma3n import Gemma3nAudioSpec


class CumulativeGroupNorm(nn.Module):
    """relu of x [M, T, F, C] normed by what was heard so far (``Gemma3nAudioCumulativeGroupNorm``)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return cumulative_norm(x, self.weight, self.eps)


class SubsampleLayer(nn.Module):
    """Stride-2 convolution that looks two frames ahead, cumulative norm, ReLU: half the frames, half the bins."""

    def __init__(self, in_channels: int, out_channels: int, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, bias=False)
        self.norm = CumulativeGroupNorm(out_channels, eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.pad(x.astype(self.conv.weight.dtype), [(0, 0), (0, 2), (1, 1), (0, 0)])
        return self.norm(self.conv(x))


class SubsampleProjection(nn.Module):
    """[M, F, bins] features -> [M, ceil(F / 4), hidden_size] (``Gemma3nAudioSubSampleConvProjection``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        (first, second), eps = spec.sscp_conv_channel_size, spec.sscp_conv_group_norm_eps
        self.conv_0 = SubsampleLayer(1, first, eps)
        self.conv_1 = SubsampleLayer(first, second, eps)
        bins = (spec.input_feat_size + 3) // 4
        self.input_proj_linear = nn.Linear(bins * second, spec.hidden_size, bias=False)

    def __call__(self, features: mx.array) -> mx.array:
        return self.input_proj_linear(self.conv_1(self.conv_0(features[..., None])).flatten(2))


class FeedForward(nn.Module):
    """x + weight · norm(W2 silu(W1 norm x)) (``Gemma3nAudioConformerFeedForward``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        hidden = spec.hidden_size
        self.pre_layer_norm = RMSNorm(hidden)
        self.ffw_layer_1 = nn.Linear(hidden, 4 * hidden, bias=False)
        self.ffw_layer_2 = nn.Linear(4 * hidden, hidden, bias=False)
        self.post_layer_norm = RMSNorm(hidden)
        self.weight_of_residual, self.limit = spec.conf_residual_weight, spec.gradient_clipping

    def __call__(self, x: mx.array) -> mx.array:
        y = self.ffw_layer_2(nn.silu(self.ffw_layer_1(self.pre_layer_norm(limited(x, self.limit)))))
        return x + self.post_layer_norm(limited(y, self.limit)) * self.weight_of_residual


class RelativePositions(nn.Module):
    """The projection of the table of distances (``Gemma3nAudioRelativePositionEmbedding``)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.pos_proj = nn.Linear(hidden, hidden, bias=False)


class LocalAttention(nn.Module):
    """Each frame attends to itself and the `context_left` − 1 before it (``Gemma3nAudioAttention``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        hidden = spec.hidden_size
        self.heads, self.window = spec.conf_num_attention_heads, spec.conf_attention_context_left
        self.head_dim, self.cap = hidden // self.heads, spec.conf_attention_logit_cap
        self.relative_position_embedding = RelativePositions(hidden)
        self.per_dim_scale = mx.zeros((self.head_dim,))
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)

    def __call__(self, x: mx.array, valid: mx.array) -> mx.array:
        split = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (p(x).reshape(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        table = relative_positions(self.window - 1, x.shape[-1], x.dtype)
        relative = self.relative_position_embedding.pos_proj(table).reshape(self.window, self.heads, self.head_dim)
        factor = self.head_dim**-0.5 / math.log(2)
        return banded_attention(q, k, v, relative, self.per_dim_scale, valid, self.cap, factor)


class ConformerAttention(nn.Module):
    """x + norm(post(attention(norm x))) (``Gemma3nAudioConformerAttention``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        self.pre_attn_norm = RMSNorm(spec.hidden_size)
        self.attn = LocalAttention(spec)
        self.post = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)
        self.post_norm = RMSNorm(spec.hidden_size)
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array, valid: mx.array) -> mx.array:
        y = self.post(self.attn(self.pre_attn_norm(limited(x, self.limit)), valid))
        return x + self.post_norm(limited(y, self.limit))


class LightConv(nn.Module):
    """Gated linear, depthwise causal convolution, linear (``Gemma3nAudioConformerLightConv1d``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.pre_layer_norm = RMSNorm(hidden, eps)
        self.linear_start = nn.Linear(hidden, 2 * hidden, bias=False)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, spec.conf_conv_kernel_size, groups=hidden, bias=False)
        self.conv_norm = RMSNorm(hidden, eps)
        self.linear_end = nn.Linear(hidden, hidden, bias=False)
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array) -> mx.array:
        y, norm = self.linear_start(self.pre_layer_norm(x)), self.conv_norm
        return x + self.linear_end(glu_conv(y, self.depthwise_conv1d.weight, norm.weight, norm.eps, self.limit))


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, light convolution, half feed-forward, norm (``Gemma3nAudioConformerBlock``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        self.ffw_layer_start = FeedForward(spec)
        self.attention = ConformerAttention(spec)
        self.lconv1d = LightConv(spec)
        self.ffw_layer_end = FeedForward(spec)
        self.norm = RMSNorm(spec.hidden_size)
        self.limit = spec.gradient_clipping

    def __call__(self, x: mx.array, valid: mx.array) -> mx.array:
        x = self.attention(self.ffw_layer_start(x), valid)
        # Padding is zeroed here for the residual too, not for the convolution alone.
        x = self.lconv1d(x * valid[..., None].astype(x.dtype))
        return self.norm(limited(self.ffw_layer_end(x), self.limit))


class AudioTower(nn.Module):
    """Log-mel frames of several clips -> one vector for each sixteen frames (``Gemma3nAudioEncoder``)."""

    def __init__(self, spec: Gemma3nAudioSpec):
        super().__init__()
        self.reduction = spec.conf_reduction_factor
        self.subsample_conv_projection = SubsampleProjection(spec)
        self.conformer = [ConformerBlock(spec) for _ in range(spec.conf_num_hidden_layers)]

    def __call__(self, input_features: mx.array, input_features_mask: mx.array) -> tuple[mx.array, mx.array]:
        """(states [M, n, hidden_size], valid bool [M, n]), n = ceil(ceil(F / 4) / 4); states are 0 in padding.

        Args:
            input_features: [M, F, bins] log-mel. Padding frames are read too: the convolutions look ahead.
            input_features_mask: bool [M, F], true on valid frames.
        """
        x = self.subsample_conv_projection(input_features)
        index = mx.minimum(mx.arange(x.shape[1]) * 4, input_features_mask.shape[1] - 1)
        valid = input_features_mask.astype(mx.bool_)[:, index]
        for block in self.conformer:
            x = block(x, valid)
        x, valid = x[:, :: self.reduction], valid[:, :: self.reduction]
        return mx.where(valid[..., None], x, mx.zeros((), x.dtype)), valid
