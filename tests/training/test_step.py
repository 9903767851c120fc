"""The compiled step against the plain one, and frozen towers outside the gradient against inside."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.layout import lay_out
from gemma_mlx.lora import apply_lora, lora_parameters, set_lora_parameters
from gemma_mlx.loss import loss_and_count
from gemma_mlx.models.load import load_model
from gemma_mlx.parts import split
from gemma_mlx.step import Step, can_compile


@pytest.fixture(scope="module")
def batches(checkpoint_folder, rows):
    processor = Processor(checkpoint_folder, image_tokens=70)
    examples = read_examples(rows / "media.csv")
    samples = [processor.sample(e) for e in examples]
    return [collate(samples[i : i + 5], processor.pad_id, 8) for i in (0, 5)]


def model_with(folder, targets, dropout=0.0):
    model = load_model(folder)
    apply_lora(model, targets, rank=3, dropout=dropout)
    r = np.random.default_rng(0)
    shapes = {k: w.shape for k, w in lora_parameters(model).items()}
    set_lora_parameters(model, {k: mx.array(0.3 * r.standard_normal(s).astype(np.float32)) for k, s in shapes.items()})
    return model


def relative(a, b):
    a, b = np.array(a), np.array(b)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


@pytest.mark.parametrize("targets", ["decoder", pytest.param("all", marks=pytest.mark.slow)])
def test_compiled_equals_plain_and_leaves_the_model_whole(checkpoint_folder, batches, targets):
    """1e-4 of each gradient's norm: fused float32 arithmetic rounds differently."""
    if not can_compile():
        pytest.skip("no C++ compiler: steps run uncompiled here")
    # Compiled steps pad the soft tokens, so an embedder's dropout mask has another shape there, and other values.
    model = model_with(checkpoint_folder, targets, dropout=0.2 if targets == "decoder" else 0.0)
    weights, key = lora_parameters(model), mx.random.key(3)
    plain, compiled = (Step(model, compiled=c) for c in (False, True))
    assert set(plain.frozen) == ({"image", "video", "audio"} if targets == "decoder" else set())
    for batch in batches:
        wanted, sums = plain.gradients(weights, batch, key)
        got, other = compiled.gradients(weights, batch, key)
        assert relative(other.loss, sums.loss) < 1e-5 and other.correct.item() == sums.correct.item()
        assert max(relative(got[k], wanted[k]) for k in weights) < 1e-4
        total, count, correct = loss_and_count(model, batch.inputs(), batch.labels)  # no placeholder was left behind
        evaluated = compiled.evaluate(weights, batch)
        assert relative(evaluated.loss, total) < 1e-5 and evaluated.correct.item() == correct.item()
        assert evaluated.labels == count > 0


def test_frozen_towers_outside_give_the_same_gradients(checkpoint_folder, batches):
    model = model_with(checkpoint_folder, "decoder")
    outside, inside = Step(model, compiled=False), Step(model, compiled=False)
    inside.frozen = {}
    weights, key = lora_parameters(model), mx.random.key(0)
    ready = outside.prepare(batches[0])
    assert "audio_features" in ready.arrays and "input_features" not in ready.arrays
    a, b = outside.gradients(weights, batches[0], key), inside.gradients(weights, batches[0], key)
    assert max(relative(a[0][k], b[0][k]) for k in weights) < 1e-5


def test_gradients_are_those_of_the_loss(checkpoint_folder, batches):
    """Against central differences of the loss along random directions, in each part of the model."""
    model = model_with(checkpoint_folder, "all")
    step, weights = Step(model, compiled=False), lora_parameters(model)
    grads, _ = step.gradients(weights, batches[0], mx.random.key(0))
    r = np.random.default_rng(1)
    for part in ("language_model", "vision_tower", "audio_tower", "embed_audio", "embed_vision"):
        names = [k for k in weights if part in k]
        direction = {k: mx.array(r.standard_normal(weights[k].shape).astype(np.float32)) for k in names}
        norm = sum(mx.sum(d * d).item() for d in direction.values()) ** 0.5

        def moved(by, direction=direction, norm=norm):
            there = {k: w + (by / norm) * direction[k] if k in direction else w for k, w in weights.items()}
            return step.evaluate(there, batches[0]).loss.item()

        slope = sum(mx.sum(direction[k] * grads[k]).item() for k in names) / norm
        measured = (moved(0.02) - moved(-0.02)) / 0.04
        assert abs(slope - measured) < 0.02 * abs(slope) + 2e-2, (part, slope, measured)


def test_dropout_changes_with_the_key_alone(checkpoint_folder, batches):
    model = model_with(checkpoint_folder, "decoder", dropout=0.3)
    step, weights = Step(model, compiled=False), lora_parameters(model)
    losses = [step.gradients(weights, batches[0], mx.random.key(k))[1].loss.item() for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    without = Step(model_with(checkpoint_folder, "decoder"), compiled=False)  # evaluation has no dropout
    assert step.evaluate(weights, batches[0]).loss.item() == without.evaluate(weights, batches[0]).loss.item()


def test_slots_that_do_not_fit_the_media_are_an_error(checkpoint_folder, batches):
    import dataclasses

    spec = load_model(checkpoint_folder).spec
    ids = batches[0].input_ids.copy()
    ids[ids == spec.audio_token_id] = 40
    with pytest.raises(InputError, match="0 audio slots in the text"):
        lay_out(dataclasses.replace(batches[0], input_ids=ids), spec)


@pytest.mark.parametrize("lanes", [2, 3, 9])
def test_rows_shared_out_to_streams_give_the_same_sums(checkpoint_folder, batches, lanes):
    model = model_with(checkpoint_folder, "all")
    weights, key = lora_parameters(model), mx.random.key(0)
    one, several = Step(model, compiled=False), Step(model, compiled=False, lanes=lanes)
    for batch in batches:
        parts = split(batch, lanes, model.spec)
        assert len(parts) == min(lanes, len(batch.input_ids)) and sum((p.row_ids for p in parts), ()) == batch.row_ids
        wanted, sums = one.gradients(weights, batch, key)
        got, other = several.gradients(weights, batch, key)
        assert max(relative(got[k], wanted[k]) for k in weights) < 1e-4
        assert relative(other.loss, sums.loss) < 1e-5
        assert (other.labels, other.tokens) == (sums.labels, sums.tokens)
        assert other.correct.item() == sums.correct.item()
        assert relative(several.evaluate(weights, batch).loss, sums.loss) < 1e-5
