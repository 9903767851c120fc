"""A batch of stated shapes, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.batches import clip_tokens, collate
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import AUDIO, IMAGE, Sample

RATE = 16_000
CLIP_SECONDS, IMAGE_TOKENS, TEXT_TOKENS, LABELS = 30, 280, 128, 64
"""Of a typical row: one clip, one picture, text, and how much of the text is the answer."""


def typical_batch(
    spec: Any, rows: int = 1, *, seconds: float = CLIP_SECONDS, image_tokens: int = IMAGE_TOKENS,
    text: int = TEXT_TOKENS, labels: int = LABELS, seed: int = 0,
) -> Batch:  # fmt: skip
    """Rows of a clip, a picture (each where the checkpoint reads such) and text whose end has labels.

    Args:
        seconds, image_tokens: of the clip and the picture; 0 for none.
        text: tokens beside them.
        labels: of the text.
    """
    r, processor = np.random.default_rng(seed), Processor("", spec, image_tokens=image_tokens or None)
    samples = []
    for _ in range(rows):
        images = (_picture(processor, r, image_tokens),) if spec.vision is not None and image_tokens else ()
        wave = 0.1 * r.standard_normal(int(seconds * RATE)).astype(np.float32)
        clips = (processor.clip_features(wave),) if spec.audio is not None and seconds else ()
        samples.append(_sample(spec, r, images, clips, text, labels))
    return collate(samples, spec.text.pad_token_id)


def _picture(processor: Processor, r: np.random.Generator, most: int) -> Any:
    vision = processor.spec.vision
    side = getattr(vision, "input_patch", 16) * getattr(vision, "input_pooling", 3)
    rows = max(n for n in range(1, int(most**0.5) + 1) if most % n == 0)  # cells that fill the budget
    return processor.picture_patches(r.integers(0, 255, (rows * side, most // rows * side, 3), dtype=np.uint8), most)


def _sample(spec: Any, r: np.random.Generator, images: tuple, clips: tuple, text: int, labels: int) -> Sample:
    per_token = getattr(spec.audio, "frames_per_token", 4)
    slots = [getattr(spec, f"{kind}_token_id", -1) for kind in ("image", "audio", "video")]
    ids, types = r.choice(np.setdiff1d(np.arange(3, 99), slots), text), np.zeros(text, np.int32)
    for kind, name, counts in (
        (IMAGE, "image", [picture.soft_tokens for picture in images]),
        (AUDIO, "audio", [clip_tokens(clip, per_token) for clip in clips]),
    ):
        if counts:
            own = np.full(sum(counts), getattr(spec, f"{name}_token_id"))
            ids, types = np.concatenate([own, ids]), np.concatenate([np.full(len(own), kind), types])
    wanted = np.where(np.arange(len(ids)) < len(ids) - labels, IGNORE_INDEX, ids)
    return Sample(*(a.astype(np.int32) for a in (ids, wanted, types)), images, clips, frames_per_token=per_token)
