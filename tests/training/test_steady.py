"""Memory over a long run."""

import mlx.core as mx
import pytest

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.processor import Processor
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.step import Step


@pytest.mark.slow
def test_memory_stays_flat(checkpoint_folder, rows):
    """Active memory from step 50 to step 1,000 within 1 %, ragged batches of text, clips and pictures; the
    peaks of its quarters are equal."""
    model = load_model(checkpoint_folder, disk_bytes=0)
    apply_lora(model, "decoder", 4)
    weights, step = lora_parameters(model), Step(model, clip=1.0, compiled=False)
    moments, samples = adamw_init(weights), list(Dataset(rows / "media.csv", Processor(checkpoint_folder)))
    batches, active, peaks = Batches(samples, 3, finish=step.lay_out), [], []
    shapes = set()
    for i in range(1000):
        batch = next(batches)
        shapes.add(batch[0].arrays["input_ids"].shape)
        grads, sums = step.gradients(weights, batch, mx.random.key(i))
        weights, moments, norm = step.apply(weights, moments, grads, sums.labels, adamw_scalars(i + 1, 1e-4, 0.0))
        mx.eval(weights, moments, norm, sums.loss)
        step.install(weights)
        del grads, sums, norm, batch
        active.append(mx.get_active_memory())
        if (i + 1) % 250 == 0:
            peaks.append(mx.get_peak_memory())
            mx.reset_peak_memory()
    batches.close()
    later = active[49:]
    print(f"active {min(later):,} to {max(later):,} bytes, peaks {peaks}")
    assert len(shapes) > 4
    assert max(later) <= 1.01 * later[0] and min(later) >= 0.99 * later[0]
    assert max(peaks[1:]) <= 1.01 * min(peaks[1:])  # the towers run in the first
