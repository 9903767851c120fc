"""Samples end to end in a row give what they give in rows of their own, and nothing passes from one to another.

Every family's pattern of layers, samples of all media, one of them many sliding windows long. Against ours in rows of
their own: loss within 1e-6 (relative), each gradient within 1e-5 of ‖a − b‖ / ‖b‖: float32 sums in another order, since
the matrix products are of other shapes. Against transformers, a sample at a time.
"""

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n
from larger_pairs import MAKERS, make_larger
from packed_rows import GROUPS, apart, packed, samples_of
from parity_cases import random_lora, relative_differences
from parity_pairs import ALPHA, PATTERNS, RANK, copy_lora, make_adapted, perturbed

from gemma_mlx.errors import InputError
from gemma_mlx.lora import apply_lora, lora_layers, lora_parameters
from gemma_mlx.models.decoder import place
from gemma_mlx.models.load import load_model
from gemma_mlx.spec import FULL, SLIDING
from gemma_mlx.step import Step, can_compile

FAMILIES = {
    **{name: partial(tiny.make, **options) for name, options in PATTERNS.items()},
    **MAKERS,
    "12B, runs in all layers": MAKERS["12B"],
    "Gemma 3": tiny_gemma3.make,
    "3n": partial(tiny_gemma3n.make, seed=1),
}
SETTINGS = {
    "all positions": dict(pick_labels=False),
    "label positions": {},
    "recomputed": dict(recompute=1),
    "chunked loss": dict(chunked_loss=True),
}
LOSS, GRADIENT = 1e-6, 1e-5


def adapted_model(folder, name="", targets="decoder", dropout=0.0, **options):
    model = load_model(folder, vision_runs="all" if name.endswith("in all layers") else "sliding", **options)
    apply_lora(model, targets, RANK, ALPHA, dropout)
    copy_lora(random_lora({p: layer.weight.shape for p, layer in lora_layers(model).items()}, RANK), model)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    FAMILIES[request.param](folder)
    return request.param, folder, adapted_model(folder, request.param)


def gradients(step, batch, key=0):
    """(loss, name -> gradient) in numpy."""
    found, sums = step.gradients(lora_parameters(step.model), batch, mx.random.key(key))
    return sums.loss.item(), {name: np.array(g) for name, g in found.items()}


def furthest(ours, theirs):
    pairs = ({n: (g[n], g[n]) for n in theirs} for g in (ours, theirs))
    return max(relative_differences(*pairs).values())


def judged(ours, theirs):
    assert all(np.isfinite(g).all() for g in ours[1].values())
    assert abs(ours[0] - theirs[0]) <= LOSS * abs(theirs[0])
    assert furthest(ours[1], theirs[1]) <= GRADIENT


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_equals_apart(family, setting, record):
    name, _, model = family
    samples, options = samples_of(name), SETTINGS[setting]
    step = Step(model, compiled=False, **options)
    rows, row = packed(samples, GROUPS), apart(samples)
    assert rows.label_count == row.label_count
    assert ("columns" in step.prepare(rows).arrays) == step.pick_labels
    ours, theirs = gradients(step, rows), gradients(step, row)
    record(f"packed against apart, {setting}, loss", name, abs(ours[0] / theirs[0] - 1))
    record(f"packed against apart, {setting}, gradients", name, furthest(ours[1], theirs[1]))
    judged(ours, theirs)


@pytest.mark.parametrize("family", ["E2B", "12B", "3n"], indirect=True)
def test_in_lanes(family):
    """Packed rows shared out to threads. In the others noise of 1e-7 on the embeddings moves gradients by more than
    1e-5, and so does the order in which one row's products are summed."""
    name, _, model = family
    samples = samples_of(name)
    judged(*(gradients(Step(model, compiled=False, lanes=2), b) for b in (packed(samples, GROUPS), apart(samples))))


def test_one_row_of_all(family):
    """A batch of one row, in another order, the longest last."""
    name, _, model = family
    samples = samples_of(name)
    step = Step(model, compiled=False)
    judged(gradients(step, packed(samples, [[5, 3, 1, 0, 4, 2]])), gradients(step, apart(samples)))


