"""Label positions alone above the line and gradient checkpointing: the same loss and gradients as without them.

Every family's pattern of layers, ragged batches of all media, adapters on every linear of decoder, towers and
embedders. Loss within 1e-6 (relative), each gradient within 1e-5 of ‖a − b‖ / ‖b‖: float32 sums in another order, since
matrix products of fewer rows are cut into other blocks.
"""

import dataclasses
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n
from larger_pairs import MAKERS
from parity_cases import audio, image, make_batch, random_lora, relative_differences, video
from parity_pairs import ALPHA, PATTERNS, RANK, copy_lora, make_adapted

from gemma_mlx import step as step_module
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.lora import apply_lora, lora_layers, lora_parameters
from gemma_mlx.models import blocks
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step, can_compile

FAMILIES = {
    **{name: partial(tiny.make, **options) for name, options in PATTERNS.items()},
    **MAKERS,
    "Gemma 3": tiny_gemma3.make,
    "3n": partial(tiny_gemma3n.make, seed=1),  # of the seeds tried (0 to 5) with the lowest float32 noise
}
SETTINGS = {
    "label positions": {},
    "every layer": dict(pick_labels=False, recompute=1),
    "every 3rd layer": dict(pick_labels=False, recompute=3),
    "both": dict(recompute=2),
}
PICTURES = [[3, image(6, 6), 2, image(12, 9), 9], [30], [image(9, 6), video(2, 6, 6), 2, image(3, 3), 5]]
EVERYTHING = [[30], [3, image(12, 9), audio(9), 9], [audio(3), video(2, 6, 6), 2, image(6, 3), 8]]
LOSS, GRADIENT = 1e-6, 1e-5


def ragged(name: str) -> Batch:
    """Rows of other lengths and media, labels on the last text of each."""
    if name == "Gemma 3":
        batch = make_batch([[24], [9], [41]])
        labels = batch.labels.copy()
        labels[:, :6] = IGNORE_INDEX
        return dataclasses.replace(batch, labels=labels)
    if name != "3n":
        return make_batch(PICTURES if name in ("31B", "26B") else EVERYTHING, unified=name == "12B")
    arrays = tiny_gemma3n.inputs("image+audio", lens=(80, 61), n_text=20, batch=2)
    ids, mask = (arrays.pop(n).astype(np.int32) for n in ("input_ids", "attention_mask"))
    labels = np.where(mask * (ids < tiny_gemma3n.BOI), ids, IGNORE_INDEX).astype(np.int32)
    for row, last in zip(labels, mask.sum(1), strict=True):
        row[: last - 12] = IGNORE_INDEX
    return Batch(ids, mask, np.zeros_like(ids), labels, **arrays)


def relabelled(batch: Batch, kind: str) -> Batch:
    """The batch with labels where `kind` says."""
    labels = np.full_like(batch.labels, IGNORE_INDEX)
    real = batch.attention_mask.astype(bool)
    if kind == "all labels":
        labels[real] = batch.input_ids[real]
    elif kind == "one label":
        labels[-1, 7] = 5
    elif kind == "one full row, the others without":
        labels[0, real[0]] = batch.input_ids[0, real[0]]
    return dataclasses.replace(batch, labels=labels)


LABELS = ("one label", "one full row, the others without", "all labels", "no label")


def adapted_model(folder, targets="all", dropout=0.0):
    model = load_model(folder)
    apply_lora(model, targets, RANK, ALPHA, dropout)
    copy_lora(random_lora({p: layer.weight.shape for p, layer in lora_layers(model).items()}, RANK), model)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("savings")
    FAMILIES[request.param](folder)
    return request.param, folder, adapted_model(folder)


def gradients(step, batch, key=0):
    """(loss, name -> gradient) in numpy."""
    found, sums = step.gradients(lora_parameters(step.model), batch, mx.random.key(key))
    return sums.loss.item(), {name: np.array(g) for name, g in found.items()}


def furthest(ours, theirs):
    pairs = ({n: (g[n], g[n]) for n in theirs} for g in (ours, theirs))
    return max(relative_differences(*pairs).values())


