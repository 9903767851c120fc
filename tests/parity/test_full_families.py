"""Weights that train in full in Gemma 3n, 26B-A4B's experts, 12B's embedders and Gemma 3, against torch's autograd."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n as tiny3n
import torch
from full_pairs import differences, gradient, release, step_gradients
from larger_pairs import CASES, make_larger
from parity_cases import audio, image, make_batch

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.full import train_fully, trained_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step

BOUND = 1e-3  # ‖a − b‖ / ‖b‖ of each tensor


def their_gradients(model, tensors, parameters):
    model.zero_grad(set_to_none=True)
    model(**tensors, use_cache=False).loss.backward()
    return {name: gradient(p) for name, p in parameters.items()}


def labelled(batch: dict, last: int) -> Batch:
    """Arrays named as in transformers' forward, with labels on text below the id `last`."""
    ids = batch["input_ids"]
    labels = np.where(batch["attention_mask"] * (ids < last), ids, IGNORE_INDEX)
    types = np.zeros_like(ids)
    arrays = {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in batch.items() if k != "mm_token_type_ids"}
    return Batch(labels=labels, mm_token_type_ids=types, **arrays)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    found = {k: torch.tensor(v) for k, v in {**batch.inputs(), "labels": batch.labels}.items()}
    found.pop("mm_token_type_ids")
    return {k: v.long() if v.dtype == torch.int32 else v for k, v in found.items()}


def check(record, what, found, expected, zero=()):
    """Every tensor within the bound; of zero gradient only those that `zero` names."""
    of = differences(found, expected)
    worst = max(of, key=of.get)
    record(f"full gradients {what}", worst, of[worst])
    assert of[worst] <= BOUND, worst
    assert {n for n, g in expected.items() if not g.any()} <= set(zero)


SHALLOW = dict(  # four layers: through ten, the reference's own noise on pixels reaches 1e-4
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
)  # fmt: skip


def test_gemma3n(tmp_path, record):
    """Decoder with AltUp and LAuReL, both towers with all their convolutions, embedders and their tables, the head."""
    pytest.importorskip("timm")
    torch.set_num_threads(1)
    reference, ours = tiny3n.make(tmp_path, seed=4, text=SHALLOW), load_model(tmp_path)
    train_fully(ours, "all,embed_tokens,embed_vision.embedding,embed_audio.embedding")
    parameters = release(reference, trained_parameters(ours))
    batch = labelled(tiny3n.inputs("image+audio", n_img=2, lens=(80, 61), batch=2), tiny3n.BOI)
    expected = their_gradients(reference, tensors_of(batch), parameters)
    _, found = step_gradients(ours, batch)
    check(record, "3n", found, expected)
    left = {n.rpartition(".")[2] for n, _ in reference.named_parameters() if n not in parameters}
    assert left == {"correct_output_scale", "per_dim_scale", "gamma", "weight"}  # weight: the per-layer table


def test_experts(tmp_path, record):
    """Stacks of 26B-A4B's experts and its router's matrix, with pictures."""
    torch.set_num_threads(1)
    tiny.make(tmp_path, seed=0, **tiny.larger(tiny.EXPERTS))
    pair = make_larger("26B", tmp_path)
    train_fully(pair.ours, "decoder,embedders,embed_tokens")
    names = sorted(trained_parameters(pair.ours))
    assert "model.language_model.layers.3.experts.gate_up_proj" in names
    assert not any(n.endswith(("scale", "layer_scalar")) for n in names)
    parameters = release(pair.theirs.model, names)
    for case in ("right-padded batch", "several pictures, padded rows"):
        batch = make_batch(CASES[case], seed=1)
        expected = their_gradients(pair.theirs.model, pair.theirs.tensors(batch), parameters)
        _, found = step_gradients(pair.ours, batch)
        embedder = () if "pictures" in case else ("model.embed_vision.embedding_projection.weight",)
        check(record, f"26B, {case}", found, expected, embedder)


def test_unified_embedders(tmp_path, record):
    """12B: dense layers and layer norms with biases, pictures and raw samples; its table of positions stays."""
    torch.set_num_threads(1)
    tiny.make_unified(tmp_path, seed=0)
    pair = make_larger("12B", tmp_path)
    train_fully(pair.ours, "embedders,norm")
    names = sorted(trained_parameters(pair.ours))
    assert "model.embed_vision.patch_ln1.bias" in names and not any("pos_embedding" in n for n in names)
    parameters = release(pair.theirs.model, names)
    batch = make_batch([[3, image(12, 9), audio(9), 9], [audio(3), 2, image(6, 3), 8]], unified=True)
    expected = their_gradients(pair.theirs.model, pair.theirs.tensors(batch), parameters)
    _, found = step_gradients(pair.ours, batch)
    check(record, "12B", found, expected)


def test_gemma3_text(tmp_path, record):
    """Norms that add one, and names of a model without towers: all of it is decoder."""
    torch.set_num_threads(1)
    reference, ours = tiny_gemma3.make(tmp_path), load_model(tmp_path)
    train_fully(ours, "decoder,embed_tokens")
    parameters = release(reference, trained_parameters(ours))
    assert parameters.keys() == dict(reference.named_parameters()).keys()
    rng = np.random.default_rng(0)
    ids = rng.integers(3, ours.spec.text.vocab_size - 8, (2, 30)).astype(np.int32)
    ones = np.ones_like(ids)
    batch = Batch(ids, ones, np.zeros_like(ids), ids)
    expected = their_gradients(reference, tensors_of(batch), parameters)
    _, found = step_gradients(ours, batch)
    check(record, "Gemma 3", found, expected)


def test_lanes_give_the_same_gradients_with_experts(tmp_path):
    """Trained towers inside the function that is differentiated, rows over three threads."""
    tiny.make(tmp_path, seed=0, **tiny.larger(tiny.EXPERTS))
    model = load_model(tmp_path)
    train_fully(model, "all,embed_tokens")
    batch, weights = make_batch(CASES["several pictures, padded rows"]), trained_parameters(model)
    whole, _ = Step(model, compiled=False).gradients(weights, batch, mx.random.key(0))
    step = Step(model, compiled=False, lanes=3)
    assert not step.frozen
    shared, _ = step.gradients(weights, batch, mx.random.key(0))
    for name, g in whole.items():
        assert float(mx.linalg.norm(shared[name] - g)) <= 1e-4 * float(mx.linalg.norm(g)) + 1e-7, name
