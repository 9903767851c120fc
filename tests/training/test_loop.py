"""The whole way from a CSV to an adapter."""

import hashlib
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_mlx.loop import finetune
from gemma_mlx.lora import load_adapter, lora_layers, lora_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.plots import read_metrics

FAST = dict(quiet=True, rank=2, batch_size=3, image_tokens=70, save_every=0, eval_every=0)
FIELDS = ("step", "loss", "lr", "grad_norm", "tokens", "label_tokens", "tokens_per_second", "step_seconds")
FIELDS += ("data_wait", "peak_memory_gb")


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Tracing costs more than these few steps; test_step.py compares the compiled form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


def base_weights(model):
    """Everything that is not an adapter, by checkpoint name."""
    adapted = set(lora_layers(model))
    named = {}
    for name, w in tree_flatten(model.parameters()):
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_a", "lora_b"):
            continue
        if owner.endswith(".linear") and owner.removesuffix(".linear") in adapted:
            name = f"{owner.removesuffix('.linear')}.{leaf}"
        named[name] = np.array(w)
    return named


def test_a_run_learns_and_leaves_what_it_promises(checkpoint_folder, rows, tmp_path):
    out = tmp_path / "run"
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", valid=rows / "valid.csv", out=out, steps=40, lr=2e-2,
        **FAST | dict(eval_every=10, save_every=20, batch_size=6, rank=4),
    )  # fmt: skip
    names = {p.name for p in out.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "loss.png", "report.json", "rows.jsonl"}
    train = [r for r in run.history if "loss" in r]
    valid = [r for r in run.history if "valid_loss" in r]
    assert [r["step"] for r in train] == list(range(1, 41)) and [r["step"] for r in valid] == [10, 20, 30, 40]
    assert all(set(FIELDS) <= set(r) for r in train)
    first, last = (np.mean([r["loss"] for r in part]) for part in (train[:5], train[-5:]))
    assert last < 0.7 * first, (first, last)
    report = json.loads((out / "report.json").read_text())
    best = min(valid, key=lambda r: r["valid_loss"])
    assert report["best_valid_loss"] == best["valid_loss"] and report["best_step"] == best["step"]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_frozen_weights_stay_and_the_adapter_loads_to_bit_equal_logits(checkpoint_folder, rows, tmp_path):
    before = base_weights(load_model(checkpoint_folder))
    run = finetune(
        str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / "run", steps=4, lr=1e-2, targets="all", **FAST
    )
    after = base_weights(run.model)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)
    assert any(k.endswith("layer_scalar") for k in after) and any(k.endswith("input_min") for k in after)
    moved = {k for k, w in lora_parameters(run.model).items() if k.endswith("lora_b") and mx.abs(w).max().item() > 0}
    for part in ("language_model", "vision_tower", "audio_tower", "embed_audio", "embed_vision"):
        assert any(part in k for k in moved), part
    fresh = load_model(checkpoint_folder)
    load_adapter(fresh, run.adapter)
    sample = run.processor.sample
    from gemma_mlx.data.batches import collate
    from gemma_mlx.data.dataset import read_examples

    examples = read_examples(rows / "media.csv")
    inputs = collate([sample(e) for e in examples], run.processor.pad_id).inputs()
    assert mx.array_equal(fresh(**inputs), run.model(**inputs))
    assert not mx.array_equal(fresh(**inputs), load_model(checkpoint_folder)(**inputs))


def test_accumulated_batches_equal_one_big_batch(checkpoint_folder, rows, tmp_path):
    """Rows with unequal numbers of labels: three batches of two against one of six, three steps."""
    results = []
    for name, sizes in (("big", (6, 1)), ("small", (2, 3))):
        run = finetune(
            str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / name, steps=3, lr=1e-2, schedule="constant",
            warmup=0, **FAST | dict(batch_size=sizes[0], accumulate=sizes[1]),
        )  # fmt: skip
        results.append((run.history, lora_parameters(run.model)))
    (big, big_weights), (small, small_weights) = results
    for a, b in zip(big, small, strict=True):
        assert a["label_tokens"] == b["label_tokens"]
        assert (
            abs(a["loss"] - b["loss"]) < 1e-5 * a["loss"]
            and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
        )
    for name, w in big_weights.items():
        moved = mx.abs(w - small_weights[name]).max().item()
        assert moved < 0.02 * 3e-2, name  # Adam's first steps are ±lr; rounding may matter where gradients are ~0


def test_early_stopping_keeps_the_best(checkpoint_folder, rows, tmp_path):
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", valid=rows / "valid.csv", out=tmp_path / "run", steps=200,
        lr=0.3, clip=0.0, schedule="constant", warmup=0, patience=2, **FAST | dict(eval_every=2),
    )  # fmt: skip
    valid = [r for r in run.history if "valid_loss" in r]
    losses = [r["valid_loss"] for r in valid]
    assert run.report["stopped_early"] and run.report["steps"] < 200
    assert len(losses) - 1 - int(np.argmin(losses)) == 2
    assert run.report["best_step"] == valid[int(np.argmin(losses))]["step"]


def test_log_every_adds_up(checkpoint_folder, rows, tmp_path):
    runs = [
        finetune(
            str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / str(n), steps=5, **FAST | dict(log_every=n)
        )
        for n in (1, 2)
    ]
    single, double = (r.history for r in runs)
    assert [r["step"] for r in double] == [2, 4, 5]
    labels = np.diff([0] + [r["label_tokens"] for r in single])
    losses = np.array([r["loss"] for r in single]) * labels
    assert abs(double[0]["loss"] - losses[:2].sum() / labels[:2].sum()) < 1e-9


def test_same_seed_same_bits_other_seed_other_run(checkpoint_folder, rows, tmp_path):
    def trace(name, seed):
        run = finetune(
            str(checkpoint_folder),
            data=rows / "train.csv",
            out=tmp_path / name,
            steps=4,
            dropout=0.2,
            seed=seed,
            **FAST,
        )
        adapter = (run.adapter / "adapters.safetensors").read_bytes()
        return [r["loss"] for r in run.history], hashlib.sha256(adapter).hexdigest()

    assert trace("a", 1) == trace("b", 1)
    assert trace("c", 2)[1] != trace("a2", 1)[1]


def test_a_loaded_model_and_its_processor(checkpoint_folder, rows, tmp_path):
    from gemma_mlx.models.load import load

    model, processor = load(checkpoint_folder)
    run = finetune(model, processor=processor, data=rows / "train.csv", out=tmp_path / "run", steps=1, **FAST)
    assert run.model is model and run.config.model == str(checkpoint_folder)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
