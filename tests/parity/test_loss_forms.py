"""The loss without logits on and off, in every family: the same loss and the same gradient of every adapter tensor."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n
from mlx.utils import tree_flatten
from parity_cases import CASES, make_batch, random_lora
from parity_cases import audio as clip
from parity_pairs import ALPHA, PATTERNS, RANK, TARGETS, copy_lora

from gemma_mlx import head_loss
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.lora import apply_lora, lora_layers, lora_parameters
from gemma_mlx.loss import at_positions, label_positions, loss_sum
from gemma_mlx.models.load import load_model
from gemma_mlx.models.quantize import quantize_model
from gemma_mlx.step import Step

LARGER = {
    "12B": [[30], [3, ("image", 12, 9), clip(9), 9], [clip(3), ("video", 2, 6, 6), 2, ("image", 6, 3), 8]],
    "26B": [[3, ("image", 6, 6), 2, ("image", 12, 9), 9], [30], [("image", 9, 6), ("video", 1, 3, 6), 14]],
}
MAKERS = {
    "E2B": (lambda folder: tiny.make(folder, **PATTERNS["E2B"]), TARGETS),
    "12B": (lambda folder: tiny.make_unified(folder, seed=0), "all"),
    "26B": (lambda folder: tiny.make(folder, seed=0, **tiny.larger(tiny.EXPERTS)), "all,router.proj"),
    "3n": (lambda folder: tiny_gemma3n.make(folder, seed=4), "decoder,audio,embedders,linear_left,modality_router"),
    "gemma3": (lambda folder: tiny_gemma3.make(folder), "decoder"),
}


def adapted(folder, targets, bits=None):
    model = load_model(folder)
    if bits:
        quantize_model(model, bits)
    apply_lora(model, targets, RANK, ALPHA)
    copy_lora(random_lora({p: layer.weight.shape for p, layer in lora_layers(model).items()}, RANK), model)
    return model


@pytest.fixture(scope="module", params=MAKERS)
def family(request, tmp_path_factory):
    make, targets = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(str(folder))
    return request.param, str(folder), targets


def ragged(name):
    """Ragged batches of the family's modalities: (inputs, labels)."""
    if name == "gemma3":
        found = [tiny_gemma3.rows(24), tiny_gemma3.rows(24, 9, 17, seed=1)]
    elif name == "3n":
        made = tiny_gemma3n.inputs
        found = [made("image+audio", n_img=2, lens=(80, 61), batch=2), made("text", n_text=30, batch=3)]
    else:
        cases = [LARGER[name]] if name in LARGER else [CASES["everything"], CASES["right-padded batch"]]
        batches = [make_batch(rows, unified=name == "12B") for rows in cases]
        return [(batch.inputs(), batch.labels) for batch in batches]
    text = [batch["attention_mask"] * (batch["input_ids"] < tiny_gemma3n.BOI) for batch in found]
    return [(b, np.where(t, b["input_ids"], IGNORE_INDEX)) for b, t in zip(found, text, strict=True)]


def step_batch(name):
    """A batch of the family for a step, of more than one row where it has one."""
    if name in ("3n", "gemma3"):
        inputs, labels = ragged(name)[name == "gemma3"]
        types = np.zeros_like(inputs["input_ids"])
        return Batch(**{"mm_token_type_ids": types, **inputs}, labels=labels, row_ids=("row",) * len(labels))
    return make_batch((LARGER | {"E2B": CASES["everything"]})[name], unified=name == "12B")


def gradients(model, inputs, labels, chunked):
    """(loss, correct, name -> gradient)."""
    positions, *where = (mx.array(w) for w in label_positions(labels).values())

    def loss(model):
        return loss_sum(model, at_positions(model.hidden(**inputs), positions), *where, chunked=chunked)

    (total, correct), grads = nn.value_and_grad(model, loss)(model)
    return total.item(), correct.item(), {name: np.array(g) for name, g in tree_flatten(grads)}


def compare(record, what, one, other):
    """Loss within 1e-6, each tensor within 1e-5, of its size."""
    assert abs(one[0] / other[0] - 1) < 1e-6 and one[1] == other[1]
    assert one[2].keys() == other[2].keys() and len(one[2]) > 5
    sizes = {name: np.linalg.norm(g) for name, g in other[2].items()}
    differences = {n: np.linalg.norm(one[2][n] - g) / sizes[n] for n, g in other[2].items() if sizes[n]}
    assert all(not one[2][n].any() for n in sizes.keys() - differences.keys())
    record("loss without logits, loss", what, abs(one[0] / other[0] - 1))
    record("loss without logits, gradients", what, max(differences.values()))
    assert max(differences.values()) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
def test_frozen_head(family, bits, record, monkeypatch):
    """In chunks of a few positions and ids, over a float and a quantized base."""
    name, folder, targets = family
    monkeypatch.setattr(head_loss, "CHUNK", {"cpu": (24, 1 << 12)})
    model = adapted(folder, targets, bits)
    for inputs, labels in ragged(name):
        found = [gradients(model, inputs, labels, chunked) for chunked in (True, False)]
        compare(record, f"{name}, {bits or 32} bits", *found)


def test_training_head(family, record, monkeypatch):
    """With the tied embedding training beside the adapters."""
    name, folder, targets = family
    monkeypatch.setattr(head_loss, "CHUNK", {"cpu": (24, 1 << 12)})
    model = adapted(folder, targets)
    model.output_head()[0].unfreeze()
    inputs, labels = ragged(name)[0]
    found = [gradients(model, inputs, labels, chunked) for chunked in (True, False)]
    assert any(n.endswith("embed_tokens.weight") for n in found[0][2])
    compare(record, f"{name}, head trains", *found)


@pytest.mark.parametrize("lanes", [1, 2])
def test_in_a_training_step(family, lanes, record):
    """Frozen media outside the gradient, rows over threads, fixed padding of positions."""
    name, folder, _ = family
    model, batch, found = adapted(folder, "decoder"), step_batch(name), []
    for chunked in (None, False):
        step = Step(model, compiled=False, lanes=lanes, chunked_loss=chunked)
        grads, sums = step.gradients(lora_parameters(model), batch, mx.random.key(0))
        found.append((sums.loss.item(), sums.correct.item(), {n: np.array(g) for n, g in grads.items()}))
        evaluated = step.evaluate(lora_parameters(model), batch)
        assert abs(evaluated.loss.item() / sums.loss.item() - 1) < 1e-6 and evaluated.correct.item() == found[-1][1]
    compare(record, f"{name}, step over {lanes}", *found)