def judged(ours, theirs, bound=GRADIENT):
    assert all(np.isfinite(g).all() for g in ours[1].values())
    assert abs(ours[0] - theirs[0]) <= LOSS * abs(theirs[0])
    assert furthest(ours[1], theirs[1]) <= bound


def test_each_saving_changes_nothing(family, record):
    name, _, model = family
    batch = ragged(name)
    plain = gradients(Step(model, compiled=False, pick_labels=False), batch)
    assert plain[0] > 1
    for setting, options in SETTINGS.items():
        step = Step(model, compiled=False, **options)
        assert ("columns" in step.prepare(batch).arrays) == step.pick_labels
        found = gradients(step, batch)
        record(f"gradients, {setting} on and off", name, furthest(found[1], plain[1]))
        judged(found, plain)
        evaluated = step.evaluate(lora_parameters(model), batch)
        assert abs(evaluated.loss.item() - plain[0]) <= LOSS * plain[0]


@pytest.mark.parametrize("labels", LABELS)
def test_any_number_of_labels(family, labels, monkeypatch):
    """Also where label positions would not pay, and are chosen all the same."""
    name, _, model = family
    batch = relabelled(ragged(name), labels)
    plain = gradients(Step(model, compiled=False, pick_labels=False), batch)
    step = Step(model, compiled=False, recompute=2)
    assert labels not in ("no label", "one label") or "columns" in step.prepare(batch).arrays
    judged(gradients(step, batch), plain)
    monkeypatch.setattr(step_module, "WORTH_PICKING", 9.0)
    assert "columns" in step.prepare(batch).arrays
    judged(gradients(step, batch), plain)


def test_rows_full_of_labels_are_left_alone(family):
    """Where all positions carry labels there is nothing to save; a row's padding is a saving of its own."""
    name, _, model = family
    batch = relabelled(ragged(name), "all labels")
    first = int(batch.attention_mask[0].sum())
    text = Batch(*(getattr(batch, n)[:1, :first] for n in ("input_ids", "attention_mask", "mm_token_type_ids")),
                 batch.labels[:1, :first])  # fmt: skip
    text.input_ids[:] = np.minimum(text.input_ids, 200)
    step = Step(model, compiled=False)
    assert "columns" not in step.prepare(text).arrays
    few = text.labels.copy()
    few[:, 5:] = IGNORE_INDEX
    assert "columns" in step.prepare(dataclasses.replace(text, labels=few)).arrays


@pytest.mark.parametrize("family", ["E2B", "12B", "3n"], indirect=True)
def test_in_lanes(family):
    """Rows shared out to threads; the sums of lanes differ from those of one, so both sides have two.

    Adapters on the decoder: in float32 the rounding of the audio tower, deep below, reaches 1e-5 by itself.
    """
    name, folder, _ = family
    model, batch = adapted_model(folder, "decoder"), ragged(name)
    plain = gradients(Step(model, compiled=False, lanes=2, pick_labels=False), batch)
    judged(gradients(Step(model, compiled=False, lanes=2, recompute=1), batch), plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["E2B", "31B", "3n"], indirect=True)
def test_compiled(family):
    """Against the compiled step without savings; towers are frozen, to spare their compilation."""
    if not can_compile():
        pytest.skip("no C++ compiler: steps run uncompiled here")
    name, folder, _ = family
    model, batch = adapted_model(folder, "decoder"), ragged(name)
    plain = gradients(Step(model, compiled=True, pick_labels=False), batch)
    both = Step(model, compiled=True, recompute=1)
    assert "columns" in both.prepare(batch).arrays
    judged(gradients(both, batch), plain)


@pytest.mark.parametrize("family", ["E2B", "3n"], indirect=True)
def test_recomputing_draws_the_same_dropout(family):
    name, folder, _ = family
    model, batch = adapted_model(folder, "decoder", dropout=0.3), ragged(name)
    plain, again = (Step(model, compiled=False, pick_labels=False, recompute=n) for n in (0, 1))
    wanted = gradients(plain, batch, key=5)
    judged(gradients(again, batch, key=5), wanted)
    assert furthest(gradients(again, batch, key=6)[1], wanted[1]) > 1e-2


