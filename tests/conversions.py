"""Checkpoints as mlx-vlm's converter writes them, and their packed weights unpacked by numpy."""

import json
import shutil

import mlx.core as mx
import numpy as np
import torch

from gemma_mlx.models.load import load_model
from gemma_mlx.models.quantize import stays_float


def unpack(weight, scales, biases, bits):
    """float32 [..., in] of MLX's affine packing: a little-endian stream of `bits` each, a scale and a bias a group."""
    weight, scales, biases = (np.array(a) for a in (weight, scales, biases))
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little")
    q = stream.reshape(*weight.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    grouped = q.reshape(*scales.shape, -1).astype(np.float32)
    return (grouped * scales[..., None] + biases[..., None]).reshape(*weight.shape[:-1], -1).astype(np.float32)


def unpacked(folder, bits):
    """path -> float32 weight of all that quantizing the checkpoint packs, computed apart from our loader."""
    model, found = load_model(folder), {}
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized") and not stays_float(path, module):
            found[path] = module.weight
        elif path.endswith(".experts"):
            found |= {f"{path}.{name}": module[name] for name in ("gate_up_proj", "down_proj")}
    return {path: unpack(*mx.quantize(w, 32 if w.shape[-1] % 64 else 64, bits), bits) for path, w in found.items()}


def replaced(reference, weights, folder):
    """transformers' model with these weights in place of its own, saved to `folder`."""
    own = dict(reference.named_parameters())
    with torch.no_grad():
        for path, value in weights.items():
            own[path if path in own else f"{path}.weight"].copy_(torch.tensor(value))
    reference.save_pretrained(folder)
    return reference


def split_experts(tensors):
    """Tensors with experts as the converter has them: gate and up apart, all under switch_glu."""
    out = {}
    for name, array in tensors.items():
        owner, inside, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":
            gate, up = mx.split(array, 2, axis=1)
            out |= {f"{owner}.experts.switch_glu.{n}_proj.weight": a for n, a in (("gate", gate), ("up", up))}
        elif inside:
            out[f"{owner}.experts.switch_glu.{leaf}.weight"] = array
        else:
            out[name] = array
    return out


def _renamed(name):
    return name.removeprefix("model.").replace("language_model.", "language_model.model.")


def _is_packed(name, array):
    """All matrices outside the towers whose rows are whole groups, and the experts."""
    matrix = array.ndim == 2 or ".experts." in name
    return matrix and name.endswith(".weight") and not {"vision_tower", "audio_tower"} & {*name.split(".")}


def convert(folder, out, bits, special=()):
    """Write the checkpoint as mlx-community's conversions hold it: renamed, channels-last, all but towers packed.

    Matrices that end with a name in `special` get 8 bits, as routers do, and the config says so; `bits` None leaves
    all float. Returns path -> unpacked weight, with transformers' paths.
    """
    shutil.copytree(folder, out)
    weights, quantization, found = {}, {"group_size": 32, "bits": bits}, {}
    for name, array in split_experts(mx.load(str(out / "model.safetensors"))).items():
        path, renamed = name.removesuffix(".weight"), _renamed(name)
        if array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        elif name.endswith("conv1d.weight"):
            array = array.transpose(0, 2, 1)
        if bits is None or not _is_packed(name, array) or array.shape[-1] % 32:
            weights[renamed] = mx.contiguous(array)
            continue
        own = 8 if path.endswith((*special, "router.proj")) else bits
        packed = mx.quantize(array, 32, own)
        renamed = renamed.removesuffix(".weight")
        weights |= {f"{renamed}.{leaf}": a for leaf, a in zip(("weight", "scales", "biases"), packed, strict=True)}
        found[path.replace(".switch_glu", "")] = unpack(*packed, own)
        if own != bits:
            quantization[renamed] = {"group_size": 32, "bits": own}
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    if bits is not None:
        config = json.loads((out / "config.json").read_text())
        config |= {"quantization": quantization, "quantization_config": quantization}
        (out / "config.json").write_text(json.dumps(config))
    return joined_experts(found)


def joined_experts(weights):
    """Gate and up as transformers has them, in one."""
    out = {}
    for path, value in weights.items():
        if path.endswith(".experts.gate_proj"):
            owner = path.removesuffix("gate_proj")
            out[f"{owner}gate_up_proj"] = np.concatenate([value, weights[f"{owner}up_proj"]], axis=1)
        elif not path.endswith(".experts.up_proj"):
            out[path] = value
    return out


def change_tensor(folder, name, change):
    """Write the folder's tensors anew with one of them changed; dropped where the change gives None."""
    file = str(folder / "model.safetensors")
    tensors = dict(mx.load(file))
    new = change(tensors.pop(name))
    tensors |= {} if new is None else {name: mx.contiguous(new)}
    mx.eval(tensors)
    mx.save_safetensors(file, tensors, metadata={"format": "mlx"})
