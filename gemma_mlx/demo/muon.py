"""Muon for matrices, AdamW for everything else (torch), used to train the demo's base.

Muon: momentum, then the nearest semi-orthogonal matrix by a Newton-Schulz iteration
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(batch: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, cols] -> the same shape, every singular value close to 1."""
    a, b, c = NEWTON_SCHULZ
    wide = batch.shape[-2] <= batch.shape[-1]
    x = batch if wide else batch.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / cols)); decoupled weight decay."""

    def __init__(self, parameters, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(list(parameters), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                self._step_shape(group, shape, params)

    def _step_shape(self, group, shape, params) -> None:
        momentum, updates = group["momentum"], []
        for p in params:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(buffer, momentum))
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Muon's share: plain weight matrices; not embeddings, position tables, convolutions, norms or biases."""
    return parameter.ndim == 2 and "embed_tokens" not in name


def build_optimizers(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    others = [p for n, p in named if not is_matrix(n, p)]
    return [Muon(matrices, lr=muon_lr, weight_decay=0.02),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
