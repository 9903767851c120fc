"""A batch laid out ahead: the same batches in the same order; nothing of what comes shows before it is asked for."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.estimate import Estimate
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.step import Step


@pytest.fixture(scope="module")
def samples(checkpoint_folder, rows):
    return list(Dataset(rows / "media.csv", Processor(checkpoint_folder, image_tokens=70)))


def batches(samples, **options):
    return Batches(samples, 4, seed=3, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_handed_out_was_finished_in_order(samples, workers):
    plain, finished = batches(samples), batches(samples, workers=workers, finish=lambda batch: (batch.row_ids, "done"))
    for _ in range(7):
        assert finished.state() == plain.state()
        assert next(finished) == (next(plain).row_ids, "done")
    middle = finished.state()
    following = [next(finished) for _ in range(3)]
    finished.seek(middle)
    assert [next(finished) for _ in range(3)] == following
    for b in (plain, finished):
        b.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_error_is_raised_where_its_batch_would_have_come(samples):
    order = [row for _, batch in zip(range(3), batches(samples), strict=False) for row in batch.row_ids]

    def finish(batch):
        if order[-1] in batch.row_ids:  # only in the third batch of the epoch
            raise InputError("broken.wav")
        return batch.row_ids

    ahead = batches(samples, finish=finish)
    assert [next(ahead), next(ahead)] == [tuple(order[:4]), tuple(order[4:8])]
    state = ahead.state()
    for _ in range(2):
        with pytest.raises(InputError, match=r"broken\.wav"):
            next(ahead)
        assert ahead.state() == state
    ahead.close()


@pytest.mark.parametrize("lanes", [1, 2])
def test_laid_out_ahead_or_at_once_gives_equal_gradients(checkpoint_folder, samples, lanes):
    """With the per-layer table on disk, read in the workers' threads."""
    model = load_model(checkpoint_folder, disk_bytes=0)
    apply_lora(model, "decoder", rank=2, seed=1)
    weights, step, found = lora_parameters(model), Step(model, compiled=False, lanes=lanes), []
    for source in (batches(samples), batches(samples, finish=step.lay_out)):
        for _, batch in zip(range(4), source, strict=False):
            grads, sums = step.gradients(weights, batch, mx.random.key(0))
            found.append([np.array(sums.loss), *(np.array(grads[name]) for name in sorted(grads))])
        source.close()
    assert step.table is not None
    for a, b in zip(found[:4], found[4:], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_bad_clip_ends_the_run_at_its_own_batch(checkpoint_folder, rows, samples, tmp_path, monkeypatch):
    """The steps before it are taken and logged."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    options = dict(data=rows / "media.csv", batch_size=2, rank=2, quiet=True, image_tokens=70)
    whole = finetune(str(checkpoint_folder), out=tmp_path / "whole", steps=5, **options)
    fourth = [batch.row_ids for _, batch in zip(range(4), Batches(samples, 2), strict=False)][-1]
    original = Step.lay_out

    def fails(self, batch):
        if fourth[0] in batch.row_ids:
            raise InputError("media.csv:9: unreadable")
        return original(self, batch)

    monkeypatch.setattr(Step, "lay_out", fails)
    monkeypatch.setattr("gemma_mlx.fit.estimate_run", lambda *_: Estimate({}))  # lays out the largest batch before
    with pytest.raises(InputError, match=r"media\.csv:9"):
        finetune(str(checkpoint_folder), out=tmp_path / "broken", steps=5, **options)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    assert len(lines[1]) == 3 and len(whole.history) == 5
