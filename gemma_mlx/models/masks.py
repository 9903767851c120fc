"""Who sees whom: additive attention masks from positions, windows, runs of pictures, segments of packed rows."""

from __future__ import annotations

import mlx.core as mx


def vision_runs(mm_token_type_ids: mx.array) -> mx.array:
    """int [B, T]: the same positive number along each run of consecutive picture or video slots, 0 elsewhere."""
    vision = (mm_token_type_ids == 1) | (mm_token_type_ids == 2)
    before = mx.pad(vision[:, :-1], [(0, 0), (1, 0)])
    return mx.where(vision, mx.cumsum((vision & ~before).astype(mx.int32), axis=1), 0)


def positions_in_segments(segment_ids: mx.array) -> mx.array:
    """int [B, T]: how many positions of the same segment come before each, so that every segment begins at 0."""
    columns = mx.arange(segment_ids.shape[1])[None]
    begins = mx.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    return columns - mx.cummax(mx.where(begins, columns, 0), axis=1)


def additive_mask(
    queries: mx.array,
    keys: mx.array,
    window: int | None,
    valid: mx.array | None,
    dtype: mx.Dtype,
    runs: mx.array | None = None,
    windowed_runs: bool = True,
    segments: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Mask [B or 1, 1, Tq, Tk]: 0 where a key may be seen, else the dtype's most negative finite value.

    The fill is finite so that a row that sees nothing (padding) averages instead of giving NaN.

    Args:
        queries: int positions [B or 1, Tq], in any order.
        keys: int positions [Tk].
        window: keys that a query sees, itself included; None for all up to itself.
        valid: bool [B, Tk], false on padding keys.
        runs: int [B, Tq], as `vision_runs` gives them, where the queries are the last Tq of the keys: within a run,
            later keys are seen too.
        windowed_runs: whether the window limits what is seen within a run.
        segments: ids of the queries' segments [B, Tq] and of the keys' [B, Tk]: nothing else is seen than the own
            segment. Distances and runs may be those of the whole row.
    """
    distance = queries[:, None, :, None] - keys[None, None, None, :]
    seen, near = distance >= 0, None if window is None else distance < window
    if near is not None and not (windowed_runs and runs is not None):
        seen = mx.logical_and(seen, near)
    if runs is not None:
        # Keys of earlier calls precede every query, so causality already decides about them.
        of_keys = mx.pad(runs, [(0, 0), (keys.shape[0] - runs.shape[1], 0)])
        within = mx.logical_and(runs[:, None, :, None] == of_keys[:, None, None, :], runs[:, None, :, None] > 0)
        seen = mx.logical_or(seen, within)
        if near is not None and windowed_runs:
            seen = mx.logical_and(seen, near)
    if segments is not None:
        seen = mx.logical_and(seen, segments[0][:, None, :, None] == segments[1][:, None, None, :])
    if valid is not None:
        seen = mx.logical_and(seen, valid[:, None, None, :])
    return mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