def logits(model, batch, soft, segments=True):
    """Logits in numpy, of soft tokens that were made before."""
    kept = ("input_ids", "mm_token_type_ids", *(["segment_ids"] if segments else []))
    return np.array(model(**{name: getattr(batch, name) for name in kept}, **soft))


def changed(model, batch, soft, own, rng):
    """The batch with other ids at `own` positions, and its soft tokens with others there."""
    ids = batch.input_ids.copy()
    text = own & (ids < 240)
    ids[text] = rng.integers(3, 240, text.sum())
    new = {}
    for name, rows in soft.items():
        token_id = getattr(model.spec, name.replace("soft_tokens", "token_id"))
        there = own[batch.input_ids == token_id]
        noise = rng.standard_normal(rows.shape).astype(np.float32) * there[:, None]
        new[name] = rows + mx.array(noise)
    return dataclasses.replace(batch, input_ids=ids), new


def test_nothing_leaks(family):
    """Other tokens in one segment, media included: every other logit stays the same, bit for bit, and that segment's
    own do not. Without segment ids later ones change."""
    name, _, model = family
    batch, rng = packed(samples_of(name), GROUPS), np.random.default_rng(0)
    soft = model.encode(
        **{n: a for n, a in batch.inputs().items() if n.startswith(("pixel", "image", "video", "input_f"))}
    )
    before, open_before = (logits(model, batch, soft, segments) for segments in (True, False))
    real = batch.attention_mask.astype(bool)
    for row, segment in ((0, 2), (1, 1), (1, 3)):
        own = np.zeros(batch.input_ids.shape, bool)
        own[row] = batch.segment_ids[row] == segment
        others = real & ~own
        new = changed(model, batch, soft, own, rng)
        after = logits(model, *new)
        assert np.array_equal(after[others], before[others])
        assert (np.abs(after[own] - before[own]).max(-1) > 1e-3).all()
        if segment < 3:
            assert np.abs(logits(model, *new, segments=False) - open_before)[others].max() > 1e-3


@pytest.mark.parametrize("vision_runs", ["sliding", "all"])
def test_masks_and_positions_by_their_definition(vision_runs):
    """Of all pairs of positions, where pictures also touch across the border of two segments."""
    rng, length, window = np.random.default_rng(1), 37, 5
    spec = SimpleNamespace(sliding_window=window, bidirectional_vision=True, vision_runs=vision_runs)
    for _ in range(5):
        types = rng.choice([0, 0, 1, 1, 1, 2, 3], (2, length)).astype(np.int32)
        cuts = [np.sort(rng.choice(np.arange(1, length), 4, replace=False)) for _ in range(2)]
        segments = np.stack([np.searchsorted(cut, np.arange(length), side="right") for cut in cuts]) + 1
        segments[segments == 5] = 0
        given = dict(mm_token_type_ids=mx.array(types), segment_ids=mx.array(segments))
        where = place(spec, length, mx.float32, **given)
        masks = {kind: np.array(where.masks[kind])[:, 0] == 0 for kind in (SLIDING, FULL)}
        for row in range(2):
            starts = {s: list(segments[row]).index(s) for s in set(segments[row])}
            assert np.array(where.positions)[row].tolist() == [i - starts[s] for i, s in enumerate(segments[row])]
            vision = np.isin(types[row], (1, 2))
            for q, k in itertools.product(range(length), repeat=2):
                run = bool(vision[min(q, k) : max(q, k) + 1].all())
                same, near = segments[row, q] == segments[row, k], q - k < window
                full = same and (k <= q or (run and vision_runs == "all"))
                sliding = same and ((k <= q and near) or (run and (near or vision_runs == "all")))
                assert masks[FULL][row, q, k] == full and masks[SLIDING][row, q, k] == sliding


def test_positions_begin_again(family):
    """A sample gives the same logits wherever it lies in a row, up to rounding."""
    name, _, model = family
    samples = samples_of(name)
    first = np.array(model(**packed(samples, [[0, 3, 1]]).inputs()))
    n = [s.input_ids.size for s in samples]
    moved = np.array(model(**packed(samples, [[1, 3, 0]]).inputs()))
    assert np.abs(moved[0, n[1] + n[3] :][: n[0]] - first[0, : n[0]]).max() <= 2e-5 * np.abs(first).max()


