"""Whether a run fits the machine's memory, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from gemma_mlx.config import TrainConfig
from gemma_mlx.errors import InputError
from gemma_mlx.estimate import Estimate
from gemma_mlx.machine import Room

Changes = dict[str, Any]
"""Option name -> new value."""
Estimator = Callable[[TrainConfig], Estimate]
SUGGESTIONS = 3
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
