"""Per-layer tables left on disk give the same numbers as in memory."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3n as gemma3n
from damage import change_tensor, with_nan
from mlx.utils import tree_flatten

from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.processor import Processor
from gemma_mlx.inspection import examine
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model, not_finite, read_header, save_model
from gemma_mlx.models.quantize import quantize_model
from gemma_mlx.models.tables import TABLE, DiskTable, tables_on_disk
from gemma_mlx.step import Step, can_compile

MAKERS = {"gemma4": tiny, "gemma3n": gemma3n}


@pytest.fixture(scope="module", params=MAKERS)
def family(request, tmp_path_factory):
    """(its tiny checkpoints, folder of one)."""
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param].make(folder, seed=3)
    return MAKERS[request.param], folder


def both(folder, **options):
    return load_model(folder, **options), load_model(folder, **options, disk_bytes=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_bit_equal_and_the_table_is_no_parameter(family, dtype):
    maker, folder = family
    memory, disk = both(folder, dtype=dtype)
    assert not tables_on_disk(memory)
    (path, table), *rest = tables_on_disk(disk).items()
    assert not rest and path.endswith(TABLE)
    found = {name for name, _ in tree_flatten(disk.parameters())}
    assert {name for name, _ in tree_flatten(memory.parameters())} - found == {f"{path}.weight"}
    weight = dict(tree_flatten(memory.parameters()))[f"{path}.weight"]
    assert table.shape == weight.shape and mx.array_equal(table.whole(), weight)
    for kind in ("text", "image", "audio"):
        batch = maker.inputs(kind)
        assert mx.array_equal(disk(**batch), memory(**batch))


def test_a_table_in_two_types_and_packed(tmp_path):
    """float16 rows, and the rows of a packed table as MLX unpacks them whole."""
    weight = mx.random.normal((50, 96), key=mx.random.key(0)).astype(mx.float16)
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(weight.astype(mx.float32), 32, 4), strict=True))
    ids = mx.array([[3, 0, 7], [weight.shape[0] - 1, 3, 3]])
    for arrays, form, wanted in (
        ({"weight": weight}, {}, weight),
        (packed, {"group_size": 32, "bits": 4}, mx.dequantize(*packed.values(), 32, 4)),
    ):
        file = tmp_path / f"{len(arrays)}.safetensors"
        mx.save_safetensors(str(file), arrays)
        table = DiskTable({t.name: t for t in read_header(file)}, mx.float32, **form)
        assert table.shape == weight.shape and table.packed == bool(form)
        assert mx.array_equal(table(ids), wanted.astype(mx.float32)[ids])


def test_a_conversion_with_a_packed_table_loads_either_way(tmp_path):
    """4 bits, in MLX's own names and layouts."""
    tiny.make(tmp_path / "float", seed=4, text={"hidden_size_per_layer_input": 32})
    packed = load_model(tmp_path / "float")
    quantize_model(packed, 4)
    conversion = tmp_path / "packed"
    conversion.mkdir()
    mx.save_safetensors(str(conversion / "model.safetensors"), dict(tree_flatten(packed.parameters())))
    (conversion / "config.json").write_bytes((tmp_path / "float" / "config.json").read_bytes())
    memory, disk = both(conversion)
    ((_, table),) = tables_on_disk(disk).items()
    assert table.packed
    batch = tiny.inputs("text", batch=2)
    assert mx.array_equal(disk(**batch), memory(**batch))


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_and_saving(checkpoint_folder, rows, tmp_path, compiled):
    """Loss and gradients are bit-equal, in a compiled step too, whose ids are traced; a save holds the whole table."""
    if compiled and not can_compile():
        pytest.skip("no C++ compiler: steps run uncompiled here")
    processor = Processor(checkpoint_folder, image_tokens=70)
    samples = [processor.sample(e) for e in read_examples(rows / "media.csv")[:3]]
    batch = collate(samples, processor.pad_id)
    found = []
    for model in both(checkpoint_folder):
        apply_lora(model, "decoder", rank=2, seed=1)
        grads, sums = Step(model, compiled=compiled).gradients(lora_parameters(model), batch, mx.random.key(0))
        found.append([np.array(sums.loss), *(np.array(grads[name]) for name in sorted(grads))])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    save_model(load_model(checkpoint_folder, disk_bytes=0), tmp_path / "saved")
    saved, original = (dict(tree_flatten(load_model(f).parameters())) for f in (tmp_path / "saved", checkpoint_folder))
    assert saved.keys() == original.keys() and all(mx.array_equal(saved[k], original[k]) for k in saved)


def test_lanes_read_it_side_by_side(checkpoint_folder, rows):
    processor = Processor(checkpoint_folder, image_tokens=70)
    batch = collate([processor.sample(e) for e in read_examples(rows / "media.csv")[:4]], processor.pad_id)
    model = load_model(checkpoint_folder, disk_bytes=0)
    apply_lora(model, "decoder", rank=2, seed=1)
    weights, key = lora_parameters(model), mx.random.key(0)
    (one, a), (two, b) = (Step(model, compiled=False, lanes=n).gradients(weights, batch, key) for n in (1, 2))
    assert abs(a.loss.item() - b.loss.item()) < 1e-4 * abs(a.loss.item())
    norm = max(np.linalg.norm(np.array(g)) for g in one.values())
    assert all(np.linalg.norm(np.array(one[k]) - np.array(two[k])) < 1e-4 * norm for k in one)


def test_doctor_says_so(family, monkeypatch):
    _, folder = family
    monkeypatch.setattr("gemma_mlx.models.load.DISK_BYTES", 0)
    found = examine(folder)
    assert any("stays on disk" in fact for fact in found.facts)
    table = tables_on_disk(load_model(folder, disk_bytes=0)).popitem()[1]
    assert found.parts["per-layer embeddings"].weights == table.shape[0] * table.shape[1]


def test_a_value_that_is_no_number_is_found(family, tmp_path):
    _, folder = family
    broken = shutil.copytree(folder, tmp_path / "broken")
    name = f"model.language_model.{TABLE}.weight"
    change_tensor(name, with_nan)(broken)
    model = load_model(broken, disk_bytes=0)
    assert not_finite(model) == []  # training does not read it whole
    (line,) = not_finite(model, tables=True)
    assert line.startswith(f"{name}: 1 of ")