def test_dropout_above_the_line_computes_all_positions(family):
    name, folder, _ = family
    model = adapted_model(folder, "decoder", dropout=0.3)
    assert not Step(model).pick_labels
    decoder = model.decoder
    line = decoder.spec.first_kv_shared_layer - 1
    for adapter in (a for layer in decoder.layers[line:] for a in lora_layers(layer).values()):
        adapter.dropout = 0.0
    step, batch = Step(model, compiled=False), ragged(name)
    assert step.pick_labels and step.dropout
    plain = Step(model, compiled=False, pick_labels=False)
    judged(gradients(step, batch, key=5), gradients(plain, batch, key=5))


def test_recomputing_keeps_the_training_mode(tmp_path):
    """3n bounds AltUp's coefficients in training alone; the backward comes when that mode has ended."""
    tiny_gemma3n.make(tmp_path, text=dict(altup_coef_clip=0.2))
    model, batch = adapted_model(tmp_path, "decoder"), ragged("3n")
    plain, again = (Step(model, compiled=False, recompute=n) for n in (0, 1))
    wanted = gradients(plain, batch)
    judged(gradients(again, batch), wanted)
    assert not model.training
    assert abs(plain.evaluate(lora_parameters(model), batch).loss.item() - wanted[0]) > 1e-3  # the bound is met


@pytest.mark.parametrize("family", ["E2B"], indirect=True)
def test_a_second_run_starts_from_the_same_model(family):
    """Nothing stays behind, on the model or on its classes: a step after others gives what it gave before."""
    name, _, model = family
    batch, kind = ragged(name), type(model.decoder.layers[0])
    before, methods = lora_parameters(model), dict(vars(kind))
    first = gradients(Step(model, compiled=False, recompute=1), batch)
    for _ in range(2):
        gradients(Step(model, compiled=False, recompute=2), batch)
    assert gradients(Step(model, compiled=False, recompute=1), batch)[0] == first[0]
    assert dict(vars(kind)) == methods
    after = lora_parameters(model)
    assert all(np.array_equal(np.array(after[n]), np.array(w)) for n, w in before.items())


def test_checkpointing_holds_one_layer(tmp_path, monkeypatch):
    """Ten layers: the peak without it is that of many, with it that of one and the streams between.

    Whole rows meet at once here: in blocks little of so narrow a layer is attention, and the streams weigh more.
    """
    monkeypatch.setitem(blocks.BLOCK, mx.default_device().type.name, 512)
    tiny.make(tmp_path, vision=None, audio=None)
    model, batch = adapted_model(tmp_path, "decoder"), make_batch([[300], [280]])
    peaks = {}
    for n in (0, 1):
        step = Step(model, compiled=False, pick_labels=False, recompute=n)
        gradients(step, batch)
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        gradients(step, batch)
        peaks[n] = mx.get_peak_memory() - start
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize("name", PATTERNS)
def test_against_torch(name, folders, judge):
    """Both savings at once against PEFT's gradients."""
    pair = make_adapted(name, folders[name])
    batch = make_batch([[30], [3, image(9, 3), audio(61), 9], [audio(101), 2, image(6, 6), 2, image(3, 3), 8]])
    expected = pair.theirs.run(batch)
    step = Step(pair.ours, compiled=False, recompute=1)
    assert "columns" in step.prepare(batch).arrays
    loss, found = gradients(step, batch)
    assert abs(loss / batch.label_count - expected.loss) <= 1e-5
    ours = {p: (found[f"{p}.lora_a"], found[f"{p}.lora_b"]) for p in expected.gradients}
    ours = {p: tuple(g / batch.label_count for g in pair_) for p, pair_ in ours.items()}
    worst = max(relative_differences(ours, expected.gradients).values())
    judge(f"gradients with both savings {name}", "everything", 2e-5, worst, 1e-3, least=5e-5)
