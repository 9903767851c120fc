"""A batch laid out ahead: the same batches in the same order; nothing of what comes shows before it is asked for."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.ahead import Ahead
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step


@pytest.fixture(scope="module")
def samples(checkpoint_folder, rows):
    return list(Dataset(rows / "media.csv", Processor(checkpoint_folder, image_tokens=70)))


def batches(samples, **options):
    return Batches(samples, 4, seed=3, **options)


def test_batches_come_in_order_with_their_states(samples):
    plain, ahead = batches(samples), Ahead(batches(samples), lambda batch: batch)
    for _ in range(7):
        assert ahead.state() == plain.state()
        assert next(ahead).row_ids == next(plain).row_ids
    middle = ahead.state()
    following = [next(ahead).row_ids for _ in range(3)]
    ahead.close()
    ahead.seek(middle)
    assert [next(ahead).row_ids for _ in range(3)] == following
    ahead.close()
    assert ahead.state() == ahead.batches.state()
    assert next(ahead).row_ids == [next(plain).row_ids for _ in range(4)][-1]
    for b in (plain, ahead):
        b.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("ahead", "batches"))]


@pytest.mark.parametrize("of", ["reading", "laying out"])
def test_an_error_is_raised_where_its_batch_would_have_come(samples, of):
    class Broken(list):
        def __getitem__(self, i):
            if of == "reading" and i == third:
                raise InputError("broken.wav")
            return super().__getitem__(i)

    def make(batch):
        if of == "laying out" and samples[third].row_id in batch.row_ids:
            raise InputError("broken.wav")
        return batch.row_ids

    order = [row for _, batch in zip(range(3), batches(samples), strict=False) for row in batch.row_ids]
    third = [s.row_id for s in samples].index(order[-1])  # only in the third batch of the epoch
    ahead = Ahead(batches(Broken(samples)), make)
    assert [next(ahead), next(ahead)] == [tuple(order[:4]), tuple(order[4:8])]
    state = ahead.state()
    for _ in range(2):
        with pytest.raises(InputError, match=r"broken\.wav"):
            next(ahead)
        assert ahead.state() == state
    ahead.close()


def test_the_end_of_the_last_epoch(samples):
    ahead = Ahead(batches(samples, epochs=1), lambda batch: batch.row_ids)
    assert len(list(ahead)) == len(ahead) == 3
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("lanes", [1, 2])
def test_laid_out_ahead_or_at_once_gives_equal_gradients(checkpoint_folder, samples, lanes):
    """With the per-layer table on disk, read in the other thread."""
    model = load_model(checkpoint_folder, disk_bytes=0)
    apply_lora(model, "decoder", rank=2, seed=1)
    weights, step, found = lora_parameters(model), Step(model, compiled=False, lanes=lanes), []
    for source in (batches(samples), Ahead(batches(samples), step.lay_out)):
        for _, batch in zip(range(4), source, strict=False):
            grads, sums = step.gradients(weights, batch, mx.random.key(0))
            found.append([np.array(sums.loss), *(np.array(grads[name]) for name in sorted(grads))])
        source.close()
    assert step.table is not None
    for a, b in zip(found[:4], found[4:], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_bad_clip_ends_the_run_at_its_own_batch(checkpoint_folder, rows, tmp_path, monkeypatch):
    """The steps before it are taken and logged."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    options = dict(data=rows / "media.csv", batch_size=2, rank=2, quiet=True, image_tokens=70)
    whole = finetune(str(checkpoint_folder), out=tmp_path / "whole", steps=5, **options)
    original, made = Step.lay_out, []

    def fails(self, batch):
        made.append(1)
        if len(made) == 4:
            raise InputError("media.csv:9: unreadable")
        return original(self, batch)

    monkeypatch.setattr(Step, "lay_out", fails)
    with pytest.raises(InputError, match=r"media\.csv:9"):
        finetune(str(checkpoint_folder), out=tmp_path / "broken", steps=5, **options)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    assert len(lines[1]) == 3 and len(whole.history) == 5
