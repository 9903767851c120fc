"""The thin torch path: the same checkpoint folder and batch through transformers, for parity tests and benchmarks.

Runs on MPS where there is one, else on the CPU. Adapters are PEFT's, on the same linears as ours (in a tower the inner
``.linear``, inside the clips). Arrays go in and come out as numpy in our orientation: A [in, rank], B [rank, out].
Needs the extra ``torch``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemma_mlx.batch import Batch
from gemma_mlx.errors import InputError

LoRAWeights = dict[str, tuple[np.ndarray, np.ndarray]]
"""Path of the wrapped linear -> (A [in, rank], B [rank, out])."""


def default_device() -> torch.device:
    """MPS where there is one, else the CPU."""
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class Result:
    """What one batch gives."""

    loss: float
    """Mean cross entropy over label positions."""
    logits: np.ndarray
    """float32 [B, T, V]."""
    gradients: LoRAWeights
    """d loss / d (A, B) of every adapter; empty without adapters."""


class TorchBackend:
    """transformers' model of a checkpoint folder, frozen, in eager attention.

    Args:
        folder: checkpoint with config.json and safetensors.
        dtype: "float32" or "bfloat16".
        device: None chooses `default_device()`.
    """

    def __init__(self, folder: str | Path, dtype: str = "float32", device: str | torch.device | None = None):
        from transformers import AutoModelForImageTextToText

        self.device = torch.device(device) if device is not None else default_device()
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
        )
        self.model.to(self.device).eval().requires_grad_(False)
        self._adapters: dict[str, torch.nn.Module] = {}

    def add_lora(self, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0) -> list[str]:
        """Put PEFT's LoRA (B zero) on the linears with these full paths; returns the paths. Once per backend.

        Raises:
            InputError: PEFT did not find exactly these linears.
        """
        from peft import LoraConfig, inject_adapter_in_model

        wanted = sorted(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=wanted)
        inject_adapter_in_model(config, self.model)
        self._adapters = {n: m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}
        if sorted(self._adapters) != wanted:
            odd = sorted(set(wanted) ^ set(self._adapters))
            raise InputError(f"targets: PEFT's adapters differ from the request at {odd[0]} ({len(odd)} in all)")
        return wanted

    def set_lora(self, weights: LoRAWeights) -> None:
        """Copy adapter weights in.

        Raises:
            InputError: paths other than those of the adapters.
        """
        if odd := sorted(set(weights) ^ set(self._adapters)):
            raise InputError(f"adapter weights and adapters differ at {odd[0]} ({len(odd)} in all)")
        with torch.no_grad():
            for path, pair in weights.items():
                for parameter, value in zip(self._pair(path), pair, strict=True):
                    parameter.copy_(torch.tensor(np.asarray(value).T, device=self.device))

    def lora(self) -> LoRAWeights:
        """The adapters' weights."""
        return {path: self._arrays(self._pair(path)) for path in self._adapters}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' parameters, for a torch optimizer."""
        return [p for path in self._adapters for p in self._pair(path)]

    def tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch as transformers' forward takes it, on the device."""
        arrays = {**batch.inputs(), "labels": batch.labels}
        return {n: self._tensor(a) for n, a in arrays.items()}

    def logits(self, batch: Batch) -> np.ndarray:
        """float32 [B, T, V], without gradients."""
        with torch.no_grad():
            return self._array(self.model(**self.tensors(batch), use_cache=False).logits)

    def run(self, batch: Batch) -> Result:
        """Loss, logits and the adapters' gradients."""
        self.model.zero_grad(set_to_none=True)
        out = self.model(**self.tensors(batch), use_cache=False)
        if self._adapters:
            out.loss.backward()
        gradients = {path: self._arrays(map(_gradient, self._pair(path))) for path in self._adapters}
        return Result(float(out.loss.detach()), self._array(out.logits), gradients)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> float:
        """One optimizer step on the batch, gradients clipped to the global norm `max_norm`; the loss before it."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.tensors(batch), use_cache=False).loss
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm)
        optimizer.step()
        return float(loss.detach())

    def _pair(self, path: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        module = self._adapters[path]
        return module.lora_A["default"].weight, module.lora_B["default"].weight

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.tensor(array, device=self.device)
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    @staticmethod
    def _array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().float().cpu().numpy()

    def _arrays(self, pair: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """A and B in our orientation."""
        a, b = (self._array(t).T.copy() for t in pair)  # torch's own memory changes with the next step
        return a, b


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Its gradient; zero where the loss does not reach it (a tower without media in the batch)."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
