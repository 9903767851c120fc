"""Training over packed experts: packed on load, and read from a conversion."""

import csv
import itertools

import mlx.core as mx
import numpy as np
import pytest
from conversions import convert
from mlx.utils import tree_flatten
from test_larger_loop import EXPERTS, write_checkpoint

from gemma_mlx.loop import finetune
from gemma_mlx.lora import lora_parameters
from gemma_mlx.models.load import load
from gemma_mlx.models.quantize import quantized_paths
from gemma_mlx.step import can_compile

TEXT = {"hidden_size": 64, **EXPERTS, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder, `quantize`) of each way to a packed model."""
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(folder / "float", "26B", TEXT)
    convert(folder / "float", folder / "mlx", 4)
    return {"on load": (folder / "float", 4), "conversion": (folder / "mlx", None)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed-rows") / "rows.csv"
    words = ["alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, ["prompt", "response"])
        out.writeheader()
        out.writerows({"prompt": f"Repeat: {a} {b}", "response": f"{a} {b}"} for a, b in itertools.pairwise(words))
    return path


@pytest.mark.parametrize("way", ["on load", "conversion"])
def test_trains_and_the_adapter_comes_back(checkpoints, rows, tmp_path, monkeypatch, way):
    """Loss falls; base and adapter are bit-equal after a reload, which packs the base as in training."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "on" if way == "on load" and can_compile() else "off")
    folder, bits = checkpoints[way]
    run = finetune(
        str(folder), data=rows, out=tmp_path / "run", steps=16, lr=2e-2, rank=4, batch_size=4, quantize=bits,
        targets="decoder,router.proj", quiet=True, save_every=0, eval_every=0,
    )  # fmt: skip
    losses = [r["loss"] for r in run.history if "loss" in r]
    assert len(losses) == 16 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    assert any(".experts." in path for path in quantized_paths(run.model))
    again, _ = load(folder, adapter=run.adapter)
    assert quantized_paths(again) == quantized_paths(run.model)
    trained = lora_parameters(run.model)
    assert trained and any(w.any().item() for n, w in trained.items() if n.endswith("lora_b"))
    own = dict(tree_flatten(run.model.parameters()))
    for name, found in tree_flatten(again.parameters()):
        assert mx.array_equal(found, own[name]).item(), name
    ids = np.random.default_rng(0).integers(64, 400, (2, 30))
    assert mx.array_equal(again(input_ids=ids), run.model(input_ids=ids)).item()
