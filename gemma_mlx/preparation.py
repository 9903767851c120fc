"""What a run is made of before its first step: rows, what trains, which rows make up which batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from gemma_mlx import machine
from gemma_mlx.adapters.start import begin
from gemma_mlx.config import NO_MASTERS, NO_TARGETS, TrainConfig
from gemma_mlx.data.buckets import MOST, Buckets, choose_buckets
from gemma_mlx.data.dataset import CACHE_BYTES, Dataset, Survey
from gemma_mlx.data.examples import Prompts
from gemma_mlx.data.order import Grouped, Plan, Shuffled
from gemma_mlx.data.packing import Packed
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.data.rows import Rows
from gemma_mlx.errors import InputError
from gemma_mlx.full import refuse_trained, refuse_without_masters, train_fully
from gemma_mlx.lora import apply_lora, freeze_base
from gemma_mlx.progress import Reporter
from gemma_mlx.step import Step, should_compile

MOST_CHECKED = 20_000
"""Rows that are all looked at before the first step, where nothing else is asked for."""
SURVEYED, SURVEYED_FAR_AWAY = 256, 32
"""Of more rows, or of rows whose media are fetched, so many are."""
Planner = Callable[[TrainConfig, "Dataset | Survey"], Plan]
PAD_MULTIPLE = {"gpu": 32, "cpu": 8}
"""Rows are padded to a multiple of so many tokens: few shapes to compile, against wasted work (dear on a CPU)."""


def with_options(processor: Processor, config: TrainConfig) -> Processor:
    """A processor of the same checkpoint with the run's data options."""
    return Processor(
        processor.folder, processor.spec, image_tokens=config.image_tokens, long_audio=config.long_audio,
        train_on=config.train_on,
    )  # fmt: skip


def fetcher_of(config: TrainConfig) -> LazyFetcher:
    """What reads data far away, for a run: it sees one version of every object, also after it was resumed."""
    named = [*filter(None, (config.data, config.valid)), *config.media_root]
    return LazyFetcher(
        named, hosts=config.allow_host, folder=config.media_cache_dir, limit_bytes=int(config.media_cache_gb * 1e9),
        run=os.path.abspath(config.out) if config.out else "", resumed=config.resume,
    )  # fmt: skip


def open_rows(
    path: str | None, processor: Processor, config: TrainConfig, say: Reporter, fetcher: Any = None,
    split: str = "train",
) -> Dataset | None:  # fmt: skip
    """The rows behind a name, each checked or some of them: texts rendered, headers of media read.

    Raises:
        InputError: naming file:line.
    """
    if path is None:
        return None
    rows = Rows(
        path, config.media_root, config.columns,
        prompts=Prompts(config.audio_prompt, config.image_prompt, config.system), fetcher=fetcher, split=split,
        lines=config.text_rows, patches=config.patches, language_mode=config.language_mode,
    )  # fmt: skip
    for line in rows.notes():
        say.say(line)
    many = rows.n is None or rows.n > MOST_CHECKED
    found = Dataset(
        rows, processor, check=False, cache_bytes=0 if many else CACHE_BYTES,  # a row comes again only after all others
        on_bad_row=config.on_bad_row, max_bad_rows=config.max_bad_rows,
    )  # fmt: skip
    if config.check == "all" or (config.check == "auto" and not many and found.prefetch is None):
        found.look_at_all()
        found.measure_all(lambda each: say.each(each, len(rows), f"checking {path}"))
    else:
        found.look_at_some(SURVEYED if found.prefetch is None else SURVEYED_FAR_AWAY, config.seed)
        say.say(f"{path}: {len(found.seen)} rows looked at, the others when their turn comes (--check all: all now)")
    return found


def plan_of(config: TrainConfig, rows: Dataset | Survey) -> Plan:
    """Which rows make up which batches, as the options say.

    Raises:
        InputError: packing of rows whose lengths are not known.
    """
    walk = rows.walk(config.seed)
    if config.packing:
        if rows.lengths is None and walk.n is None:
            raise InputError("packing: shards far away are counted as they come; leave it out, or fetch them")
        if rows.lengths is None:
            raise InputError("packing: rows are packed by their lengths, and not all were looked at; add --check all")
        return Packed(rows.lengths, config.batch_size, row_tokens(config, rows), config.seed, walk)
    if config.group_by_length:
        lengths = rows.measure if rows.lengths is None else rows.lengths
        return Grouped(lengths, config.batch_size, config.seed, walk=walk)
    return Shuffled(walk, config.batch_size)


def row_tokens(config: TrainConfig, rows: Dataset | Survey) -> int:
    """Tokens of a batch's row on average; of packed rows what they have room for."""
    lengths = rows.seen.lengths
    if config.packing:
        return config.pack_tokens or max(lengths)
    return sum(lengths) // len(lengths)


def total_steps(config: TrainConfig, plan: Plan) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or max(1, math.ceil(plan.count(config.epochs) / config.accumulate))


def lanes_of(config: TrainConfig, rows: Dataset) -> int:
    """Threads that share a batch: one where steps are compiled, since MLX compiles for every thread anew."""
    return 1 if should_compile() else machine.lanes(config.batch_size, row_tokens(config, rows))


def buckets_of(
    step: Step, config: TrainConfig, rows: Dataset | Survey, plan: Planner, most: int = MOST
) -> Buckets:  # fmt: skip
    """Few shapes for the batches of a compiled step, chosen by the rows that were looked at."""
    seen, cost = rows.seen, partial(step.work, config.batch_size)
    return choose_buckets(seen.sizes, plan(config, seen), config.batch_size, cost, most)


def in_order(config: TrainConfig, rows: Dataset | Survey) -> Plan:
    """Validation: the order of the file."""
    return Shuffled(rows.walk(config.seed, False), config.batch_size)


def make_trainable(model: Any, config: TrainConfig, bare: bool = False) -> str:
    """Put adapters on the targets and unfreeze the modules that train in full; what was done, in words.

    ``bare``: the model's weights were never made (`gemma_mlx.skeleton`).
    """
    refuse_trained(model)
    if config.init_adapter:
        return begin(model, config, bare)
    done = []
    if config.targets == NO_TARGETS:
        freeze_base(model)
    else:
        paths = apply_lora(
            model, config.targets, config.rank, config.adapter_alpha, config.dropout, config.seed, config.dora
        )
        done.append(f"adapters on {len(paths)} layers")
    if config.full:
        done.append(f"{len(train_fully(model, config.full))} modules in full")
        if config.master_weights == NO_MASTERS:
            refuse_without_masters(model)
    return " and ".join(done)
