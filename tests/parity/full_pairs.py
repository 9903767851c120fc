"""Weights that train in full, in both implementations: names, layouts, gradients, steps."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
import torch

from gemma_mlx.full import trained_parameters
from gemma_mlx.models.names import to_torch_axes
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.step import Step


def in_torch_layout(name: str, array: mx.array) -> np.ndarray:
    axes = to_torch_axes(name, array.ndim)
    return np.array(array if axes is None else array.transpose(axes))


def release(reference: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """Let these of transformers' parameters train and no others; by name."""
    found = dict(reference.named_parameters())
    reference.requires_grad_(False)
    return {name: found[name].requires_grad_() for name in names}


def gradient(parameter: torch.nn.Parameter) -> np.ndarray:
    """A copy; zero where the loss does not reach it."""
    return np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy().copy()


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ of each tensor; 0 where both are zero, infinite where only theirs is."""
    assert ours.keys() == theirs.keys()
    out = {}
    for name, b in theirs.items():
        assert ours[name].shape == b.shape, name
        difference, size = np.linalg.norm(ours[name] - b), np.linalg.norm(b)
        out[name] = 0.0 if difference == 0 else float(difference / size) if size else float("inf")
    return out


def step_gradients(model, batch, **options) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss, gradients in torch's layout) of one training step's own function."""
    grads, sums = Step(model, compiled=False, **options).gradients(trained_parameters(model), batch, mx.random.key(0))
    found = {name: in_torch_layout(name, g) / sums.labels for name, g in grads.items()}
    return float(sums.loss) / sums.labels, found


def our_steps(model, batches, count: int, rate: float, decay: float, norm: float) -> tuple[list[float], dict]:
    """(loss before each of `count` steps, trained weights after them)."""
    step, weights = Step(model, clip=norm, compiled=False), trained_parameters(model)
    moments, losses = adamw_init(weights), []
    for i in range(count):
        grads, sums = step.gradients(weights, batches[i % len(batches)], mx.random.key(0))
        weights, moments, _ = step.apply(weights, moments, grads, sums.labels, adamw_scalars(i + 1, rate, decay))
        mx.eval(weights, moments, sums.loss)
        losses.append(float(sums.loss) / sums.labels)
    return losses, weights


def their_steps(backend, parameters, batches, count: int, rate: float, decay: float, norm: float) -> list[float]:
    """Loss before each step of torch's AdamW on `parameters`.

    Where the loss does not reach a weight (a tower without media in the batch) its gradient is zero, as ours, and not
    absent, which would leave it out of the step.
    """
    parameters = list(parameters)
    optimizer, losses = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay), []
    for i in range(count):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        loss = backend.model(**backend.tensors(batches[i % len(batches)]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
