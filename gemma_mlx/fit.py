"""Whether a run fits the machine's memory, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx import machine
from gemma_mlx.batch import Batch
from gemma_mlx.config import NO_MASTERS, TrainConfig
from gemma_mlx.data.batches import collate
from gemma_mlx.data.buckets import LONGEST, MEDIA, MOST, MOST_VALID, SOFT, TOKENS, of_batch, of_row
from gemma_mlx.data.dataset import Dataset, Survey
from gemma_mlx.data.order import Plan
from gemma_mlx.data.packing import joined
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import Sample
from gemma_mlx.errors import InputError, SourceError
from gemma_mlx.estimate import ChooseBuckets, Estimate, Kept, estimate, media_weights
from gemma_mlx.machine import Room
from gemma_mlx.models.media import MEDIA as KINDS
from gemma_mlx.optimizers import OPTIMIZERS
from gemma_mlx.preparation import (
    PAD_MULTIPLE,
    Planner,
    buckets_of,
    in_order,
    lanes_of,
    make_trainable,
    plan_of,
    total_steps,
    with_options,
)
from gemma_mlx.skeleton import skeleton_of
from gemma_mlx.step import should_compile

Changes = dict[str, Any]
"""Option name -> new value."""
Estimator = Callable[[TrainConfig], Estimate]
SUGGESTIONS = 3
MOST_SOFT = 1 << 40
"""Soft tokens that no memory holds: those of rows that nobody has counted."""
MOST_LOOKED_AT = 20_000
"""Batches among which the heaviest is sought."""
FEWER_IMAGE_TOKENS = 70


def changes(config: TrainConfig, pictures: bool = False) -> Iterator[Changes]:
    """What may make a run smaller, cheapest first: what keeps the result, then 8 and 4 bits, then fewer image tokens.

    Within these, what takes less time: checkpointing of every other layer and of all, smaller batches accumulated to
    the same step, both.
    """
    exact = list(_exact(config))
    yield from exact[1:]
    if config.quantize is None:
        for bits in (8, 4):
            yield from ({"quantize": bits, **change} for change in (exact[0], *exact[2:3], *exact[-1:]))
    if pictures and (config.image_tokens or FEWER_IMAGE_TOKENS + 1) > FEWER_IMAGE_TOKENS:
        yield {"image_tokens": FEWER_IMAGE_TOKENS}
        yield {"image_tokens": FEWER_IMAGE_TOKENS, **exact[-1]}


def _exact(config: TrainConfig) -> Iterator[Changes]:
    """Nothing; then changes that keep what is computed."""
    layers = [n for n in (2, 1) if not config.checkpoint_layers or n < config.checkpoint_layers]
    yield {}
    yield from ({"checkpoint_layers": n} for n in layers)
    rows, times = config.batch_size, config.accumulate
    while rows > 1:
        factor = 2 if rows % 2 == 0 else rows
        rows, times = rows // factor, times * factor
        smaller = {"batch_size": rows, "accumulate": times}
        yield smaller
        if layers:
            yield {**smaller, "checkpoint_layers": 1}


def flags(change: Changes) -> str:
    """Changes as they are typed: ``--batch-size 2 --accumulate 2``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())


def fits(found: Estimate, room: Room) -> bool:
    """Whether there is room for the peak and for the largest single buffer."""
    return found.peak <= room.bytes and (room.buffer is None or found.largest <= room.buffer)


def what_fits(
    config: TrainConfig, estimate: Estimator, room: Room, pictures: bool
) -> Iterator[tuple[Changes, Estimate]]:
    """Changes that make the run fit with their estimates, cheapest first, of each kind or mix of kinds one."""
    found: list[Changes] = []
    for change in changes(config, pictures):
        if any(known.keys() <= change.keys() for known in found):
            continue
        try:
            made = estimate(dataclasses.replace(config, **change))
        except InputError:  # 4 bits of a model that is packed already, or trains in full
            continue
        if fits(made, room):
            found.append(change)
            yield change, made


def fit(config: TrainConfig, estimate: Estimator, room: Room, pictures: bool) -> tuple[TrainConfig, Estimate, Changes]:
    """(config, its estimate, what was changed): with ``auto`` the first change that makes the run fit is applied.

    Raises:
        InputError: it does not fit; with the three cheapest changes that would make it fit.
    """
    needed = estimate(config)
    if fits(needed, room):
        return config, needed, {}
    if config.auto:
        for change, made in what_fits(config, estimate, room, False):
            return dataclasses.replace(config, **change), made, change
    which = f"{needed.peak / 1e9:.2f} GB"
    if needed.peak <= room.bytes:
        which = (
            f"a buffer of {needed.largest / 1e9:.2f} GB where {room.buffer / 1e9:.2f} GB is the limit, in all {which}"
        )
    ways = []
    for change, made in what_fits(config, estimate, room, pictures):
        ways.append(f"{flags(change)} ({made.peak / 1e9:.2f} GB)")
        if len(ways) == SUGGESTIONS:
            break
    advice = f"any of these makes it fit: {'; '.join(ways)}" if ways else (
        "nothing that was tried makes it fit; take a smaller checkpoint, fewer targets or shorter rows"
    )  # fmt: skip
    raise InputError(f"the run needs {which} of {room.describe()} ({needed.describe()}); {advice}")


