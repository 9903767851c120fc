"""The two savings in whole runs, and with every kind of weight that can train."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten

from gemma_mlx.config import TrainConfig, configure, read_yaml
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.processor import Processor
from gemma_mlx.full import train_fully, trained_parameters
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, lora_parameters, set_lora_parameters
from gemma_mlx.loss import label_positions, loss_sum
from gemma_mlx.models.label_rows import LabelRows, label_rows
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step

OFF = {"label_positions": "off", "checkpoint_layers": 0}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


@pytest.fixture(scope="module")
def batch(checkpoint_folder, rows):
    processor = Processor(checkpoint_folder, image_tokens=70)
    return collate([processor.sample(e) for e in read_examples(rows / "media.csv")[:5]], processor.pad_id, 8)


def relative(a, b):
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def assert_nothing_changes(model, weights, batch):
    """Both savings together: the loss within 1e-6, every gradient within 1e-5 of its norm."""
    wanted, sums = Step(model, compiled=False, pick_labels=False).gradients(weights, batch, mx.random.key(0))
    step = Step(model, compiled=False, recompute=1)
    assert "columns" in step.prepare(batch).arrays
    found, other = step.gradients(weights, batch, mx.random.key(0))
    assert relative(other.loss, sums.loss) < 1e-6
    assert max(relative(found[k], wanted[k]) for k in weights) < 1e-5


def test_a_run_with_each_setting_takes_the_same_way(checkpoint_folder, rows, tmp_path):
    """Twenty steps with AdamW on media rows, one run after the other in one process."""
    traces = {}
    for name, options in {"off": OFF, "default": {}, "least memory": {"checkpoint_layers": 1}}.items():
        run = finetune(
            str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / name, steps=20, lr=5e-3, quiet=True, rank=2,
            batch_size=3, image_tokens=70, save_every=0, eval_every=0, **options,
        )  # fmt: skip
        traces[name] = np.array([line["loss"] for line in run.history])
        assert configure(yaml.safe_load((run.folder / "config.yaml").read_text())).label_positions in ("auto", "off")
    assert traces["off"][-5:].mean() < traces["off"][:5].mean() - 0.1
    for name in ("default", "least memory"):
        assert np.abs(traces[name] - traces["off"]).max() < 1e-3


def test_a_bare_off_in_yaml_means_off(tmp_path):
    (tmp_path / "c.yaml").write_text("label_positions: off\ncheckpoint-layers: 2\n")
    config = configure(read_yaml(tmp_path / "c.yaml"))
    assert (config.label_positions, config.checkpoint_layers) == ("off", 2)
    assert (TrainConfig().label_positions, TrainConfig().checkpoint_layers) == ("auto", 0)


@pytest.mark.parametrize("kind", ["quantized", "dora"])
def test_adapters_of_every_kind(checkpoint_folder, batch, kind):
    """Within 1e-5 of each gradient's norm, on packed matrices too."""
    model = load_model(checkpoint_folder, quantize=4 if kind == "quantized" else None)
    apply_lora(model, "decoder", rank=3, dora=kind == "dora")
    r = np.random.default_rng(0)
    weights = {
        k: w + mx.array(0.1 * r.standard_normal(w.shape).astype(np.float32)) for k, w in lora_parameters(model).items()
    }
    set_lora_parameters(model, weights)
    assert_nothing_changes(model, weights, batch)


def test_modules_that_train_in_full(checkpoint_folder, batch):
    """Matrices below, at and above the line, and the tied embedding, beside no adapters."""
    model = load_model(checkpoint_folder)
    model.freeze()
    line = model.spec.text.first_kv_shared_layer - 1
    train_fully(model, f"layers.0.mlp,layers.{line}.self_attn,layers.{line + 1}.mlp,embed_tokens")
    weights = trained_parameters(model)
    assert_nothing_changes(model, weights, batch)


def test_the_base_s_own_weights(checkpoint_folder, rows):
    """Norms, matrices and embeddings that train themselves, through nn.value_and_grad: nothing here knows adapters."""
    model = load_model(checkpoint_folder)
    text = model.model.language_model
    text.unfreeze(keys=["weight"])
    processor = Processor(checkpoint_folder)
    samples = [processor.sample(e) for e in read_examples(rows / "train.csv")[:3]]
    batch = collate(samples, processor.pad_id, 8)
    at = label_positions(batch.labels, 1)
    found = label_rows(at["positions"], batch.label_count, batch.input_ids.shape)
    labels = LabelRows(mx.array(at["positions"]), **{n: mx.array(a) for n, a in found.items()})
    places = (mx.array(at["targets"]), mx.array(at["weights"]))

    def plain(model):
        hidden = model.hidden(batch.input_ids)
        return loss_sum(model, hidden.reshape(-1, hidden.shape[-1])[labels.flat], *places)[0]

    def saving(model):
        return loss_sum(model, model.hidden(batch.input_ids, labels=labels, recompute=1), *places)[0]

    (wanted, expected), (total, got) = (nn.value_and_grad(model, f)(model) for f in (plain, saving))
    expected, got = dict(tree_flatten(expected)), dict(tree_flatten(got))
    assert relative(total, wanted) < 1e-6 and len(got) == len(expected) > 60
    assert max(relative(got[name], expected[name]) for name in expected) < 1e-5
