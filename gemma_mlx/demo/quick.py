"""The same arithmetic as transformers' Gemma4 modules, in an order that one CPU core does faster; training only."""

from __future__ import annotations

import functools
import types

import torch
from torch.nn import functional as F


def _subsample(self, input_features, input_features_mask):
    """Gemma4AudioSubSampleConvProjection with channels last from end to end: no copies between convolution and norm."""
    x, mask = input_features[:, None], input_features_mask
    for layer in (self.layer0, self.layer1):
        x = (x * mask[:, None, :, None].to(x.dtype)).contiguous(memory_format=torch.channels_last)
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, weight, stride=2, padding=1).permute(0, 2, 3, 1)
        x = F.relu(F.layer_norm(x, x.shape[-1:], layer.norm.weight.to(x.dtype), eps=layer.norm.eps)).permute(0, 3, 1, 2)
        mask = mask[:, ::2]
    return self.input_proj_linear(x.permute(0, 2, 3, 1).flatten(2)), mask


def _in_bfloat16(forward):
    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.float()
        return out

    return wrapped


def quicken(model, clips: bool = False, bfloat16: bool = False) -> None:
    """Swap in the quick forms; without `clips` also leave out the clamps, which do nothing at infinite bounds.

    `bfloat16`: the audio tower's products in bfloat16 (twice as fast where the CPU has AMX).
    """
    tower = model.model.audio_tower
    if bfloat16:
        tower.forward = _in_bfloat16(tower.forward)
    subsampler = tower.subsample_conv_projection
    subsampler.forward = types.MethodType(_subsample, subsampler)
    for module in model.modules():
        if hasattr(module, "use_clipped_linears"):
            module.use_clipped_linears = clips
