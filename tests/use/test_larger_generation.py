"""Cached greedy answers of Gemma 4 31B and 26B-A4B about pictures and videos, against transformers' own search."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.generation import answer_ids
from gemma_mlx.models.load import load_model

NEW = 40
NO_TOKEN = tiny.VOCAB  # an id that no token has


@pytest.fixture(scope="module", params=["31B", "26B"])
def pair(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    reference = tiny.make(folder, seed=4, **tiny.larger(tiny.EXPERTS if request.param == "26B" else None))
    with torch.no_grad():  # likelier tokens stand out more, so that answers vary; slots and markers never win
        reference.model.language_model.norm.weight.mul_(4)
        reference.model.language_model.embed_tokens.weight[490:] = 0
    reference.save_pretrained(folder)
    return reference, load_model(folder, dtype="float32")


@pytest.mark.parametrize("medium", ["image", "video"])
def test_greedy_answers_equal_transformers(pair, medium):
    """Two pictures (frames), one of 12 slots with a window of 8; then forty tokens."""
    reference, ours = pair
    inputs = tiny.inputs("image", grids=((12, 9), (6, 6)), n_text=5)
    if medium == "video":
        names = {"pixel_values": "pixel_values_videos", "image_position_ids": "video_position_ids"}
        inputs = {names.get(k, k): v for k, v in inputs.items()}
        inputs["input_ids"] = np.where(inputs["input_ids"] == tiny.IMG, tiny.VID, inputs["input_ids"])
        inputs["mm_token_type_ids"] = 2 * inputs["mm_token_type_ids"]
        inputs["num_frames_per_video"] = np.array([2])
    with torch.no_grad():
        theirs = reference.generate(
            **{k: torch.tensor(v) for k, v in inputs.items()}, max_new_tokens=NEW, do_sample=False,
            eos_token_id=NO_TOKEN, pad_token_id=0,
        )  # fmt: skip
    expected = theirs[0, inputs["input_ids"].shape[1] :].tolist()
    batch = Batch(labels=np.full_like(inputs["input_ids"], IGNORE_INDEX), **inputs)
    assert len(set(expected)) > 3
    assert answer_ids(ours, batch, [NO_TOKEN], NEW)[0] == expected
    causal = dataclasses.replace(batch, mm_token_type_ids=np.zeros_like(batch.mm_token_type_ids))
    assert answer_ids(ours, causal, [NO_TOKEN], NEW)[0] != expected
