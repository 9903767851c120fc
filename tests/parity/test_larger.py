"""Gemma 4 31B, 26B-A4B and 12B against transformers: logits, gradients of adapters, routing; all random, float32."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import torch
from larger_pairs import AUDIO_CASES, CASES, MAKERS, make_larger
from parity_cases import image, make_batch, relative_differences, video
from parity_pairs import noisy, our_gradients
from test_logits import BOUND, compare

from gemma_mlx.models.load import load_model
from gemma_mlx.models.media import MEDIA

GRADIENT_BOUND = 1e-3  # ‖a − b‖ / ‖b‖ of each tensor
EVERY = [(name, case) for name in MAKERS for case in (*CASES, *(AUDIO_CASES if name == "12B" else ()))]
# Each of these runs backwards five times in torch.
LEARNED = [
    *((name, case) for name in MAKERS for case in ("beyond the window", "several pictures, padded rows")),
    ("31B", "videos of other lengths, and a picture"),
    ("12B", "everything"),
]


@pytest.fixture(scope="session")
def larger_folders(tmp_path_factory):
    torch.set_num_threads(1)
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in MAKERS}
    for name, folder in folders.items():
        MAKERS[name](folder)
    return folders


@pytest.fixture(scope="module")
def pairs(larger_folders):
    return {name: make_larger(name, folder) for name, folder in larger_folders.items()}


@pytest.fixture(scope="module")
def adapted_pairs(larger_folders):
    return {name: make_larger(name, folder, adapted=True) for name, folder in larger_folders.items()}


def batch_of(name, case, **options):
    return make_batch({**CASES, **AUDIO_CASES}[case], unified=name == "12B", **options)


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_logits(pairs, name, case, judge):
    floor, difference = compare(pairs[name], batch_of(name, case))
    judge(f"logits {name}", case, floor, difference, BOUND, least=1e-5)


def test_unified_as_its_plain_forward(larger_folders, judge):
    """With runs seen in all layers, 12B is transformers' forward as it is called."""
    pair = make_larger("12B", larger_folders["12B"], vision_runs="all")
    for case in ("text", "several pictures, padded rows", "a picture longer than the window", "everything"):
        floor, difference = compare(pair, batch_of("12B", case))
        judge("logits 12B, runs in all layers", case, floor, difference, BOUND, least=1e-5)


@pytest.mark.parametrize(("name", "case"), LEARNED)
def test_gradients(adapted_pairs, name, case, judge):
    pair, batch = adapted_pairs[name], batch_of(name, case)
    expected = pair.theirs.run(batch)
    loss, gradients = our_gradients(pair.ours, batch)
    assert abs(loss - expected.loss) <= 1e-5
    again = (pair.theirs.run(b).gradients for b in noisy(pair.theirs, batch))
    floor = max(max(relative_differences(g, expected.gradients).values()) for g in again)
    differences = relative_differences(gradients, expected.gradients)
    worst = max(differences, key=differences.get)
    judge(f"gradients {name}", f"{case}: {worst}", floor, differences[worst], GRADIENT_BOUND, least=5e-5)
    moved = [path for path, (a, b) in gradients.items() if np.linalg.norm(a) and np.linalg.norm(b)]
    if name == "26B":
        assert sum(path.endswith("router.proj") for path in moved) == 12
    if "picture" in case:
        assert any("embed_vision" in path for path in moved)


def test_routing(pairs):
    """The same experts for every token of every layer, and the same weights."""
    pair, batch = pairs["26B"], batch_of("26B", "several pictures, padded rows")
    theirs, ours = [], []
    hooks = [
        layer.router.register_forward_hook(lambda module, args, out: theirs.append([t.numpy() for t in out[1:]]))
        for layer in pair.theirs.model.model.language_model.layers
    ]
    pair.theirs.logits(batch)
    for hook in hooks:
        hook.remove()
    layers = pair.ours.model.language_model.layers
    routers = [layer.router for layer in layers]
    try:
        for layer, router in zip(layers, routers, strict=True):
            layer.router = lambda x, router=router: ours.append(router(x)) or ours[-1]
        mx.eval(pair.ours(**batch.inputs()))
    finally:
        for layer, router in zip(layers, routers, strict=True):
            layer.router = router
    valid = batch.attention_mask.astype(bool).reshape(-1)
    assert len(ours) == len(theirs) == 12
    for (chosen, weights), (their_weights, their_chosen) in zip(ours, theirs, strict=True):
        chosen, weights = np.array(chosen).reshape(-1, 3), np.array(weights).reshape(-1, 3)
        order, their_order = np.argsort(chosen, axis=1), np.argsort(their_chosen, axis=1)
        picked = np.take_along_axis(their_chosen, their_order, 1)
        assert np.array_equal(np.take_along_axis(chosen, order, 1)[valid], picked[valid])
        difference = np.take_along_axis(weights, order, 1) - np.take_along_axis(their_weights, their_order, 1)
        assert np.abs(difference)[valid].max() <= 1e-5
        assert np.unique(picked[valid]).size == 8  # every expert at work
    spread = np.abs(np.array(ours[0][1]).sum(-1) - 1).max()
    assert spread > 0.05  # per_expert_scale comes after the division


