"""Cached generation against transformers' greedy search and against ourselves without a cache."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.errors import InputError
from gemma_mlx.generation import answer_ids, as_example, left_padded
from gemma_mlx.models.load import load_model

NEW = 100  # tokens; the tiny checkpoint's sliding window is 8
VOCAB = tiny.VOCAB  # an id that no token has
CASES = {
    "text": dict(kind="text", n_text=11),
    "image": dict(kind="image", grids=((6, 6), (9, 3)), n_text=8),
    "audio": dict(kind="audio", lens=(61, 101), n_text=5),
    "image+audio": dict(kind="image+audio", lens=(61,), n_text=3),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    reference = tiny.make(folder, seed=10)
    # A random model repeats itself; ten times larger logits before the cap give each step another likeliest token.
    with torch.no_grad():
        reference.model.language_model.norm.weight.mul_(4)
    reference.save_pretrained(folder)
    return reference, load_model(folder, dtype="float32")


def as_batch(inputs):
    labels = np.full_like(inputs["input_ids"], IGNORE_INDEX)
    return Batch(labels=labels, **inputs)


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_equal_transformers(pair, case):
    reference, ours = pair
    inputs = tiny.inputs(**CASES[case])
    tensors = {k: torch.tensor(v) for k, v in inputs.items()}
    with torch.no_grad():
        theirs = reference.generate(**tensors, max_new_tokens=NEW, do_sample=False, eos_token_id=VOCAB, pad_token_id=0)
    expected = theirs[0, inputs["input_ids"].shape[1] :].tolist()
    found = answer_ids(ours, as_batch(inputs), [VOCAB], NEW)[0]
    assert len(found) == NEW
    assert len(set(expected)) > 3, "the answer should not be one token repeated"
    assert found == expected


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(pair, case):
    _, ours = pair
    inputs = tiny.inputs(**CASES[case], seed=5)
    found = answer_ids(ours, as_batch(inputs), [VOCAB], NEW)[0]
    soft = ours.encode(**{k: v for k, v in inputs.items() if k.startswith(("pixel", "image", "input_features"))})
    ids = inputs["input_ids"]
    # One pass over prompt and answer: position i predicts token i + 1, whatever a cache would have held.
    whole = np.concatenate([ids, np.array([found])], axis=1)
    logits = ours.logits(ours.hidden(whole, **soft))
    assert mx.argmax(logits[0, ids.shape[1] - 1 : -1], axis=-1).tolist() == found


def test_batch_of_different_lengths_equals_one_by_one(pair):
    _, ours = pair
    batch = tiny.inputs("audio", lens=(41, 101, 61), batch=3, n_text=17)
    together = answer_ids(ours, as_batch(batch), [VOCAB], 40)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        single = {k: batch[k][row : row + 1, :length] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        single |= {k: batch[k][row : row + 1] for k in ("input_features", "input_features_mask")}
        assert answer_ids(ours, as_batch(single), [VOCAB], 40)[0] == together[row]


def test_ends_at_an_end_token_and_keeps_others_running(pair):
    _, ours = pair
    batch = as_batch(tiny.inputs("text", batch=3, n_text=17))
    free = answer_ids(ours, batch, [VOCAB], 30)
    end = free[0][7]
    stopped = answer_ids(ours, batch, [end], 30)
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(end)] if end in before else before)


def test_left_padding_moves_rows_and_nothing_else():
    batch = as_batch(tiny.inputs("text", batch=3, n_text=17))
    moved = left_padded(batch)
    for row, length in enumerate(batch.attention_mask.sum(1)):
        assert moved.input_ids[row, -length:].tolist() == batch.input_ids[row, :length].tolist()
        assert moved.attention_mask[row].tolist() == [0] * (len(moved.input_ids[row]) - length) + [1] * length


def test_conversations():
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
    example = as_example([{"role": "user", "content": content}])
    assert [type(p).__name__ for p in example.turns[0].parts] == ["Image", "Text"]
    assert as_example("hi").turns[0].role == "user"


@pytest.mark.parametrize(
    "bad",
    [7, [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "user", "content": [{"type": "smell"}]}]],
)
def test_bad_conversations_get_one_line(bad):
    with pytest.raises(InputError, match="conversation: expected"):
        as_example(bad)


def test_slots_of_media_are_never_an_answer(checkpoint_folder):
    """Where the model likes a slot best, the next best token is taken; the checkpoint can name further tokens."""
    import json

    from gemma_mlx.data.processor import Processor
    from gemma_mlx.generation import greedy, suppressing

    processor = Processor(checkpoint_folder)
    spec = processor.spec
    slots = {spec.image_token_id, spec.video_token_id, spec.audio_token_id}
    assert set(processor.suppressed_ids) == slots
    logits = np.zeros((2, spec.text.vocab_size), np.float32)
    logits[:, sorted(slots)] = 5
    logits[[0, 1], [100, 200]] = 1
    assert suppressing(greedy, processor.suppressed_ids)(mx.array(logits)).tolist() == [100, 200]
    path = checkpoint_folder / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "suppress_tokens": [7]}))
        assert set(Processor(checkpoint_folder).suppressed_ids) == {7, *slots}
    finally:
        path.write_text(before)
