"""A batch laid out for a step, in NumPy: index arrays, media by content, rows of a table on disk.

All of it needs neither weights nor MLX's streams, so that it can be made while the step before runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.buckets import LABELS, LONGEST, MULTIPLES, ROW_LABELS, SOFT, TOKENS
from gemma_mlx.data.buckets import MEDIA as MEDIA_COUNT
from gemma_mlx.data.features import MEL_BINS
from gemma_mlx.errors import InputError
from gemma_mlx.loss import POSITION_BUCKET, label_positions
from gemma_mlx.models.media import MEDIA, fixed_soft_tokens, soft_token_counts, soft_token_index
from gemma_mlx.models.tables import TableRows
from gemma_mlx.parts import placing
from gemma_mlx.tower_cache import Medium, TowerCache

SOFT_BUCKET = 64
"""Soft-token lists of compiled steps are padded to a multiple of this, unless buckets were chosen."""
_VISION_TYPES = (1, 2)


@dataclass
class Laid:
    """A batch, or the rows of it that a lane works on.

    Attributes:
        arrays: what the step takes, by name.
        media: of frozen towers, by kind.
        soft_tokens: how many soft tokens the tower's output is padded to, by kind.
        table: rows of the table on disk, or None.
        labels, tokens, positions: counted on the way; positions with padding.
    """

    arrays: dict[str, np.ndarray]
    labels: int
    tokens: int
    positions: int
    media: dict[str, list[Medium]] = field(default_factory=dict)
    soft_tokens: dict[str, int] = field(default_factory=dict)
    table: TableRows | None = None


@dataclass(frozen=True)
class Lengths:
    """What lists are padded to a multiple of: label positions, each row's of them, soft tokens by kind."""

    positions: int = 1
    columns: int = 1
    soft: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA, 1))

    @classmethod
    def of(cls, bucket: np.ndarray) -> Lengths:
        """Those of a bucket, which has room for one multiple each."""
        return cls(int(bucket[LABELS]), int(bucket[ROW_LABELS]), dict(zip(MEDIA, map(int, bucket[SOFT]), strict=True)))


EXACT = Lengths()
FEW = Lengths(POSITION_BUCKET, POSITION_BUCKET, dict.fromkeys(MEDIA, SOFT_BUCKET))