@pytest.mark.parametrize("name", MAKERS)
def test_only_slots_of_one_picture_see_ahead(pairs, name):
    """A change of a picture's last patch reaches its earlier slots, and nothing else before it; types are needed."""
    pair = pairs[name]
    rows = [[5, image(6, 6), 3, image(9, 6), 2, video(2, 6, 6), 4]]
    batch = make_batch(rows, unified=name == "12B")
    inputs, changed = batch.inputs(), batch.inputs()
    pixels = inputs["pixel_values"].copy()
    last = (inputs["image_position_ids"][1, :, 0] >= 0).sum() - 1
    pixels[1, last] = 1 - pixels[1, last]
    changed["pixel_values"] = pixels
    slots = np.flatnonzero(batch.input_ids[0] == 500)[4:]  # of the second picture

    def reach(without=()):
        kept = [{k: v for k, v in d.items() if k not in without} for d in (inputs, changed)]
        a, b = (np.array(pair.ours(**d))[0] for d in kept)
        return np.flatnonzero(np.abs(a - b).max(-1) > 1e-6)

    seen = reach()
    assert seen[0] == slots[0] and set(slots) <= set(seen)
    assert reach(without=("mm_token_type_ids",))[0] >= slots[0] + (name == "12B") * 5


@pytest.mark.parametrize("name", MAKERS)
def test_cached_equals_uncached(pairs, name):
    """Prompts of pictures and videos, left-padded in a batch, then tokens one by one past the window."""
    pair, unified = pairs[name], name == "12B"
    rows = [[3, image(6, 6), 2, image(12, 9), 4], [2, video(2, 9, 6), 3]]
    after = np.random.default_rng(5).integers(3, 490, (2, 12))
    from gemma_mlx.generation import left_padded

    batch = make_batch(rows, unified=unified)
    cache = pair.ours.make_cache()
    inputs = left_padded(batch).inputs()
    found = [np.array(pair.ours(**inputs, cache=cache))[:, -1]]
    mask = inputs["attention_mask"]
    for t in range(12):
        mask = np.concatenate([mask, np.ones((2, 1), mask.dtype)], axis=1)
        step = dict(input_ids=after[:, t : t + 1], attention_mask=mask)
        found.append(np.array(pair.ours(**step, cache=cache))[:, 0])
    for row, items in enumerate(rows):
        alone = make_batch([items], unified=unified)  # the media of one row, with this batch's pixels and ids
        n = int(batch.attention_mask[row].sum())
        ids = np.concatenate([batch.input_ids[row, :n], after[row]])[None]
        types = np.concatenate([batch.mm_token_type_ids[row, :n], np.zeros(12, np.int32)])[None]
        names = ("pixel_values", "image_position_ids", "pixel_values_videos", "video_position_ids")
        media = {k: getattr(batch, k) for k in names if getattr(alone, k) is not None}
        whole = np.array(pair.ours(input_ids=ids, mm_token_type_ids=types, **media))[0, n - 1 :]
        assert np.abs(np.stack(found)[:, row] - whole).max() <= BOUND


def test_video_frames_are_pictures(pairs):
    """Frames in place of pictures, slot for slot, give the same; only the slots' ids tell them apart."""
    pair = pairs["31B"]
    batch = make_batch([[4, image(6, 6), 2, image(9, 6), 6]])
    ids = np.where(batch.input_ids == 500, 502, batch.input_ids)
    as_video = dataclasses.replace(
        batch,
        input_ids=ids,
        mm_token_type_ids=np.where(ids == 502, 2, 0),
        pixel_values=None,
        image_position_ids=None,
        pixel_values_videos=batch.pixel_values,
        video_position_ids=batch.image_position_ids,
        num_frames_per_video=np.array([2], np.int32),
    )
    assert np.array_equal(np.array(pair.ours(**batch.inputs())), np.array(pair.ours(**as_video.inputs())))


@pytest.mark.parametrize("name", MAKERS)
def test_prefill_in_parts(pairs, name):
    """Text first, then a picture longer than the window in a second call, then text: as in one call."""
    pair = pairs[name]
    batch = make_batch([[14, image(12, 9), 5]], unified=name == "12B")
    whole = np.array(pair.ours(**batch.inputs()))
    cache, parts = pair.ours.make_cache(), []
    for start, end in ((0, 11), (11, 30), (30, batch.input_ids.shape[1])):
        inputs = {k: getattr(batch, k)[:, start:end] for k in ("input_ids", "mm_token_type_ids")}
        if (inputs["mm_token_type_ids"] == 1).any():
            inputs |= {k: getattr(batch, k) for k in ("pixel_values", "image_position_ids")}
        parts.append(np.array(pair.ours(**inputs, cache=cache)))
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= BOUND


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16(larger_folders, pairs, name):
    """A bfloat16 load computes in bfloat16 with every medium and stays near float32."""
    rough = load_model(larger_folders[name], dtype="bfloat16")
    batch = batch_of(name, "everything" if name == "12B" else "videos of other lengths, and a picture")
    hidden = rough.hidden(**batch.inputs())
    soft = rough.encode(**{k: v for k, v in batch.inputs().items() if k in media_names()})
    assert hidden.dtype == mx.bfloat16 and {s.dtype for s in soft.values()} == {mx.bfloat16}
    valid = batch.attention_mask.astype(bool)
    exact, found = np.array(pairs[name].ours(**batch.inputs()))[valid], np.array(rough.logits(hidden))[valid]
    assert np.abs(found - exact).mean() < 0.15 * exact.std()


def media_names():
    return {name for names in MEDIA.values() for name in names}
