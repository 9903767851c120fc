"""Samples, each a batch of one row, laid out together: a row each, or end to end in a few rows of segments."""

from __future__ import annotations

import dataclasses

import numpy as np
import tiny_gemma3n
from parity_cases import audio, image, make_batch, video

from gemma_mlx.batch import IGNORE_INDEX, Batch

TEXT = [[30], [5], [75], [9], [1], [17]]  # 75: nine windows of 8
PICTURES = [[3, image(6, 6), image(12, 9), 9], [30], [4, image(9, 6), 1], [image(12, 9), 5], [70], [video(2, 6, 6), 8]]
EVERYTHING = [[30], [3, image(12, 9), audio(9), 9], [70], [audio(3), image(6, 3), 8], [12, audio(21), 6], [5]]
GROUPS = [[0, 1, 2], [3, 4, 5]]
_MEDIA = {
    "pixel_values": 0,
    "image_position_ids": -1,
    "pixel_values_videos": 0,
    "video_position_ids": -1,
    "input_features": 0,
    "input_features_mask": False,
}
"""Name of an array of media -> what stands in its padding."""


def samples_of(family: str) -> list[Batch]:
    """Six samples of the family's media, one longer than the sliding window of each kind of row."""
    if family == "3n":
        return _samples_3n()
    rows = TEXT if family == "Gemma 3" else PICTURES if family in ("31B", "26B") else EVERYTHING
    return [make_batch([row], seed=seed, unified=family.startswith("12B")) for seed, row in enumerate(rows)]


def _samples_3n() -> list[Batch]:
    """Clips of one length: what Gemma 3n's tower gives for a clip depends on its padding."""
    kinds = [("image+audio", 20), ("text", 70), ("text", 9), ("audio", 12), ("text", 5), ("text", 24)]
    found = []
    for seed, (kind, n_text) in enumerate(kinds):
        arrays = tiny_gemma3n.inputs(kind, seed=seed, n_text=n_text)
        ids, mask = (arrays.pop(n).astype(np.int32) for n in ("input_ids", "attention_mask"))
        labels = np.where(ids < tiny_gemma3n.BOI, ids, IGNORE_INDEX).astype(np.int32)
        labels[:, : labels.shape[1] - n_text] = IGNORE_INDEX
        found.append(Batch(ids, mask, np.zeros_like(ids), labels, **arrays))
    return found


def apart(samples: list[Batch]) -> Batch:
    """A row each, padded on the right."""
    return dataclasses.replace(packed(samples, [[i] for i in range(len(samples))]), segment_ids=None)


def packed(samples: list[Batch], groups: list[list[int]]) -> Batch:
    """A row a group: its samples end to end, each a segment; labels of first tokens are left out."""
    length = max(sum(samples[i].input_ids.size for i in group) for group in groups) + 3
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "segment_ids")
    rows = {name: np.zeros((len(groups), length), np.int32) for name in names}
    rows["labels"][:] = IGNORE_INDEX
    for at, group in enumerate(groups):
        start = 0
        for segment, sample in enumerate((samples[i] for i in group), start=1):
            own = slice(start, start + sample.input_ids.size)
            for name in names[:4]:
                rows[name][at, own] = getattr(sample, name)[0]
            rows["labels"][at, start] = IGNORE_INDEX
            rows["segment_ids"][at, own] = segment
            start = own.stop
    order = [samples[i] for group in groups for i in group]
    return Batch(**rows, **{name: together(order, name, fill) for name, fill in _MEDIA.items()})


def together(samples: list[Batch], name: str, fill: float) -> np.ndarray | None:
    """The media of all samples in one array, padded to the longest."""
    found = [array for sample in samples if (array := getattr(sample, name)) is not None]
    if not found:
        return None
    longest = max(array.shape[1] for array in found)
    pad = lambda a: [(0, 0), (0, longest - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]  # noqa: E731
    return np.concatenate([np.pad(array, pad(array), constant_values=fill) for array in found])
