"""A step that pads to buckets beside the plain one, for any checkpoint and rows."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.buckets import TOKENS, choose_buckets, of_sample
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import Shuffled
from gemma_mlx.data.processor import Processor
from gemma_mlx.layout import sizes
from gemma_mlx.lora import apply_lora, lora_parameters, set_lora_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step


def relative(a, b):
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def counted(dataset):
    """The dataset with its rows' sizes."""
    dataset.sizes = np.stack([of_sample(dataset.processor.sample(e, with_features=False)) for e in dataset.examples])
    dataset.lengths = dataset.sizes[:, TOKENS].tolist()
    return dataset


def model_with(folder, targets):
    """Adapters with random weights."""
    model = load_model(folder)
    apply_lora(model, targets, rank=3)
    r = np.random.default_rng(8)
    shapes = {k: w.shape for k, w in lora_parameters(model).items()}
    set_lora_parameters(model, {k: mx.array(0.3 * r.standard_normal(s).astype(np.float32)) for k, s in shapes.items()})
    return model


def furthest(found, wanted):
    """Largest relative difference of a tensor; those that no medium reaches are zero."""
    return max((relative(found[k], wanted[k]) for k in wanted if np.array(wanted[k]).any()), default=0.0)


def longer(batch):
    """The batch with 32 more tokens of padding."""
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "mm_token_type_ids": 0}
    return replace(
        batch, **{k: np.pad(getattr(batch, k), ((0, 0), (0, 32)), constant_values=v) for k, v in fill.items()}
    )


def assert_nothing_changes(folder, table, targets, monkeypatch, size=2, one_shape=True):
    """Over an epoch: the loss within 1e-6; gradients within 1e-5, or twice what rounding makes of the plain step's when
    rows are padded by 32 tokens, where that is more; all batches of a bucket have its shapes."""
    for room in ("multimodal", "gemma3n.model"):  # more soft tokens than slots, as in compiled steps, which cannot look
        monkeypatch.setattr(f"gemma_mlx.models.{room}.check_ids", lambda *_: None)
    dataset, model = counted(Dataset(table, Processor(folder))), model_with(folder, targets)
    plan, spec, shapes = Shuffled(len(dataset), size), model.spec, {}
    plain, padded = Step(model, compiled=False), Step(model, compiled=False)
    padded.buckets = choose_buckets(dataset.sizes, plan, size, partial(padded.work, size))
    weights, key = lora_parameters(model), mx.random.key(0)
    for batch in Batches(dataset, size, plan=plan, epochs=1):
        wanted, sums = plain.gradients(weights, batch, key)
        found, other = padded.gradients(weights, batch, key)
        assert relative(other.loss, sums.loss) < 1e-6
        floor = furthest(plain.gradients(weights, longer(batch), key)[0], wanted)
        assert furthest(found, wanted) < max(1e-5, 2 * floor), (batch.row_ids, floor)
        bucket = padded.buckets.find(sizes(batch, spec), len(batch.input_ids))
        ready = padded.prepare(batch).arrays
        shapes.setdefault(bucket.tobytes(), set()).add(tuple((n, a.shape, str(a.dtype)) for n, a in ready.items()))
    assert all(len(found) == 1 for found in shapes.values()) or not one_shape
