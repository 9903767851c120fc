"""A batch as several of consecutive rows, each with its own media and no padding but its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_mlx.batch import Batch
from gemma_mlx.lanes import PART_TOKENS, edges
from gemma_mlx.models.media import MEDIA, reads_padding, soft_token_counts

_BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "segment_ids")


def part_count(rows: int, length: int, lanes: int) -> int:
    """Parts of a batch of so many rows and tokens a row: at least one a lane, if there are rows for it."""
    return 1 if lanes <= 1 else min(rows, max(lanes, rows * length // PART_TOKENS))


def split(batch: Batch, lanes: int, spec: Any) -> list[Batch]:
    """The batch as ``part_count`` batches of consecutive rows, each without the padding that no row of it needs."""
    rows, length = batch.input_ids.shape
    count = part_count(rows, length, lanes)
    if count == 1:
        return [batch]
    at = edges(rows, count)
    given = {kind: placing(batch, kind) for kind in MEDIA}
    soft = {kind: None if a is None else soft_token_counts(spec, kind, a) for kind, a in given.items()}
    cuts = {kind: _media_edges(batch, counts, kind, at, spec) for kind, counts in soft.items()}
    return [_rows(batch, i, at, cuts, spec) for i in range(count)]


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


def _rows(batch: Batch, part: int, at: list[int], cuts: dict[str, list[int]], spec: Any) -> Batch:
    rows = slice(at[part], at[part + 1])
    length = longest(batch.attention_mask[rows])
    parts: dict[str, Any] = {"row_ids": batch.row_ids[rows]}
    for name in _BY_TOKEN:
        parts[name] = None if (array := getattr(batch, name)) is None else array[rows, :length]
    for kind, names in MEDIA.items():
        a, b = cuts[kind][part : part + 2]
        if a < b:
            media = {n: array[a:b] for n in names if (array := getattr(batch, n)) is not None}
            if len(media) == 2 and not reads_padding(spec, kind):
                needed = longest(present(media[names[1]]))
                media = {name: array[:, :needed] for name, array in media.items()}
            parts |= media
    parts["digests"] = {kind: digests[slice(*cuts[kind][part : part + 2])] for kind, digests in batch.digests.items()}
    return Batch(**parts)


def present(where: np.ndarray) -> np.ndarray:
    """bool [N, P]: false on padding, of positions [N, P, 2] (−1 there) or a mask [N, P]."""
    return where > 0 if where.ndim == 2 else (where >= 0).all(axis=-1)


def longest(mask: np.ndarray) -> int:
    """The width [.., P] down to which a mask can be cut; at least 1."""
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[-1]) + 1 if len(columns) else 1
