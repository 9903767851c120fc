"""E2B in its real shapes, bfloat16, weights random: how long loading takes and what a forward holds in memory."""

import json
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.models.families import build
from gemma_mlx.models.gemma4.text import place
from gemma_mlx.models.load import load_model
from gemma_mlx.models.names import to_torch_axes
from gemma_mlx.models.tables import tables_on_disk
from gemma_mlx.spec import read_spec

LAYERS, TOKENS = 3, 64


def write_random(path, shapes, seed=0):
    """safetensors of bfloat16 tensors with values of some 0.02, from one block of random numbers at random places."""
    values = (0.02 * np.random.default_rng(seed).standard_normal(1 << 24)).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)  # cut to bfloat16
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes.values()):
            left = int(np.prod(shape))
            start = (i * 7919) % (len(block) // 2)
            while left:
                piece = block[start : start + left]
                f.write(piece.tobytes())
                left, start = left - len(piece), 0
    return end


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    """(folder, bytes of the weights)."""
    folder = tmp_path_factory.mktemp("e2b")
    (folder / "config.json").write_text(json.dumps(CHECKPOINTS["gemma-4-E2B"]))
    shapes = {}
    for path, array in tree_flatten(build(read_spec(folder)).parameters()):
        axes = to_torch_axes(path, array.ndim)
        shapes[path] = tuple(array.shape) if axes is None else tuple(array.shape[a] for a in axes)
    yield folder, write_random(folder / "model.safetensors", shapes)
    (folder / "model.safetensors").unlink()


def nbytes(module):
    return sum(a.nbytes for _, a in tree_flatten(module.parameters()))


@pytest.mark.slow
def test_e2b_loads_in_five_seconds_and_a_forward_holds_what_its_layers_need(e2b):
    folder, size = e2b
    assert 10.1e9 < size < 10.4e9
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    began = time.perf_counter()
    model = load_model(folder, "bfloat16")
    seconds = time.perf_counter() - began
    loaded = mx.get_peak_memory() - held
    text = model.model.language_model
    ids = np.random.default_rng(1).integers(3, 262_000, (1, TOKENS))
    embeddings = text.embed(mx.array(ids))
    per_layer = text.per_layer_inputs(mx.array(ids), embeddings)
    x, where = embeddings, place(text.spec, TOKENS, embeddings.dtype)
    for i in range(LAYERS):
        x, _ = text.layers[i](x, per_layer[:, :, i], where, kv=None, cache=None)
    mx.eval(x)
    peak = mx.get_peak_memory() - held
    used = [text.embed_tokens, text.per_layer_model_projection, text.per_layer_projection_norm, *text.layers[:LAYERS]]
    weights = sum(map(nbytes, used))
    ((_, table),) = tables_on_disk(model).items()
    print(
        f"E2B, {size / 1e9:.2f} GB: loaded in {seconds:.2f} s ({loaded / 1e6:.1f} MB held); {LAYERS} layers of "
        f"{TOKENS} tokens peak at {peak / 1e9:.3f} GB, their weights {weights / 1e9:.3f} GB; table of "
        f"{table.nbytes / 1e9:.2f} GB on disk"
    )
    assert bool(mx.isfinite(x.astype(mx.float32)).all())
    assert seconds < 5 and loaded < 50e6
    assert weights <= peak < weights + 200e6 < table.nbytes
