"""Ways in which a checkpoint folder may be broken, and what its user is told."""

import json

import mlx.core as mx
import numpy as np


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensor(name, change):
    def apply(folder):
        file = str(folder / "model.safetensors")
        tensors = dict(mx.load(file))
        tensors |= {n: a for n, a in change(name, tensors.pop(name)).items()}
        mx.eval(tensors)
        mx.save_safetensors(file, tensors)

    return apply


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_nan(name, array):
    values = np.array(array)
    values.flat[3] = np.nan
    return {name: mx.array(values)}


UP = "model.language_model.layers.2.mlp.up_proj.weight"
DAMAGE = {
    "cut off": (cut, "bytes, but its header promises"),
    "shard missing": (lose_a_shard, "model-00002-of-00002.safetensors, missing from the folder"),
    "unknown family": (change_config(model_type="gemma9"), "model_type is 'gemma9'"),
    "wrong shape": (change_tensor(UP, lambda n, a: {n: a[:5]}), "layers.2.mlp.up_proj.weight has shape [5, "),
    "tensor missing": (change_tensor(UP, lambda n, a: {}), f"1 missing tensors: {UP}"),
    "tensor too many": (change_tensor(UP, lambda n, a: {n: a, "other": a}), "1 unexpected tensors: other"),
    "not a number": (change_tensor(UP, with_nan), f"{UP}: 1 of "),
}
