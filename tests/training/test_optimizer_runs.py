"""Whole runs with each optimizer, and with weights kept in bfloat16 alone: resume, reload, bytes, bad options."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_mlx import loop
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.full import train_fully, trained_parameters
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora
from gemma_mlx.models.load import load, load_model
from gemma_mlx.optimizers import OPTIMIZERS, rounding_key
from gemma_mlx.step import Step, add, can_compile

FAST = dict(quiet=True, rank=2, batch_size=4, image_tokens=70, save_every=0, eval_every=0, warmup=0, lr=1e-2)
FULL = "embed_tokens,decoder.layers.1.mlp,embed_audio,language_model.norm"
LOW = dict(dtype="bfloat16", master_weights="none")
RUNS = {
    "adamw8bit": dict(optimizer="adamw8bit", dtype="float32"),
    "adafactor": dict(optimizer="adafactor", dtype="bfloat16"),
    "adamw, no masters": dict(optimizer="adamw", **LOW),
    "adamw8bit, no masters": dict(optimizer="adamw8bit", **LOW),
    "adafactor, no masters": dict(optimizer="adafactor", **LOW),
}
TIMED = {"tokens_per_second", "step_seconds", "data_wait", "peak_memory_gb"}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


@pytest.fixture(scope="module")
def batch(checkpoint_folder, rows):
    processor = Processor(checkpoint_folder, image_tokens=70)
    return collate([processor.sample(e) for e in read_examples(rows / "media.csv")[:5]], processor.pad_id, 8)


def steps_taken(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


QUICK = ("adamw8bit", "adafactor, no masters")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in RUNS])
def test_a_resumed_run_is_the_same_bit_for_bit(checkpoint_folder, rows, batch, tmp_path, monkeypatch, name):
    """Adapters beside whole modules, two lanes, two batches a step; and the adapter reloads to bit-equal logits."""
    given = dict(
        data=rows / "media.csv", steps=4, weight_decay=0.01, dropout=0.1, accumulate=2, targets="q_proj,v_proj",
        full=FULL, **RUNS[name], **FAST | dict(save_every=2),
    )  # fmt: skip
    whole = finetune(str(checkpoint_folder), out=tmp_path / "whole", **given)
    advance = loop.Job.advance

    def crash(job, *arguments):
        if job.progress.step == 3:
            raise OSError("the machine went down")
        return advance(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Job, "advance", crash)
        with pytest.raises(OSError, match="went down"):
            finetune(str(checkpoint_folder), out=tmp_path / "run", **given)
    resumed = finetune(str(checkpoint_folder), out=tmp_path / "run", resume=True, quiet=True)
    assert steps_taken(whole.folder) == steps_taken(resumed.folder)
    newest = [sorted((run.folder / "checkpoints").iterdir())[-1] for run in (whole, resumed)]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes()
    saved = mx.load(str(newest[0] / "adapter.safetensors"))
    low = {k for k, w in saved.items() if w.dtype == mx.bfloat16}
    assert low == ({k for k in saved if ".lora_" not in k} if "no masters" in name else set()) and len(saved) > 10
    state = mx.load(str(newest[0] / "optimizer.safetensors"))
    assert any(a.dtype == mx.uint8 for a in state.values()) == ("8bit" in name)
    fresh, _ = load(checkpoint_folder, adapter=resumed.adapter, dtype=given["dtype"])
    inputs = batch.inputs()
    assert mx.array_equal(fresh(**inputs), whole.model(**inputs))
    assert not mx.array_equal(fresh(**inputs), load_model(checkpoint_folder, given["dtype"])(**inputs))


def test_another_seed_rounds_otherwise(checkpoint_folder, rows, tmp_path):
    """The same rows in the same order: one step, whose rounding alone depends on the seed."""
    given = dict(data=rows / "train.csv", steps=1, targets="none", full="language_model.norm,embed_tokens", **LOW)
    given |= FAST | dict(batch_size=18, lr=1e-4)
    runs = [finetune(str(checkpoint_folder), out=tmp_path / str(seed), seed=seed, **given) for seed in (0, 1)]
    weights = [trained_parameters(run.model) for run in runs]
    assert any(not mx.array_equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    "name", ["adafactor", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS if n != "adafactor")]
)
def test_small_updates_are_not_lost_without_masters(checkpoint_folder, rows, tmp_path, name):
    """30 steps of 1e-4 on matrices and norms, most of which rounding to the nearest would lose: along the change that
    float32 masters make, weights in bfloat16 alone move as far within 5 %."""
    given = dict(data=rows / "train.csv", steps=30, dtype="bfloat16", targets="none", optimizer=name)
    given |= dict(full="embed_tokens,decoder.layers.1", schedule="constant", **FAST | dict(lr=1e-4))
    with_masters = finetune(str(checkpoint_folder), out=tmp_path / "masters", **given)
    without = finetune(str(checkpoint_folder), out=tmp_path / "none", master_weights="none", **given)
    start = dict(tree_flatten(load_model(checkpoint_folder, "bfloat16").parameters()))
    exact = mx.load(str(with_masters.adapter / "adapters.safetensors"))
    low = mx.load(str(without.adapter / "adapters.safetensors"))
    along, across = 0.0, 0.0
    for k, w in exact.items():
        assert low[k].dtype == mx.bfloat16 and w.dtype == mx.float32
        change, other = (np.array(x.astype(mx.float32) - start[k].astype(mx.float32), np.float64) for x in (w, low[k]))
        along += (change * other).sum()
        across += (change**2).sum()
    print(name, along / across)
    assert abs(along / across - 1) < 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("masters", [True, False])
def test_bytes_held_for_a_weight(checkpoint_folder, name, masters):
    """What MLX holds beside the bfloat16 base: 4 bytes for a master, none without, and the state's own."""
    model = load_model(checkpoint_folder, "bfloat16")
    train_fully(model, "embed_tokens")
    mx.eval(model.parameters())
    step = Step(model, compiled=False, optimizer=OPTIMIZERS[name])
    mx.clear_cache()
    before = mx.get_active_memory()
    weights = trained_parameters(model, masters)
    state = step.optimizer.init(weights)
    step.install(weights)
    mx.eval(weights, state, model.parameters())
    (shape,) = (w.shape for w in weights.values())
    count = shape[0] * shape[1]
    wanted = {"adamw": 8 * count, "adamw8bit": 2 * count + 8 * count // 256, "adafactor": 4 * sum(shape)}[name]
    assert sum(a.nbytes for group in state.values() for a in group.values()) == wanted
    assert abs(mx.get_active_memory() - before - wanted - 4 * count * masters) < 2e4  # pages


def test_gradients_of_bfloat16_weights_add_up_in_float32(checkpoint_folder, batch):
    """Lanes and accumulated batches; adapters beside them stay float32."""
    model = load_model(checkpoint_folder, "bfloat16")
    apply_lora(model, "decoder", rank=2)
    train_fully(model, "embed_tokens,embedders")
    weights = trained_parameters(model, masters=False)
    assert {w.dtype for n, w in weights.items() if ".lora_" in n} == {mx.float32}
    assert {w.dtype for n, w in weights.items() if ".lora_" not in n} == {mx.bfloat16}
    one, _ = Step(model, compiled=False).gradients(weights, batch, mx.random.key(0))
    exact, _ = Step(model, compiled=False).gradients(trained_parameters(model), batch, mx.random.key(0))
    assert all(mx.array_equal(one[k].astype(mx.float32), exact[k]) for k in exact)
    total = add(one, one)
    assert {g.dtype for g in total.values()} == {mx.float32}
    lanes, _ = Step(model, compiled=False, lanes=2).gradients(weights, batch, mx.random.key(0))
    assert {g.dtype for g in lanes.values()} == {mx.float32}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_update_takes_the_key_as_an_input(checkpoint_folder, name):
    """Two steps with different keys: as uncompiled, but for float32's rounding."""
    if not can_compile():
        pytest.skip("MLX needs a C++ compiler to compile on a CPU")
    model = load_model(checkpoint_folder, "bfloat16")
    train_fully(model, "embed_audio,language_model.norm")
    weights, r = trained_parameters(model, masters=False), np.random.default_rng(0)
    found = []
    for compiled in (False, True):
        step = Step(model, clip=1.0, compiled=compiled, optimizer=OPTIMIZERS[name])
        w, state = weights, step.optimizer.init(weights)
        r = np.random.default_rng(0)
        for i in range(2):
            grads = {k: mx.array(r.standard_normal(x.shape).astype(np.float32)) for k, x in weights.items()}
            scalars = step.optimizer.scalars(i + 1, 1e-3, 0.1)
            w, state, _ = step.apply(w, state, grads, 3, scalars, rounding_key(0, i))
        found.append({k: np.array(x.astype(mx.float32)) for k, x in w.items()})
    for k in weights:
        differ = found[0][k] != found[1][k]
        assert differ.mean() < 0.01, k
        assert np.abs(found[0][k] - found[1][k]).max() <= 2**-7 * np.abs(found[0][k]).max()


def refused(words, folder, rows, out, **options):
    with pytest.raises(InputError, match=words) as caught:
        finetune(str(folder), data=rows / "train.csv", out=out, quiet=True, steps=1, **options)
    assert "\n" not in str(caught.value) and not out.exists()


def test_bad_choices_are_one_line_before_anything_is_written(checkpoint_folder, rows, tmp_path):
    given = (checkpoint_folder, rows, tmp_path / "run")
    refused("^optimizer: expected adamw or adamw8bit or adafactor, got 'adam'", *given, optimizer="adam")
    refused("^master_weights: expected float32 or none, got 'bfloat16'", *given, master_weights="bfloat16")
    refused("^master_weights: none concerns modules that train in full", *given, master_weights="none")
    low = dict(master_weights="none", full="embed_audio", dtype="float32")
    refused("^master_weights: none needs a bfloat16 base", *given, **low)


def test_the_door_says_so_too(checkpoint_folder, rows, tmp_path, capsys):
    from gemma_mlx.cli import door
    from gemma_mlx.train import command

    given = ["--model", str(checkpoint_folder), "--data", str(rows / "train.csv"), "--out", str(tmp_path / "run")]
    for words in (["--optimizer", "sgd"], ["--master-weights", "none"]):
        assert door.enter(command, [*given, *words], "train") == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()