def fitted(
    config: TrainConfig, model: Any, given: bool, rows: Dataset, valid: Dataset | None
) -> tuple[TrainConfig, Estimate | None, list[str]]:
    """(config, its estimate, lines for the user), as ``fit``. A resumed run is neither refused nor changed.

    ``given``: the model was loaded by the caller, so that quantizing is not ours.
    """
    room, lines = machine.room(config.memory_gb), []
    needs = partial(estimate_run, model, given, rows, valid)
    try:
        if config.resume:
            needed, changed = needs(config), {}
        else:
            config, needed, changed = fit(config, needs, room, bool(rows.seen.sizes[:, SOFT][:, 0].any()))
    except InputError:
        raise
    except ValueError as error:  # an operation that MLX cannot show
        return config, None, [f"memory: not estimated ({error})"]
    if changed:
        lines.append(f"--auto: to fit {room.describe()} the run goes on with {flags(changed)}")
    size = f"{needed.peak / 1e9:.2f} GB estimated at the peak"
    lines.append(f"memory: {size}, of {room.describe()} ({needed.describe()})")
    return config, needed, lines


def estimate_run(model: Any, given: bool, rows: Dataset, valid: Dataset | None, config: TrainConfig) -> Estimate:
    """The estimate of a run's largest batch, for a lazy model whose weights stay unread."""
    bare = skeleton_of(model, None if given else config.quantize)
    make_trainable(bare, config, bare=True)
    weight = media_weights(bare)
    batches = int(total_steps(config, plan_of(config, rows)) * config.accumulate)
    return estimate(
        bare,
        heaviest_batch(rows.seen, plan_of(config, rows.seen), config, weight, batches),
        recompute=config.checkpoint_layers,
        pick_labels=config.label_positions == "auto",
        clip=config.clip,
        accumulate=config.accumulate,
        lanes=lanes_of(config, rows),
        optimizer=OPTIMIZERS[config.optimizer],
        masters=config.master_weights != NO_MASTERS,
        kept=kept_outputs(config, rows),
        buckets=shapes_of(config, rows, plan_of),
        **valid_batch(config, valid, weight),
    )


def valid_batch(config: TrainConfig, valid: Dataset | None, weight: dict[str, float]) -> dict[str, Any]:
    """What ``estimate`` is told of validation."""
    if valid is None:
        return {}
    return {
        "valid": heaviest_batch(valid.seen, in_order(config, valid.seen), config, weight),
        "valid_buckets": shapes_of(config, valid, in_order, MOST_VALID),
    }


def shapes_of(config: TrainConfig, rows: Dataset, plan: Planner, most: int = MOST) -> ChooseBuckets | None:
    """What chooses a compiled step's buckets; None where steps are not compiled."""
    return partial(buckets_of, config=config, rows=rows, plan=plan, most=most) if should_compile() else None


def kept_outputs(config: TrainConfig, rows: Dataset) -> Kept:
    """What of frozen towers' outputs stays in memory: soft tokens of all rows by kind, and the most bytes."""
    if config.tower_cache != "memory":
        return Kept()
    limit = None if config.tower_cache_gb is None else int(config.tower_cache_gb * 1e9)
    seen = rows.seen
    times = MOST_SOFT if rows.examples.n is None else rows.examples.n / len(seen)
    soft = (min(times * tokens, MOST_SOFT) for tokens in seen.sizes[:, SOFT].sum(axis=0).tolist())
    return Kept(dict(zip(KINDS, map(int, soft), strict=True)), limit)


def heaviest_batch(
    rows: Dataset | Survey, plan: Plan, config: TrainConfig, weight: dict[str, float], most: int = MOST_LOOKED_AT
) -> Batch:
    """Of a plan's first batches the one that takes most: positions, padding included, and media that are encoded.

    ``weight``: as from ``media_weights``.
    """

    def size(batch: list[list[int]]) -> float:
        sizes = of_batch(np.stack([of_row(rows.sizes[row]) for row in batch]))
        media = dict(zip(KINDS, sizes[MEDIA] * sizes[LONGEST], strict=True))
        return len(batch) * sizes[TOKENS] + sum(w * media[kind] for kind, w in weight.items())

    processor = with_options(rows.processor, config)
    multiple = 1 if should_compile() else PAD_MULTIPLE[mx.default_device().type.name]
    for batch in sorted(islice(plan.batches(0), min(most, MOST_LOOKED_AT)), key=size, reverse=True):
        samples = [[s for i in row if (s := _sample(processor, rows, i, config)) is not None] for row in batch]
        if found := [joined(row) if config.packing else row[0] for row in samples if row]:
            return collate(found, processor.pad_id, multiple)
    raise InputError("all rows that were looked at are bad")


def _sample(processor: Processor, rows: Dataset | Survey, index: int, config: TrainConfig) -> Sample | None:
    """None for a bad row that is skipped."""
    try:
        return processor.sample(rows.examples[index])
    except SourceError:
        raise
    except InputError:
        if config.on_bad_row != "skip":
            raise
        return None