@pytest.mark.parametrize("family", ["E2B", "3n"], indirect=True)
def test_dropout_above_and_below(family):
    """Dropout keeps packed steps to all positions; another key, another loss."""
    name, folder, _ = family
    model, batch = adapted_model(folder, dropout=0.3), packed(samples_of(name), GROUPS)
    wanted = gradients(Step(model, compiled=False), batch, key=5)
    judged(gradients(Step(model, compiled=False, recompute=1), batch, key=5), wanted)
    assert abs(gradients(Step(model, compiled=False), batch, key=6)[0] - wanted[0]) > 1e-3 * wanted[0]


@pytest.mark.parametrize("family", ["E2B", "12B"], indirect=True)
def test_media_encoded_in_the_gradient(family):
    """Adapters on towers and embedders too."""
    name, folder, _ = family
    step, samples = Step(adapted_model(folder, targets="all"), compiled=False), samples_of(name)
    judged(*(gradients(step, batch) for batch in (packed(samples, GROUPS), apart(samples))))


@pytest.mark.parametrize("family", ["E2B"], indirect=True)
def test_tables_on_disk_and_cached_towers(family):
    """The second step finds all media in the cache, whichever way their samples lie."""
    name, folder, _ = family
    samples = samples_of(name)
    step = Step(adapted_model(folder, disk_bytes=0), compiled=False)
    assert step.tables and step.frozen
    judged(*(gradients(step, batch) for batch in (packed(samples, GROUPS), apart(samples))))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["E2B", "31B", "Gemma 3"], indirect=True)
def test_compiled(family):
    if not can_compile():
        pytest.skip("no C++ compiler: steps run uncompiled here")
    name, _, model = family
    samples = samples_of(name)
    wanted = gradients(Step(model, compiled=False), apart(samples))
    judged(gradients(Step(model, compiled=True), packed(samples, GROUPS)), wanted)


def test_segments_come_without_a_cache(family):
    model, ids = family[2], np.full((1, 9), 5, np.int32)
    with pytest.raises(InputError, match="segment_ids"):
        model(ids, segment_ids=ids, cache=model.make_cache())


ORACLES = {
    **{name: partial(make_adapted, name) for name in PATTERNS},
    **{name: partial(make_larger, name, adapted=True) for name in MAKERS},
    "12B, runs in all layers": partial(make_larger, "12B", adapted=True, vision_runs="all"),
    "Gemma 3": partial(make_adapted, "Gemma 3", targets="decoder"),
    "3n": partial(make_adapted, "3n", targets="decoder"),
}


def transformers_alone(pair, samples, noise_seed=None):
    """(loss sum, path -> summed gradients) of transformers over the samples one at a time."""
    total, sums = 0.0, {}
    for sample in samples:
        if pair.name in ("Gemma 3", "3n"):
            sample = dataclasses.replace(sample, mm_token_type_ids=None)
        size = 0.0 if noise_seed is None else 1e-7
        with perturbed(pair.theirs.model, sample, noise_seed or 0, size) as changed:
            found = pair.theirs.run(changed)
        total += found.loss * sample.label_count
        for path, grads in found.gradients.items():
            more = [g * sample.label_count for g in grads]
            sums[path] = [a + b for a, b in zip(sums.get(path, (0, 0)), more, strict=True)]
    return total, sums


@pytest.mark.parametrize("name", ORACLES)
def test_against_transformers_one_at_a_time(name, tmp_path, judge):
    """The floor is the reference's own, with noise of 1e-7 on embeddings and media."""
    FAMILIES[name](tmp_path)
    pair, samples = ORACLES[name](str(tmp_path)), samples_of(name)
    total, sums = transformers_alone(pair, samples)
    noisy = transformers_alone(pair, samples, noise_seed=1)[1]
    floor = max(relative_differences(noisy, sums).values())
    loss, found = gradients(Step(pair.ours, compiled=False), packed(samples, GROUPS))
    assert abs(loss / total - 1) <= 1e-5
    ours = {path: (found[f"{path}.lora_a"], found[f"{path}.lora_b"]) for path in sums}
    worst = max(relative_differences(ours, sums).values())
    judge("gradients of packed rows against samples alone", name, floor, worst, 1e-3, least=2e-5)
