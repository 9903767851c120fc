"""Training that goes on from an adapter of this library, PEFT or mlx-lm: it begins where that ended, and resumes."""

import json

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.adapters.attach import attach
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.adapters.writing import save
from gemma_mlx.config import TrainConfig, configure
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.exporting.source import find_source
from gemma_mlx.full import train_fully, trained_places
from gemma_mlx.loop import finetune
from gemma_mlx.lora import (
    apply_lora,
    linear_shape,
    lora_layers,
    lora_parameters,
    module_at,
    resolve_targets,
    save_adapter,
)
from gemma_mlx.models.load import load_model

FAST = dict(quiet=True, batch_size=18, image_tokens=70, save_every=0, eval_every=0, seed=3)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Tracing costs more than these few steps; test_step.py compares the compiled form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


def randomised(checkpoint_folder, out, options=None, full=None, dora=False):
    """A random adapter in this library's layout."""
    model = load_model(checkpoint_folder)
    apply_lora(model, "decoder", 3, 5.0, dora=dora)
    rng = np.random.default_rng(0)
    for layer in lora_layers(model).values():
        layer.lora_b = mx.array((0.1 * rng.standard_normal(layer.lora_b.shape)).astype(np.float32))
    if full:
        train_fully(model, full)
        for name, place in trained_places(model).items():
            if "lora" not in name and not name.endswith(".m"):
                place.put(place.get() * 1.25)
    save_adapter(model, out, "some/base", "decoder", options)
    return out


def mixed(checkpoint_folder, out):
    """An adapter whose layers have ranks and scales of their own."""
    model, rng, layers = load_model(checkpoint_folder), np.random.default_rng(1), {}
    for path in resolve_targets(model, "decoder.q_proj,audio.q_proj"):
        rows, inner = linear_shape(module_at(model, path))
        rank, scale = int(rng.integers(1, 6)), float(rng.uniform(0.3, 3.0))
        a, b = (mx.array((0.2 * rng.standard_normal(s)).astype(np.float32)) for s in ((inner, rank), (rank, rows)))
        layers[path] = LowRank(a, b, scale)
    save(Adapter(out, "gemma_mlx", layers), out)
    return out


def as_peft(checkpoint_folder, adapter, out):
    from gemma_mlx.exporting.peft import write

    out.mkdir()
    write(Source(checkpoint_folder, "some/base", adapter=adapter), out, ExportOptions())
    return out


def as_mlx_lm(checkpoint_folder, adapter, out):
    from gemma_mlx.exporting.mlx import write

    out.mkdir()
    write(Source(checkpoint_folder, "some/base", adapter=adapter), out, ExportOptions())
    return out


def loss_of(checkpoint_folder, adapter, rows):
    """Mean loss of the training rows with an adapter."""
    from gemma_mlx.data.batches import collate
    from gemma_mlx.data.dataset import read_examples
    from gemma_mlx.data.processor import Processor
    from gemma_mlx.loss import loss_and_count

    model = load_model(checkpoint_folder)
    if adapter is not None:
        attach(model, adapter)
    processor = Processor(checkpoint_folder, model.spec, image_tokens=70)
    batch = collate([processor.sample(e) for e in read_examples(rows / "train.csv")], processor.pad_id)
    total, count, _ = loss_and_count(model, batch.inputs(), batch.labels)
    return float(total) / float(count)


SLOWLY = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("own", "dora", "ranks", "mlx-lm")]


@pytest.mark.parametrize("kind", ["full", "peft", *SLOWLY])
def test_the_first_loss_is_the_adapters(checkpoint_folder, rows, tmp_path, kind):
    adapter = {
        "own": lambda: randomised(checkpoint_folder, tmp_path / "a"),
        "dora": lambda: randomised(checkpoint_folder, tmp_path / "a", dora=True),
        "full": lambda: randomised(checkpoint_folder, tmp_path / "a", full="embed_audio,language_model.norm"),
        "ranks": lambda: mixed(checkpoint_folder, tmp_path / "a"),
        "peft": lambda: as_peft(checkpoint_folder, mixed(checkpoint_folder, tmp_path / "a"), tmp_path / "b"),
        "mlx-lm": lambda: as_mlx_lm(checkpoint_folder, randomised(checkpoint_folder, tmp_path / "a"), tmp_path / "b"),
    }[kind]()
    expected = loss_of(checkpoint_folder, adapter, rows)
    plain = loss_of(checkpoint_folder, None, rows)
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run", steps=2, lr=1e-2, warmup=0,
        init_adapter=adapter, **FAST,
    )  # fmt: skip
    assert abs(run.history[0]["loss"] - expected) <= 1e-5 * expected < abs(plain - expected)
    assert run.history[1]["loss"] < run.history[0]["loss"]
    before, after = read_adapter(adapter), read_adapter(run.adapter)
    fresh = load_model(checkpoint_folder)
    attach(fresh, run.adapter)
    assert {p: (w.rank, w.scale) for p, w in after.layers.items()} == {
        p: (layer.lora_a.shape[1], layer.scale) for p, layer in lora_layers(fresh).items()
    }
    kept = [sorted((w.rank, w.scale) for w in adapter.layers.values()) for adapter in (before, after)]
    assert all(a == b and abs(s - t) <= 1e-15 for (a, s), (b, t) in zip(*kept, strict=True))
    assert all(mx.array_equal(w, lora_parameters(run.model)[n]) for n, w in lora_parameters(fresh).items())
    assert run.config.rank == max(w.rank for w in after.layers.values())
    assert run.config.targets == {"ranks": run.config.targets, "peft": run.config.targets}.get(kind, "decoder")
    assert (run.config.full is not None) == (kind == "full") and run.config.dora == (kind == "dora")


