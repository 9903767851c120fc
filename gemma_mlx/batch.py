"""The one contract between data and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

IGNORE_INDEX = -100
"""Label of a position without loss (transformers' and torch's convention)."""


def unit_range(pixels: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1]; anything else as it is."""
    return pixels * np.float32(1 / 255) if pixels.dtype == np.uint8 else pixels


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, with the media of all rows in reading order (row by row, left to right).

    Array names are those of transformers' ``Gemma4ForConditionalGeneration.forward``. B rows of T tokens,
    N pictures of at most P patches, M clips of at most F frames.
    """

    input_ids: np.ndarray
    """int32 [B, T]; the pad id beyond a row's end."""
    attention_mask: np.ndarray
    """int32 [B, T]; 1 on tokens, 0 on padding."""
    mm_token_type_ids: np.ndarray
    """int32 [B, T]; 0 text, 1 image, 2 video, 3 audio."""
    labels: np.ndarray
    """int32 [B, T], not shifted; ``IGNORE_INDEX`` where there is no loss."""
    pixel_values: np.ndarray | None = None
    """[N, P, 3·patch²], zero in padding patches: uint8, or float32 in [0, 1]. (Gemma 3n: [N, 3, side, side].)"""
    image_position_ids: np.ndarray | None = None
    """int32 [N, P, 2], (x, y) of each patch, −1 in padding patches."""
    input_features: np.ndarray | None = None
    """float32 [M, F, 128] log-mel, or [M, F, 640] raw samples (Gemma 4 12B), zero in padding frames."""
    input_features_mask: np.ndarray | None = None
    """bool [M, F]; true on valid frames."""
    pixel_values_videos: np.ndarray | None = None
    """[frames, P, 3·patch²]: the frames of all videos, one after the other; else as pixel_values."""
    video_position_ids: np.ndarray | None = None
    """int32 [frames, P, 2], as image_position_ids."""
    num_frames_per_video: np.ndarray | None = None
    """int32 [videos]: how many frames are whose."""
    row_ids: tuple[str, ...] = ()
    """Where each row came from, for reports."""
    segment_ids: np.ndarray | None = None
    """int32 [B, T], of rows that hold several samples end to end: 1 along the first, 2 along the second, …, 0 in
    padding. A sample's first token has no label, so that the last token before it predicts nothing."""
    digests: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Hashes of the media's contents, by kind ("image", "video"), in order; a kind may be missing."""

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays that ``model(**inputs)`` takes: every array that is set except labels, pixels as float32."""
        names = (f.name for f in fields(self) if f.name not in ("labels", "row_ids", "digests"))
        return {name: unit_range(value) for name in names if (value := getattr(self, name)) is not None}

    @property
    def label_count(self) -> int:
        """Positions whose next token counts in the loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays."""
        values = (getattr(self, f.name) for f in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
