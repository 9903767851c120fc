"""Gemma 3n's vision tower: timm's ``mobilenetv5_300m_enc`` in MLX, channels-last throughout.

Blocks are those of MobileNetV4 (arXiv 2404.10518): edge residuals, universal inverted residuals, multi-query attention
over the pixels. Module names are timm's, so that a checkpoint name is a module path; every norm is an RMS norm over
channels and nothing depends on train or eval mode.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.errors import InputError
from gemma_mlx.models.layers import RMSNorm, trains, unit_range
from gemma_mlx.ops import dispatch
from gemma_mlx.ops.depthwise_conv import depthwise_conv, same_padding
from gemma_mlx.ops.flash_matrix import flash_matrix
from gemma_mlx.ops.norm_gelu import norm_gelu
from gemma_mlx.ops.norm_residual import norm_residual
from gemma_mlx.spec_gemma3n import Gemma3nVisionSpec

RESOLUTION = 16
"""Rows and columns of the tower's output, whatever the input's size."""
_STEM = 64
_ER, _UIR, _MQA = "er", "uir", "mqa"


def _blocks() -> list[list[tuple]]:
    """The stages: (er, kernel, stride, expansion, channels), (uir, first kernel, middle kernel, stride, expansion,
    channels) and (mqa, heads, head size, stride of keys, channels)."""

    def uirs(kernels: list[int], expansion: int, channels: int) -> list[tuple]:
        return [(_UIR, k, 0, 1, expansion, channels) for k in kernels]

    def pairs(count: int, heads: int, size: int, stride: int, channels: int) -> list[tuple]:
        return [(_MQA, heads, size, stride, channels), (_UIR, 0, 0, 1, 2, channels)] * count

    return [
        [(_ER, 3, 2, 4, 128), (_ER, 3, 1, 4, 128), (_ER, 3, 1, 4, 128)],
        [(_UIR, 3, 5, 2, 6, 256), *uirs([5, 3, 5, 3], 4, 256)],
        [(_UIR, 5, 5, 2, 6, 640), *uirs([5] * 7, 4, 640), *uirs([0], 1, 640), *pairs(14, 12, 64, 2, 640)],
        [(_UIR, 5, 5, 2, 6, 1280), *pairs(19, 16, 96, 1, 1280)],
    ]


def _divisible(value: float) -> int:
    """The nearest multiple of 8, never less than nine tenths of `value` (timm's ``make_divisible``)."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


class Conv(nn.Conv2d):
    """Convolution with "same" padding: x [N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), O]."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, depthwise: bool = False, bias: bool = False
    ):
        super().__init__(channels, out, kernel, stride=stride, bias=bias, groups=channels if depthwise else 1)

    def __call__(self, x: mx.array) -> mx.array:
        kernel, stride = self.weight.shape[1], self.stride[0]
        if kernel == 1 and stride == 1:
            return x @ self.weight[:, 0, 0].T
        if self.groups == x.shape[-1]:
            return depthwise_conv(x, self.weight, stride)
        pads = [same_padding(n, kernel, stride) for n in x.shape[1:3]]
        return super().__call__(mx.pad(x, [(0, 0), *pads, (0, 0)]))


class ConvNorm(nn.Module):
    """Convolution, norm and, if asked for, gelu (timm's ``ConvNormAct``)."""

    def __init__(self, *conv: int, activate: bool = True, **options: bool):
        super().__init__()
        self.conv = Conv(*conv, **options)
        self.bn = RMSNorm(conv[1])
        self.activate = activate

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        return norm_gelu(x, self.bn.weight, self.bn.eps) if self.activate else self.bn(x)


class LayerScale(nn.Module):
    """x ⊙ gamma over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.gamma.astype(x.dtype)


class EdgeResidual(nn.Module):
    """Full convolution to wide channels, 1 × 1 back (timm's ``EdgeResidual``)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = _divisible(channels * expansion)
        self.conv_exp, self.bn1 = Conv(channels, wide, kernel, stride), RMSNorm(wide)
        self.conv_pwl, self.bn2 = Conv(wide, out, 1), RMSNorm(out)
        self.skip = stride == 1 and channels == out

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv_pwl(norm_gelu(self.conv_exp(x), self.bn1.weight, self.bn1.eps))
        return self.bn2.onto(y, x) if self.skip else self.bn2(y)


class InvertedResidual(nn.Module):
    """1 × 1 to wide channels and back, with a depthwise convolution before or between (``UniversalInvertedResidual``).

    The stride lies on the middle convolution where there is one, else on the first.
    """

    def __init__(
        self, channels: int, out: int, first: int, middle: int, stride: int, expansion: float, residual: bool = True
    ):
        super().__init__()
        wide = _divisible(channels * expansion)
        if first:
            self.dw_start = ConvNorm(channels, channels, first, 1 if middle else stride, depthwise=True, activate=False)
        self.pw_exp = ConvNorm(channels, wide, 1)
        if middle:
            self.dw_mid = ConvNorm(wide, wide, middle, stride, depthwise=True)
        self.pw_proj = ConvNorm(wide, out, 1, activate=False)
        if residual:
            self.layer_scale = LayerScale(out)
        self.skip = residual and stride == 1 and channels == out

    def __call__(self, x: mx.array) -> mx.array:
        y = self.dw_start(x) if "dw_start" in self else x
        y = self.pw_exp(y)
        y = self.dw_mid(y) if "dw_mid" in self else y
        if self.skip and dispatch.runs("norm_residual"):
            norm, gamma = self.pw_proj.bn, self.layer_scale.gamma
            return norm_residual(self.pw_proj.conv(y), x, (norm.weight * gamma).astype(x.dtype), norm.eps)
        y = self.pw_proj(y)
        y = self.layer_scale(y) if "layer_scale" in self else y
        return x + y if self.skip else y


class Projection(nn.Module):
    """1 × 1 convolution; with a stride, a depthwise 3 × 3 of that stride and a norm before it."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        if stride > 1:
            self.down_conv = Conv(channels, channels, 3, stride, depthwise=True)
            self.norm = RMSNorm(channels)
        self.proj = Conv(channels, out, 1)

    def __call__(self, x: mx.array) -> mx.array:
        if "down_conv" in self:
            x = self.norm(self.down_conv(x))
        return self.proj(x)


class MultiQueryAttention(nn.Module):
    """Many query heads on one key and value head, over all pixels (timm's ``MultiQueryAttention2d``).

    Called with x [N, H, W, channels]; `differentiated`: whether no scores are to be kept for a gradient.
    """

    def __init__(self, channels: int, heads: int, size: int, stride: int):
        super().__init__()
        self.heads, self.size = heads, size
        self.query = Projection(channels, heads * size)
        self.key = Projection(channels, size, stride)
        self.value = Projection(channels, size, stride)
        self.output = Projection(heads * size, channels)

    def __call__(self, x: mx.array, differentiated: bool = False) -> mx.array:
        n, height, width, _ = x.shape
        q = self.query(x).reshape(n, height * width, self.heads, self.size)
        k, v = (part(x).reshape(n, -1, 1, self.size) for part in (self.key, self.value))
        if differentiated:
            out = flash_matrix(q, k, v, self.size**-0.5)
        else:
            q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.size**-0.5).swapaxes(1, 2)
        return self.output(out.reshape(n, height, width, -1))


class AttentionBlock(nn.Module):
    """x + gamma ⊙ attention(norm x) (timm's ``MobileAttention``)."""

    def __init__(self, channels: int, heads: int, size: int, stride: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.attn = MultiQueryAttention(channels, heads, size, stride)
        self.layer_scale = LayerScale(channels)

    def __call__(self, x: mx.array, differentiated: bool = False) -> mx.array:
        return x + self.layer_scale(self.attn(self.norm(x), differentiated))


def _upsampled(x: mx.array, height: int, width: int) -> mx.array:
    """Nearest neighbour to height × width, as torch: source row i·H // height."""
    rows, columns = mx.arange(height) * x.shape[1] // height, mx.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


class FusionAdapter(nn.Module):
    """The last two stages in one grid of 16 × 16 (timm's ``MobileNetV5MultiScaleFusionAdapter``)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.ffn = InvertedResidual(channels, out, 0, 0, 1, 2.0, residual=False)
        self.norm = RMSNorm(out)

    def __call__(self, high: mx.array, low: mx.array) -> mx.array:
        n, height, width, _ = high.shape
        x = self.ffn(mx.concatenate([high, _upsampled(low, height, width)], axis=-1))
        if height % RESOLUTION or width % RESOLUTION:
            raise InputError(
                f"pixel_values: a grid of {height} x {width} at stride 16; both sides of a picture must be multiples "
                f"of "
                f"{16 * RESOLUTION} pixels"
            )
        x = x.reshape(n, RESOLUTION, height // RESOLUTION, RESOLUTION, width // RESOLUTION, -1)
        return self.norm(mx.mean(x, axis=(2, 4)))


class MobileNetV5(nn.Module):
    """timm's ``MobileNetV5Encoder``: pictures [N, H, W, 3] -> [N, 16, 16, out]."""

    def __init__(self, spec: Gemma3nVisionSpec):
        super().__init__()
        multiplier = spec.channel_multiplier
        channels = _STEM if multiplier < 1 else _divisible(_STEM * multiplier)
        self.conv_stem = ConvNorm(3, channels, 3, 2, bias=True)
        self.blocks, ends = [], []
        for stage in _blocks():
            made = []
            for kind, *numbers, out in stage:
                out = _divisible(out * multiplier)
                if kind == _ER:
                    made.append(EdgeResidual(channels, out, *numbers))
                elif kind == _UIR:
                    made.append(InvertedResidual(channels, out, *numbers))
                else:
                    made.append(AttentionBlock(channels, *numbers))
                channels = out
            self.blocks.append(made)
            ends.append(channels)
        self.msfa = FusionAdapter(ends[-2] + ends[-1], spec.hidden_size)

    def stages(self, x: mx.array) -> list[mx.array]:
        """What comes out of the stem and of each stage, [N, h, w, channels] each."""
        outputs = [self.conv_stem(x.astype(self.conv_stem.conv.weight.dtype))]
        attended = (trains(self),)
        for stage in self.blocks:
            x = outputs[-1]
            for block in stage:
                x = block(x, *(attended if isinstance(block, AttentionBlock) else ()))
            outputs.append(x)
        return outputs

    def __call__(self, x: mx.array) -> mx.array:
        return self.msfa(*self.stages(x)[-2:])


class VisionTower(nn.Module):
    """Pictures in torch's layout, [N, 3, H, W] in [0, 1] -> soft tokens [N, 256, hidden_size], row by row."""

    def __init__(self, spec: Gemma3nVisionSpec):
        super().__init__()
        self.timm_model = MobileNetV5(spec)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        return self.timm_model(unit_range(pixel_values).transpose(0, 2, 3, 1)).flatten(1, 2)
