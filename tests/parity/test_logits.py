"""Logits of whole models against transformers' Gemma4ForConditionalGeneration, everything random, float32."""

import mlx.core as mx
import numpy as np
import pytest
from parity_cases import CASES, audio, image, make_batch
from parity_pairs import noisy

from gemma_mlx.models.load import load_model

BOUND = 2e-4  # absolute, logits of scale 1


def compare(pair, batch):
    """(floor, difference) over all tokens."""
    valid = batch.attention_mask.astype(bool)
    expected = pair.theirs.logits(batch)[valid]
    assert 0.5 < expected.std() < 2
    floor = max(np.abs(pair.theirs.logits(b)[valid] - expected).max() for b in noisy(pair.theirs, batch))
    return floor, np.abs(np.array(pair.ours(**batch.inputs()))[valid] - expected).max()


@pytest.mark.parametrize("case", CASES)
def test_logits(pair, case, judge):
    floor, difference = compare(pair, make_batch(CASES[case]))
    judge(f"logits {pair.name}", case, floor, difference, BOUND, least=1e-5)


@pytest.mark.parametrize("seed", [2, 3, 5])  # floors below 5e-5, see PATTERNS
def test_random_rows(pair, seed, judge):
    """Random numbers of media of random sizes in random rows, pictures padded at random."""
    rng = np.random.default_rng(seed)
    grids = [(3, 3), (6, 3), (3, 9), (6, 9), (12, 3)]

    def row():
        media = [image(*grids[rng.integers(5)]) for _ in range(rng.integers(3))]
        media += [audio(int(rng.integers(1, 120))) for _ in range(rng.integers(3))]
        rng.shuffle(media)
        return [x for m in media for x in (int(rng.integers(1, 5)), m)] + [int(rng.integers(2, 30))]

    batch = make_batch([row() for _ in range(rng.integers(2, 5))], seed, patches=9 * int(rng.integers(6, 12)))
    judge(f"logits {pair.name}", f"random rows {seed}", *compare(pair, batch), BOUND, least=1e-5)


@pytest.mark.parametrize("case", ["text", "image and audio"])
def test_last_token_changes_no_earlier_logit(pair, case):
    batch = make_batch(CASES[case])
    inputs = batch.inputs()
    before = np.array(pair.ours(**inputs))
    inputs["input_ids"] = inputs["input_ids"].copy()
    inputs["input_ids"][:, -1] = 7 if inputs["input_ids"][0, -1] != 7 else 8
    after = np.array(pair.ours(**inputs))
    assert np.array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-2


def test_a_batch_equals_its_rows_alone(pair):
    """Padding, and the company of other rows, change nothing."""
    rows = CASES["everything"]
    batch = make_batch(rows, patches=90)
    together = np.array(pair.ours(**batch.inputs()))
    pictures, clips = 0, 0
    for i, items in enumerate(rows):
        n = int(batch.attention_mask[i].sum())
        n_pictures = sum(not isinstance(x, int) and x[0] == "image" for x in items)
        n_clips = sum(not isinstance(x, int) and x[0] == "audio" for x in items)
        alone = {"input_ids": batch.input_ids[i : i + 1, :n], "attention_mask": batch.attention_mask[i : i + 1, :n]}
        for names, count, first in (
            (("pixel_values", "image_position_ids"), n_pictures, pictures),
            (("input_features", "input_features_mask"), n_clips, clips),
        ):
            alone |= {name: getattr(batch, name)[first : first + count] for name in names if count}
        pictures, clips = pictures + n_pictures, clips + n_clips
        assert np.abs(np.array(pair.ours(**alone))[0] - together[i, :n]).max() <= BOUND


def test_pictures_of_padding_only(pair):
    batch = make_batch(CASES["one image"])
    inputs = batch.inputs()
    expected = np.array(pair.ours(**inputs))
    inputs["pixel_values"] = np.concatenate([inputs["pixel_values"], np.zeros_like(inputs["pixel_values"])])
    empty = np.full_like(inputs["image_position_ids"], -1)
    inputs["image_position_ids"] = np.concatenate([inputs["image_position_ids"], empty])
    got = np.array(pair.ours(**inputs))
    assert np.isfinite(got).all() and np.abs(got - expected).max() <= BOUND


def test_audio_window_switch(pair):
    batch = make_batch(CASES["audio of 61 frames"])
    wide = load_model(pair.folder, audio_window=13)
    difference = mx.abs(wide(**batch.inputs()) - pair.ours(**batch.inputs())).max()
    assert float(difference) > 1e-2
