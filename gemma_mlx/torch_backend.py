"""The thin torch path: the same checkpoint folder and batch through transformers, for parity tests and benchmarks.

Runs on MPS where there is one, else on the CPU. Adapters are PEFT's, on the same linears as ours (in a tower the inner
``.linear``, inside the clips). Arrays go in and come out as numpy in our orientation: A [in, rank], B [rank, out].
Needs the extra ``torch``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_mlx.batch import Batch
from gemma_mlx.errors import InputError

LoRAWeights = dict[str, tuple[np.ndarray, np.ndarray]]
"""Path of the wrapped linear -> (A [in, rank], B [rank, out])."""


def default_device() -> torch.device:
    """MPS where there is one, else the CPU."""
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name: str | None) -> torch.device:
    """The device of this name, `default_device()` for None, after a first sum on it; its float32 is not shortened.

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = default_device() if name is None else torch.device(name)
        (torch.zeros(2, device=device) + 1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name}: torch has no such device here; cpu always works") from None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


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
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        self.device = torch.device(device) if device is not None else default_device()
        media = hasattr(AutoConfig.from_pretrained(folder, local_files_only=True), "text_config")
        family = AutoModelForImageTextToText if media else AutoModelForCausalLM
        self.model = family.from_pretrained(
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

    def use_attention(self, name: str) -> None:
        """Attention of the decoder and of a vision tower that has both: "eager" or "sdpa". Audio towers have eager."""
        body = self.model.model
        for part in (_decoder(body), getattr(body, "vision_tower", None)):
            if getattr(part, "_supports_sdpa", False):
                part.set_attn_implementation(name)

    def trace(self, batch: Batch, positions: np.ndarray, noise: float = 0.0) -> dict[str, np.ndarray]:
        """What each part gives for a batch of one row with at most one medium, float32, in the order of computation.

        Args:
            positions: int [n], where logits are wanted.
            noise: share by which media and token embeddings are moved, at random but always alike.

        Returns:
            ``vision_tower`` or ``audio_tower`` [soft tokens, D] and ``embed_vision`` or ``embed_audio``
            [soft tokens, H] where there are such, ``embeddings`` (what the first layer is given), ``layers.0`` …,
            ``norm`` [1, T, H], ``logits`` [1, n, V].
        """
        found: dict[str, np.ndarray] = {}
        handles = self._listen(found, batch.input_ids)
        head, at = self.model.get_output_embeddings(), torch.tensor(positions, device=self.device)
        handles.append(head.register_forward_pre_hook(lambda module, args: (args[0][:, at],)))
        if noise:
            handles.append(self.model.get_input_embeddings().register_forward_hook(_moved(noise)))
        known = inspect.signature(self.model.forward).parameters
        inputs = {name: self._tensor(_shaken(a, noise)) for name, a in batch.inputs().items() if name in known}
        try:
            with torch.no_grad():
                found["logits"] = self._array(self.model(**inputs, use_cache=False).logits)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _listen(self, found: dict[str, np.ndarray], input_ids: np.ndarray) -> list[Any]:
        """Hooks that write what parts give into `found`."""
        body, config = self.model.model, self.model.config
        decoder = _decoder(body)

        def keep(name: str, tensor: torch.Tensor | None, flat: bool = False) -> None:
            if tensor is not None:
                array = self._array(tensor).copy()  # the tensor may be changed in place later
                found[name] = array.reshape(-1, array.shape[-1]) if flat else array

        def before_decoder(module: Any, args: Any, kwargs: Any) -> None:
            for name, slot in (("embed_vision", "image_token_id"), ("embed_audio", "audio_token_id")):
                slots = input_ids == getattr(config, slot, None)
                if slots.any():
                    keep(name, kwargs["inputs_embeds"][self._tensor(slots)])

        def on_audio(module: Any, args: Any, out: Any) -> None:
            padding = getattr(out, "audio_mel_mask", None)  # Gemma 3n's, true on padding
            keep("audio_tower", out.last_hidden_state[out.attention_mask if padding is None else ~padding])

        def before_embedder(module: Any, args: Any, kwargs: Any) -> None:
            keep("vision_tower", kwargs.get("inputs_embeds"), flat=True)

        def before_layers(module: Any, args: Any, kwargs: Any) -> None:
            keep("embeddings", args[0] if args else kwargs["hidden_states"])

        def after_layer(name: str) -> Callable[..., None]:
            return lambda module, args, out: keep(name, out[0] if isinstance(out, tuple) else out)

        handles = [decoder.layers[0].register_forward_pre_hook(before_layers, with_kwargs=True)]
        handles += [layer.register_forward_hook(after_layer(f"layers.{i}")) for i, layer in enumerate(decoder.layers)]
        handles.append(decoder.register_forward_hook(lambda module, args, out: keep("norm", out.last_hidden_state)))
        handles.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
        if getattr(body, "vision_tower", None) is not None:
            handles.append(body.embed_vision.register_forward_pre_hook(before_embedder, with_kwargs=True))
        if getattr(body, "audio_tower", None) is not None:
            handles.append(body.audio_tower.register_forward_hook(on_audio))
        return handles

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


def _decoder(body: torch.nn.Module) -> torch.nn.Module:
    """The text decoder in a model without its head."""
    return getattr(body, "language_model", body)


def _moved(noise: float) -> Callable[..., torch.Tensor]:
    """A forward hook that multiplies what a module gives by 1 + noise · N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return lambda module, args, out: out * (1 + noise * torch.randn(out.shape, generator=generator).to(out))


def _shaken(array: np.ndarray, noise: float) -> np.ndarray:
    """A float array times 1 + noise · N(0, 1); others as they are."""
    if not noise or array.dtype != np.float32:
        return array
    return (array * (1 + noise * np.random.default_rng(0).standard_normal(array.shape))).astype(np.float32)


def processor_inputs(folder: str | Path, messages: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What transformers' processor of a checkpoint makes of a conversation and the opening of the answer to it.

    Text alone goes to its tokenizer: text-only checkpoints name a processor that they do not have. Pictures are resized
    by Pillow, as ours are, where the processor can (Gemma 4 12B's has torchvision only, whose filter rounds otherwise).

    Args:
        messages: media parts hold what they show: ``image`` a PIL picture, ``audio`` float32 samples at 16 kHz.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    media = any(not isinstance(message["content"], str) for message in messages)
    processor = (AutoProcessor if media else AutoTokenizer).from_pretrained(folder, local_files_only=True)
    if hasattr(processor, "image_processor"):
        pictures = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        processor.image_processor = pictures
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    return {name: np.asarray(value) for name, value in inputs.items()}