def test_it_resumes_and_the_unfinished_run_is_exported(checkpoint_folder, rows, tmp_path):
    """Stopped and resumed: bit-equal to the run that was not; ranks and scales of layers stay their own."""
    adapter = mixed(checkpoint_folder, tmp_path / "a")
    common = dict(data=rows / "train.csv", init_adapter=adapter, lr=1e-2, schedule="constant", warmup=0)
    whole = finetune(str(checkpoint_folder), out=tmp_path / "whole", steps=4, **common, **FAST)
    finetune(str(checkpoint_folder), out=tmp_path / "part", steps=2, **common, **FAST)
    (tmp_path / "part" / "report.json").unlink()
    source = find_source(run=tmp_path / "part")
    taken, own = read_adapter(source.adapter), read_adapter(adapter)
    assert {p: (w.rank, w.scale) for p, w in taken.layers.items()} == {
        p: (w.rank, w.scale) for p, w in own.layers.items()
    }
    resumed = finetune(str(checkpoint_folder), out=tmp_path / "part", steps=4, resume=True, quiet=True)
    ours, theirs = lora_parameters(whole.model), lora_parameters(resumed.model)
    assert ours.keys() == theirs.keys() and all(mx.array_equal(w, theirs[n]) for n, w in ours.items())


def test_what_the_adapter_decides_and_what_not(checkpoint_folder, rows, tmp_path):
    options = {"audio_prompt": "Write it down.", "image_tokens": 140, "audio_window": 13}
    adapter = randomised(checkpoint_folder, tmp_path / "a", options)
    common = dict(data=rows / "train.csv", init_adapter=adapter, steps=1, quiet=True, batch_size=2)
    run = finetune(str(checkpoint_folder), out=tmp_path / "run", **common)
    c = run.config
    assert (c.rank, c.alpha, c.targets, c.dora) == (3, pytest.approx(5.0), "decoder", False)
    assert (c.audio_prompt, c.image_tokens, c.audio_window) == ("Write it down.", 140, 13)
    again = finetune(
        str(checkpoint_folder), out=tmp_path / "b", audio_prompt="Other", image_tokens=70, rank=3, **common
    )
    assert (again.config.audio_prompt, again.config.image_tokens) == ("Other", 70)
    raw = json.loads((again.adapter / "adapter_config.json").read_text())
    assert raw["gemma_mlx"]["options"]["audio_prompt"] == "Other"
    for name, value in dict(rank=16, targets="q_proj", dora=True, alpha=1.0, full="embed_audio").items():
        with pytest.raises(InputError, match=f"{name}: .* was given, but .* leave it out"):
            finetune(str(checkpoint_folder), out=tmp_path / "c", **common | {name: value})
    assert not (tmp_path / "c").exists()
    with pytest.raises(InputError, match="no adapter here"):
        finetune(str(checkpoint_folder), out=tmp_path / "c", **common | dict(init_adapter=tmp_path / "none"))


def test_full_weights_of_a_bfloat16_base_go_on_exactly(checkpoint_folder, rows, tmp_path):
    """The file's float32 is what trains on, not what bfloat16 holds of it."""
    adapter = randomised(checkpoint_folder, tmp_path / "a", full="language_model.norm")
    name = "model.language_model.norm.weight"
    tensors = dict(mx.load(str(adapter / "adapters.safetensors")))
    tensors[name] = tensors[name] * (1 + 2.0**-12)  # below half of bfloat16's step
    mx.eval(tensors)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run", steps=1, lr=0.0, dtype="bfloat16",
        init_adapter=adapter, **FAST,
    )  # fmt: skip
    after = mx.load(str(run.adapter / "adapters.safetensors"))[name]
    assert after.dtype == mx.float32 and mx.array_equal(after, tensors[name])
    assert not mx.array_equal(after, after.astype(mx.bfloat16).astype(mx.float32))


def test_what_was_given_is_no_part_of_a_config():
    a, b = configure({"rank": 4}), TrainConfig(rank=4)
    assert a == b and a.to_yaml() == b.to_yaml()
    assert a.given == {"rank"} and b.given == frozenset()
