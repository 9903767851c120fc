"""What a run is made of before its first step: rows, what trains, which rows make up which batches."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from gemma_mlx import machine
from gemma_mlx.config import NO_MASTERS, NO_TARGETS, TrainConfig
from gemma_mlx.data.buckets import MOST, TOKENS, Buckets, choose_buckets, of_sample
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.examples import Prompts
from gemma_mlx.data.order import Grouped, Plan, Shuffled
from gemma_mlx.data.packing import Packed
from gemma_mlx.data.processor import Processor
from gemma_mlx.full import refuse_trained, refuse_without_masters, train_fully
from gemma_mlx.lora import apply_lora, freeze_base
from gemma_mlx.progress import Reporter
from gemma_mlx.step import Step, should_compile

PAD_MULTIPLE = {"gpu": 32, "cpu": 8}
"""Rows are padded to a multiple of so many tokens: few shapes to compile, against wasted work (dear on a CPU)."""


def with_options(processor: Processor, config: TrainConfig) -> Processor:
    """A processor of the same checkpoint with the run's data options."""
    return Processor(
        processor.folder, processor.spec, image_tokens=config.image_tokens, long_audio=config.long_audio,
        train_on=config.train_on,
    )  # fmt: skip


def open_rows(path: str | None, processor: Processor, config: TrainConfig, say: Reporter) -> Dataset | None:
    """The rows of a CSV, each checked: its texts rendered, its media's headers read. Raises InputError (file:line)."""
    if path is None:
        return None
    prompts = Prompts(config.audio_prompt, config.image_prompt, config.system)
    rows = Dataset(path, processor, config.media_root, config.columns, prompts=prompts)
    with ThreadPoolExecutor(4) as pool:
        check = pool.map(lambda e: of_sample(processor.sample(e, with_features=False)), rows.examples)
        rows.sizes = np.stack(list(say.each(check, len(rows), f"checking {path}")))
    rows.lengths = rows.sizes[:, TOKENS].tolist()
    return rows


def plan_of(config: TrainConfig, rows: Dataset) -> Plan:
    """Which rows make up which batches, as the options say."""
    if config.packing:
        return Packed(rows.lengths, config.batch_size, row_tokens(config, rows), config.seed)
    if config.group_by_length:
        return Grouped(rows.lengths, config.batch_size, config.seed)
    return Shuffled(len(rows), config.batch_size, config.seed)


def row_tokens(config: TrainConfig, rows: Dataset) -> int:
    """Tokens of a batch's row on average; of packed rows what they have room for."""
    if config.packing:
        return config.pack_tokens or max(rows.lengths)
    return sum(rows.lengths) // len(rows)


def total_steps(config: TrainConfig, plan: Plan) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or max(1, math.ceil(plan.count(config.epochs) / config.accumulate))


def lanes_of(config: TrainConfig, rows: Dataset) -> int:
    """Threads that share a batch: one where steps are compiled, since MLX compiles for every thread anew."""
    return 1 if should_compile() else machine.lanes(config.batch_size, row_tokens(config, rows))


def buckets_of(step: Step, config: TrainConfig, rows: Dataset, plan: Plan, most: int = MOST) -> Buckets:
    """Few shapes for the batches of a compiled step."""
    return choose_buckets(rows.sizes, plan, config.batch_size, partial(step.work, config.batch_size), most)


def in_order(config: TrainConfig, rows: Dataset) -> Plan:
    """Validation: the order of the file."""
    return Shuffled(len(rows), config.batch_size, shuffle=False)


def make_trainable(model: Any, config: TrainConfig) -> str:
    """Put adapters on the targets and unfreeze the modules that train in full; what was done, in words."""
    refuse_trained(model)
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