def lay_out(batch: Batch, spec: Any, frozen: Mapping[str, TowerCache] | None = None, lengths: Lengths = EXACT) -> Laid:
    """Count and check a batch; media whose tower is frozen are looked up in its cache.

    Raises InputError where the number of slots in ``input_ids`` differs from the soft tokens that the media give.
    """
    arrays = {"input_ids": batch.input_ids, **label_positions(batch.labels, lengths.positions)}
    laid = Laid(arrays, batch.label_count, int(batch.attention_mask.sum()), batch.input_ids.size)
    if getattr(spec.text, "bidirectional_vision", False) and np.isin(batch.mm_token_type_ids, _VISION_TYPES).any():
        arrays["mm_token_type_ids"] = batch.mm_token_type_ids
    if batch.segment_ids is not None:
        arrays["segment_ids"] = batch.segment_ids
    for kind, names in MEDIA.items():
        values, where = (getattr(batch, name) for name in names)
        index = np.zeros(0, np.int32) if values is None else soft_token_index(spec, kind, placing(batch, kind))
        slots = int((batch.input_ids == getattr(spec, f"{kind}_token_id")).sum())
        if slots != len(index):
            rows = ", ".join(batch.row_ids[:4])
            raise InputError(f"{rows}: {slots} {kind} slots in the text, but the media give {len(index)} soft tokens")
        if values is None:
            continue
        soft = max(1, -(-len(index) // lengths.soft[kind])) * lengths.soft[kind]
        if frozen and kind in frozen:
            laid.media[kind] = frozen[kind].look_up(values, where, batch.digests.get(kind))
            laid.soft_tokens[kind] = soft
        else:
            arrays |= {name: a for name, a in zip(names, (values, where), strict=True) if a is not None}
            # The extra soft tokens are never spliced.
            arrays[f"{kind}_index"] = np.pad(index, (0, soft - len(index)), mode="edge" if len(index) else "constant")
    return laid


def lay_out_in(bucket: np.ndarray, rows: int, batch: Batch, spec: Any, frozen: Mapping[str, TowerCache]) -> Laid:
    """``lay_out`` with all arrays of the bucket's shapes, whatever of its media kinds is in the batch."""
    laid = lay_out(widened(batch, bucket, rows, frozen, spec), spec, frozen, Lengths.of(bucket))
    if getattr(spec.text, "bidirectional_vision", False) and bucket[SOFT][:2].any():
        laid.arrays.setdefault("mm_token_type_ids", np.zeros_like(laid.arrays["input_ids"]))
    for kind, soft in zip(MEDIA, bucket[SOFT], strict=True):
        if soft and kind in frozen and kind not in laid.media:
            laid.media[kind], laid.soft_tokens[kind] = frozen[kind].look_up(*blank(spec, kind, 1)), int(soft)
    return laid


def sizes(batch: Batch, spec: Any) -> np.ndarray:
    """A batch's line of sizes, as ``gemma_mlx.data.buckets`` has them."""
    found = np.zeros(len(MULTIPLES), np.int32)
    labels = (batch.labels[:, 1:] != IGNORE_INDEX).sum(axis=1)
    found[[TOKENS, LABELS, ROW_LABELS]] = batch.input_ids.shape[1], labels.sum(), labels.max()
    for at, kind in enumerate(MEDIA):
        if (where := placing(batch, kind)) is not None:
            counts = soft_token_counts(spec, kind, where)
            found[3 + at :: 3] = counts.sum(), len(counts), max(counts.max(), -(-where.shape[1] // _cell(spec, kind)))
    return found


def _cell(spec: Any, kind: str) -> int:
    """Patches or frames of a soft token; more than there are where every medium has as many (Gemma 3n)."""
    if fixed_soft_tokens(spec, kind) is not None:
        return 1 << 30
    return spec.audio.frames_per_token if kind == "audio" else spec.vision.input_pooling**2


def widened(batch: Batch, bucket: np.ndarray, rows: int, frozen: Collection[str], spec: Any) -> Batch:
    """The batch with rows and tokens of padding, and media without content, up to the bucket's sizes.

    Media of ``frozen`` towers stay as they are, since they are encoded one by one, and so do Gemma 3n's, each of which
    counts in full.
    """
    more = (rows - len(batch.input_ids), int(bucket[TOKENS]) - batch.input_ids.shape[1])
    fill = {"input_ids": spec.text.pad_token_id, "labels": IGNORE_INDEX}
    fill |= dict.fromkeys(("attention_mask", "mm_token_type_ids", "segment_ids"), 0)
    changed = {n: _grown(a, more, pad) for n, pad in fill.items() if (a := getattr(batch, n)) is not None}
    for kind, media, longest in zip(MEDIA, bucket[MEDIA_COUNT], bucket[LONGEST], strict=True):
        if not media or kind in frozen or fixed_soft_tokens(spec, kind) is not None:
            continue
        values, where = (getattr(batch, name) for name in MEDIA[kind])
        if values is None:
            values, where = blank(spec, kind, 0)
        more = (int(media) - len(values), int(longest) * _cell(spec, kind) - values.shape[1])
        padding = 0 if kind == "audio" else -1
        changed |= dict(zip(MEDIA[kind], (_grown(values, more, 0), _grown(where, more, padding)), strict=True))
    return replace(batch, **changed)


def _grown(array: np.ndarray, more: tuple[int, int], fill: int) -> np.ndarray:
    """Longer by so much along the first two axes."""
    return np.pad(array, [(0, n) for n in more] + [(0, 0)] * (array.ndim - 2), constant_values=fill)


def blank(spec: Any, kind: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, positions or mask) of so many media without content, as small as the tower takes them."""
    fixed = fixed_soft_tokens(spec, kind) is not None
    if kind == "audio":
        frames = 128 if fixed else spec.audio.frames_per_token
        width = getattr(spec.audio, "audio_embed_dim", MEL_BINS)
        return np.zeros((count, frames, width), np.float32), np.ones((count, frames), bool)
    if fixed:
        return np.zeros((count, 3, 256, 256), np.uint8), None
    side = spec.vision.input_pooling
    places = np.stack(np.divmod(np.arange(side * side, dtype=np.int32), np.int32(side))[::-1], axis=-1)
    pixels = np.zeros((count, side * side, 3 * spec.vision.input_patch**2), np.uint8)
    return pixels, np.repeat(places[None], count, axis=0)
