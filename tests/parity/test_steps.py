"""Training, step by step: our training step against torch's AdamW on PEFT's LoRA."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity_cases import make_batch
from parity_pairs import PATTERNS, copy_lora, make_pair

from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.optim import adamw_init, adamw_scalars, learning_rate
from gemma_mlx.step import Step

STEPS, RATE, DECAY, NORM, WARMUP = 20, 5e-3, 0.05, 1.0, 5
ROWS = [
    [[24], [9], [17]],
    [[4, ("image", 6, 6), 12], [3, ("audio", 61), 7]],
    [[40]],
    [[3, ("audio", 30), 2, ("image", 9, 3), 20], [11]],
]


def our_steps(model, batches) -> list[float]:
    step = Step(model, clip=NORM, compiled=False)
    weights = lora_parameters(model)
    moments, losses = adamw_init(weights), []
    for i in range(STEPS):
        batch = batches[i % len(batches)]
        grads, sums = step.gradients(weights, batch, mx.random.key(0))
        scalars = adamw_scalars(i + 1, learning_rate(i, STEPS, RATE, "cosine", WARMUP), DECAY)
        weights, moments, _ = step.apply(weights, moments, grads, sums.labels, scalars)
        losses.append(float(sums.loss) / sums.labels)
    return losses


def their_steps(backend, batches) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(backend.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for step in range(STEPS):
        losses.append(backend.step(batches[step % len(batches)], optimizer, NORM))
        schedule.step()
    return losses


@pytest.mark.parametrize("name", PATTERNS)
def test_twenty_steps(name, folders, record):
    """Adapters on the decoder from PEFT's start; text, pictures, clips; warm-up, cosine, clipping, decay."""
    pair = make_pair(name, folders[name])
    paths = apply_lora(pair.ours, "decoder", rank=4, alpha=8)
    torch.manual_seed(0)
    pair.theirs.add_lora(paths, rank=4, alpha=8)
    copy_lora(pair.theirs.lora(), pair.ours)
    batches = [make_batch(rows, seed) for seed, rows in enumerate(ROWS)]
    expected, got = their_steps(pair.theirs, batches), our_steps(pair.ours, batches)
    assert np.mean(expected[-4:]) < np.mean(expected[:4]) - 0.3  # it learns
    record("loss over 20 steps", name, difference := np.abs(np.array(got) - expected).max())
    assert difference <= 1e-3
