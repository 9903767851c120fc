"""Tiny random checkpoints in the manner of Gemma 4 31B, 26B-A4B and 12B, in both implementations."""

from __future__ import annotations

from functools import partial

import tiny
import torch
from parity_cases import audio, image, random_lora, video
from parity_pairs import ALPHA, RANK, Pair, copy_lora

from gemma_mlx.batch import Batch
from gemma_mlx.lora import apply_lora, lora_layers
from gemma_mlx.models.load import load_model
from gemma_mlx.torch_backend import TorchBackend

# Seeds with low floors, as in parity_pairs.
MAKERS = {
    "31B": partial(tiny.make, seed=0, **tiny.larger()),
    "26B": partial(tiny.make, seed=0, **tiny.larger(tiny.EXPERTS)),
    "12B": partial(tiny.make_unified, seed=0),
}
TARGETS = {"31B": "all", "26B": "all,router.proj", "12B": "all"}

CASES = {
    "text": [[24]],
    "beyond the window": [[75]],  # nine windows of 8
    "right-padded batch": [[24], [9], [17]],
    "a picture longer than the window": [[4, image(12, 9), 12]],  # 12 slots
    "several pictures, padded rows": [[3, image(6, 6), 2, image(12, 9), 9], [30], [image(9, 6), image(3, 3), 5]],
    "a video": [[4, video(3, 6, 9), 9]],
    "videos of other lengths, and a picture": [[3, video(2, 12, 9), 2, image(6, 6), 8], [video(1, 3, 6), 14]],
}
AUDIO_CASES = {
    "a clip of raw samples": [[4, audio(21), 12]],
    "two clips over a batch, shorter first": [[4, audio(5), 12], [3, audio(14), 7]],
    "everything": [[30], [3, image(12, 9), audio(9), 9], [audio(3), video(2, 6, 6), 2, image(6, 3), 8]],
}


class SlidingRuns(TorchBackend):
    """transformers' unified model with the masks that it makes for a static cache.

    Those let pictures see themselves in sliding layers alone, within the window, as in the other sizes. Its plain
    forward (5.23) does so in all layers and beyond the window.
    """

    def tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        found = super().tensors(batch)
        rows, tokens = found["input_ids"].shape
        found["attention_mask"] = self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((rows, tokens, 0)),
            attention_mask=found["attention_mask"],
            past_key_values=None,
            position_ids=torch.arange(tokens)[None],
            mm_token_type_ids=found["mm_token_type_ids"],
        )
        return found


def make_larger(name: str, folder: str, adapted: bool = False, vision_runs: str = "sliding") -> Pair:
    """The pair of a checkpoint folder, with the same random adapters where asked for."""
    backend = SlidingRuns if name == "12B" and vision_runs == "sliding" else TorchBackend
    pair = Pair(name, folder, backend(folder, device="cpu"), load_model(folder, vision_runs=vision_runs))
    if adapted:
        paths = apply_lora(pair.ours, TARGETS[name], RANK, ALPHA)
        weights = random_lora({p: layer.weight.shape for p, layer in lora_layers(pair.ours).items()}, RANK)
        pair.theirs.add_lora(paths, RANK, ALPHA)
        pair.theirs.set_lora(weights)
        copy_lora(weights, pair.ours)
    return pair
