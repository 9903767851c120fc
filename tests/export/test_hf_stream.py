"""Merged exports go through memory by stretches; what lies beside the weights comes out byte for byte."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_pairs import randomise
from merged_pairs import fast, load_checked, tensors

from gemma_mlx.errors import InputError
from gemma_mlx.exporting import tree
from gemma_mlx.exporting.run import export
from gemma_mlx.lora import apply_lora, save_adapter
from gemma_mlx.models import load as loading
from gemma_mlx.models.load import load_model
from gemma_mlx.models.tables import tables_on_disk

DEMO = Path(__file__).parents[2] / "gemma_mlx" / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = load_model(DEMO)
    apply_lora(model, "all", 4, 8.0)
    randomise(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapter"))


def equal(a, b):
    return a.keys() == b.keys() and all(
        mx.array_equal(a[n], b[n], equal_nan=True) and a[n].dtype == b[n].dtype for n in a
    )


@pytest.mark.parametrize(
    "options",
    fast([{"dtype": "float32"}, {"bits": 8}], {}, {"dtype": "float32"}, {"bits": 8}, {"shard_bytes": 1}),
    ids=str,
)
def test_the_size_of_a_stretch_changes_nothing_but_the_peak(adapter, tmp_path, monkeypatch, options):
    whole = export(model=DEMO, adapter=adapter, out=tmp_path / "whole", quiet=True, **options)
    monkeypatch.setattr(tree, "CHUNK_BYTES", 1 << 14)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    parts = export(model=DEMO, adapter=adapter, out=tmp_path / "parts", quiet=True, **options)
    peak = mx.get_peak_memory() - before
    size = sum(p.stat().st_size for p in DEMO.glob("*.safetensors"))
    print(f"{options}: peak {peak / 1e6:.2f} MB, base {size / 1e6:.1f} MB")
    assert peak < size / 6  # adapters, the largest tensor, a stretch
    assert equal(tensors(whole), tensors(parts))


@pytest.mark.parametrize("options", fast([{}], {"dtype": "float32"}, {"bits": 4}, {}), ids=str)
def test_tables_that_stay_on_disk(adapter, tmp_path, monkeypatch, options):
    """Read by stretches of rows, they give what the whole table in memory gives; packed ones too."""
    whole = export(model=DEMO, adapter=adapter, out=tmp_path / "whole", quiet=True, **options)
    packed = export(model=DEMO, out=tmp_path / "packed", bits=8, quiet=True)
    unpacked = export(model=packed, adapter=adapter, out=tmp_path / "unpacked", quiet=True, **options)
    monkeypatch.setattr(loading, "DISK_BYTES", 1)
    monkeypatch.setattr(tree, "CHUNK_BYTES", 1 << 14)
    assert tables_on_disk(load_model(DEMO)) and all(t.packed for t in tables_on_disk(load_model(packed)).values())
    again = export(model=DEMO, adapter=adapter, out=tmp_path / "a", quiet=True, **options)
    assert equal(tensors(whole), tensors(again))
    again = export(model=packed, adapter=adapter, out=tmp_path / "b", quiet=True, **options)
    assert equal(tensors(unpacked), tensors(again))


def test_what_lies_beside_the_weights_is_the_bases_byte_for_byte(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    for name in ("tokenizer.model", "special_tokens_map.json", "preprocessor_config.json", "LICENSE", "merges.txt"):
        (base / name).write_bytes(b'{"odd":   1}\r\n')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_bytes(b"{{ x }}\r\n")
    for name in ("README.md", "manifest.json", ".gitattributes", "optimizer.bin", "pytorch_model.bin"):
        (base / name).write_bytes(b"not this")
    out = export(model=base, adapter=adapter, out=tmp_path / "out", quiet=True)
    own = {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    left = {"README.md", "manifest.json", ".gitattributes", "optimizer.bin", "pytorch_model.bin", "model.safetensors"}
    made = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert set(made) == set(own) - left | {"README.md", "manifest.json", "model.safetensors"}
    assert all(made[name] == own[name] for name in set(own) - left)


def test_float16_that_would_overflow_is_refused(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    held = tensors(DEMO)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    held[name] = held[name] * 0 + 1e6
    mx.eval(held)
    mx.save_safetensors(str(base / "model.safetensors"), held, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name}: holds values that float16 has no room for"):
        export(model=base, out=tmp_path / "out", dtype="float16", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_media_tower_that_a_conversion_left_out_is_not_promised(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    held = {n.removeprefix("model.").replace("language_model.", "language_model.model."): a
            for n, a in tensors(DEMO).items() if ".language_model." in n}  # fmt: skip
    mx.eval(held)
    mx.save_safetensors(str(base / "model.safetensors"), held, metadata={"format": "mlx"})
    with pytest.warns(UserWarning, match="holds nothing for vision and audio"):
        out = export(model=base, out=tmp_path / "out", dtype="float32", quiet=True)
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"] is None and config["audio_config"] is None
    reference, ids = load_checked(out), np.arange(40, 80)[None]
    import torch

    expected = reference(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(np.array(load_model(out)(input_ids=ids)) - expected).max() < 2e-4
