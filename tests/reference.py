"""transformers' towers with every weight and buffer randomised, and their weights in ours."""

from __future__ import annotations

import mlx.core as mx
import tiny
import torch

from gemma_mlx.spec import AudioSpec, VisionSpec


def to_mlx(name: str, tensor: torch.Tensor) -> mx.array:
    """A checkpoint tensor as ours: convolution weights channels-last."""
    value = mx.array(tensor.detach().float().numpy())
    if name.endswith("conv.weight"):
        return value.transpose(0, 2, 3, 1)
    return value.transpose(0, 2, 1) if name.endswith("conv1d.weight") else value


def copy_weights(reference: torch.nn.Module, ours) -> None:
    """Every tensor of `reference` into `ours`; fails on any name or shape that the two do not share."""
    ours.load_weights([(n, to_mlx(n, t)) for n, t in reference.state_dict().items()], strict=True)
    mx.eval(ours.parameters())


def _spec(cls, config):
    names = cls.__dataclass_fields__
    return cls(**{k: v for k, v in config.to_dict().items() if k in names and v is not None})


def vision(seed: int = 0, clip: float = 2.5, **changes):
    """(transformers' vision tower in eager float32, VisionSpec); `changes` to tiny.VISION."""
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    config = Gemma4VisionConfig(**{**tiny.VISION, **changes})
    config._attn_implementation = "eager"
    return tiny.randomise(Gemma4VisionModel(config).float().eval(), seed, clip), _spec(VisionSpec, config)


def audio(seed: int = 0, clip: float = 2.5, **changes):
    """(transformers' audio tower in eager float32, AudioSpec); `changes` to tiny.AUDIO."""
    from transformers import Gemma4AudioConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    config = Gemma4AudioConfig(**{**tiny.AUDIO, **changes})
    config._attn_implementation = "eager"
    return tiny.randomise(Gemma4AudioModel(config).float().eval(), seed, clip), _spec(AudioSpec, config)


def truncated(module: torch.nn.Module, run) -> tuple[float, float]:
    """Shares of values that clipped linears cut at their input and at their output while `run()` runs."""
    counts = [[0, 0], [0, 0]]

    def hook(mod, args, out):
        for i, (x, low, high) in enumerate(
            ((args[0], mod.input_min, mod.input_max), (mod.raw, mod.output_min, mod.output_max))
        ):
            counts[i][0] += int(((x < low) | (x > high)).sum())
            counts[i][1] += x.numel()

    handles = []
    for mod in module.modules():
        if type(mod).__name__ == "Gemma4ClippableLinear":
            handles.append(mod.linear.register_forward_hook(lambda m, a, out, mod=mod: setattr(mod, "raw", out)))
            handles.append(mod.register_forward_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return counts[0][0] / max(counts[0][1], 1), counts[1][0] / max(counts[1][1], 1)
