"""A batch laid out for a step, in NumPy: index arrays, media by content, rows of a table on disk.

All of it needs neither weights nor MLX's streams, so that it can be made while the step before runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.errors import InputError
from gemma_mlx.lanes import edges
from gemma_mlx.loss import POSITION_BUCKET, label_positions
from gemma_mlx.models.media import MEDIA, soft_token_counts, soft_token_index
from gemma_mlx.models.tables import TableRows
from gemma_mlx.tower_cache import Medium, TowerCache

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


def split(batch: Batch, lanes: int, spec: Any) -> list[Batch]:
    """The batch as up to ``lanes`` batches of consecutive rows, each with its own media."""
    rows = len(batch.input_ids)
    lanes = min(lanes, rows)
    if lanes <= 1:
        return [batch]
    at = edges(rows, lanes)
    given = {kind: placing(batch, kind) for kind in MEDIA}
    soft = {kind: None if a is None else soft_token_counts(spec, kind, a) for kind, a in given.items()}
    cuts = {kind: _media_edges(batch, counts, kind, at, spec) for kind, counts in soft.items()}
    return [_rows(batch, i, at, cuts) for i in range(lanes)]


def placing(batch: Batch, kind: str) -> np.ndarray | None:
    """The array that tells a medium's values from padding; the values themselves where nothing is padded."""
    values, where = (getattr(batch, name) for name in MEDIA[kind])
    return values if where is None else where


def _media_edges(batch: Batch, counts: np.ndarray | None, kind: str, at: list[int], spec: Any) -> list[int]:
    """How many media of a kind lie in the rows before each edge."""
    if counts is None:
        return [0] * len(at)
    slots = (batch.input_ids == getattr(spec, f"{kind}_token_id")).sum(1)
    ends = np.cumsum(counts)
    return [int(np.searchsorted(ends, slots[:edge].sum(), side="right")) if edge else 0 for edge in at]


def _rows(batch: Batch, lane: int, at: list[int], cuts: dict[str, list[int]]) -> Batch:
    rows = slice(at[lane], at[lane + 1])
    parts: dict[str, Any] = {"row_ids": batch.row_ids[rows]}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "segment_ids"):
        parts[name] = None if (array := getattr(batch, name)) is None else array[rows]
    for kind, names in MEDIA.items():
        a, b = cuts[kind][lane : lane + 2]
        if a < b:
            parts |= {n: array[a:b] for n in names if (array := getattr(batch, n)) is not None}
    return Batch(**parts)


def _padded(index: np.ndarray, multiple: int) -> np.ndarray:
    """``index`` filled up with its last value to a multiple; the extra soft tokens are never spliced."""
    return np.pad(index, (0, -len(index) % multiple), mode="edge") if len(index) else index


def lay_out(batch: Batch, spec: Any, frozen: dict[str, TowerCache] | None = None, bucket: int = 1) -> Laid:
    """Count and check a batch; media whose tower is frozen are looked up in its cache.

    Soft tokens are padded to a multiple of ``bucket``, and label positions too where it is not 1. Raises InputError
    where the number of slots in ``input_ids`` differs from the soft tokens that the media give.
    """
    arrays = {"input_ids": batch.input_ids}
    arrays |= label_positions(batch.labels, POSITION_BUCKET if bucket > 1 else 1)
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
        if frozen and kind in frozen:
            laid.media[kind] = frozen[kind].look_up(values, where)
            laid.soft_tokens[kind] = len(index) + -len(index) % bucket
        else:
            arrays |= {name: a for name, a in zip(names, (values, where), strict=True) if a is not None}
            arrays[f"{kind}_index"] = _padded(index, bucket)
    return laid
