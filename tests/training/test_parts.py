"""How a batch is cut: by rows where they are short, row by row where they are long, each part with its own padding."""

from dataclasses import replace

import numpy as np
import pytest

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.lanes import PART_TOKENS
from gemma_mlx.parts import longest, part_count, present, split
from gemma_mlx.spec import read_spec

SLOT, CONFIG = 9, {"model_type": "gemma4", "audio_token_id": 9, "image_token_id": 8, "audio_config": {}}


def batch_of(lengths, clips):
    """Rows of so many tokens, each with a clip of so many frames (0: none) at its start."""
    rows, widest = len(lengths), max(lengths)
    ids, mask = np.zeros((rows, widest), np.int32), np.zeros((rows, widest), np.int32)
    frames = [n for n in clips if n]
    features = np.zeros((len(frames), max(frames), 128), np.float32)
    heard = np.arange(max(frames))[None] < np.array(frames)[:, None]
    for i, (n, clip) in enumerate(zip(lengths, clips, strict=True)):
        ids[i, :n], mask[i, :n] = 20 + i, 1
        ids[i, : -(-clip // 4)] = SLOT
    for i, n in enumerate(frames):
        features[i, :n] = i + 1
    labels = np.where(mask, ids, IGNORE_INDEX)
    names = tuple(f"row {i}" for i in range(rows))
    media = {"input_features": features, "input_features_mask": heard}
    return Batch(ids, mask, 3 * (ids == SLOT), labels, row_ids=names, **media)


def test_long_rows_are_alone_without_their_neighbours_padding():
    lengths, clips = (900, 300, 700), (40, 0, 93)
    batch = batch_of(lengths, clips)
    parts = split(batch, 2, read_spec(CONFIG))
    assert [part.row_ids for part in parts] == [("row 0",), ("row 1",), ("row 2",)]
    assert [part.input_ids.shape for part in parts] == [(1, n) for n in lengths]
    for i, part in enumerate(parts):
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
            assert np.array_equal(getattr(part, name), getattr(batch, name)[i : i + 1, : lengths[i]])
    assert [None if p.input_features is None else p.input_features.shape for p in parts] == [
        (1, 40, 128), None, (1, 93, 128),
    ]  # fmt: skip
    assert parts[2].input_features_mask.all() and (parts[2].input_features == 2).all()


def test_digests_go_with_their_media():
    batch = replace(batch_of((900, 300, 700), (40, 0, 93)), digests={"audio": (b"a", b"b"), "image": ()})
    parts = split(batch, 2, read_spec(CONFIG))
    assert [part.digests["audio"] for part in parts] == [(b"a",), (), (b"b",)]


@pytest.mark.parametrize(
    ("rows", "length", "lanes", "parts"),
    [(4, 40, 1, 1), (4, 825, 1, 1), (4, 40, 2, 2), (4, 825, 2, 4), (16, 48, 2, 2), (1, 5000, 2, 1), (2, 10, 4, 2)],
)
def test_parts_of_a_batch(rows, length, lanes, parts):
    assert part_count(rows, length, lanes) == parts
    if parts > lanes:
        assert rows * length // parts >= PART_TOKENS // 2


def test_padding_by_mask_and_by_place():
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
    places = np.where(mask[..., None], 0, -1) * np.ones(2, int)
    assert np.array_equal(present(mask), mask) and np.array_equal(present(places), mask)
    assert longest(mask) == 2 and longest(np.zeros((2, 3), bool)) == 1
