"""Ragged random rows for the demo's model: text of 20 to 2,000 tokens, every third with clips, every third with
pictures."""

import numpy as np

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.buckets import of_sample
from gemma_mlx.data.features import Patches
from gemma_mlx.data.template import AUDIO, IMAGE, Sample
from gemma_mlx.demo.run import CHECKPOINT
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model

LONGEST, SHORTEST = 2_000, 20


def model(rank: int = 8):
    """The demo's model, float32, with adapters on the decoder."""
    made = load_model(CHECKPOINT, "float32")
    apply_lora(made, "decoder", rank)
    mx.eval(made.parameters())
    return made, lora_parameters(made)


def rows(spec, count: int = 400, longest: int = LONGEST, seed: int = 0) -> list[Sample]:
    """Samples with their features, of `SHORTEST` to `longest` tokens."""
    r = np.random.default_rng(seed)
    return [_row(spec, r, i, longest) for i in range(count)]


def sizes(samples: list[Sample]) -> np.ndarray:
    """Their lines of sizes."""
    return np.stack([of_sample(sample) for sample in samples])


def _row(spec, r: np.random.Generator, i: int, longest: int) -> Sample:
    length = int(np.exp(r.uniform(np.log(SHORTEST), np.log(longest))))
    ids, types, images, clips = [], [], [], []
    for _ in range(int(r.integers(1, 3)) if i % 3 else 0):
        soft = int(r.integers(1, 8)) * int(r.integers(1, 8)) if i % 3 == 1 else int(r.integers(5, 150))
        if len(ids) + soft + 10 > length:
            break
        kind, token = (IMAGE, spec.image_token_id) if i % 3 == 1 else (AUDIO, spec.audio_token_id)
        ids += [3, *[token] * soft, 4]
        types += [0, *[kind] * soft, 0]
        if kind == IMAGE:
            images.append(_picture(spec, r, soft))
        else:
            clips.append(r.standard_normal((4 * soft - int(r.integers(0, 4)), 128)).astype(np.float32))
    text = r.integers(20, spec.text.vocab_size, length - len(ids))
    answer = int(min(r.integers(2, 120), len(text) - 1))
    input_ids = np.array([*ids, *text], np.int32)
    input_ids[len(ids) :][np.isin(text, _special(spec))] = 20
    labels = np.full(length, IGNORE_INDEX, np.int32)
    labels[length - answer :] = input_ids[length - answer :]
    token_types = np.array([*types, *[0] * len(text)], np.int32)
    return Sample(input_ids, labels, token_types, tuple(images), tuple(clips), row_id=str(i))


def _special(spec) -> list[int]:
    return [spec.image_token_id, spec.audio_token_id, spec.video_token_id]


def _picture(spec, r: np.random.Generator, soft: int) -> Patches:
    pool, side = spec.vision.input_pooling, spec.vision.input_patch
    y, x = np.divmod(np.arange(soft * pool * pool, dtype=np.int32), np.int32(pool))  # a strip, one soft token wide
    pixels = r.integers(0, 256, (len(x), 3 * side * side), dtype=np.uint8)
    return Patches(pixels, np.stack([x, y], axis=-1), soft)
