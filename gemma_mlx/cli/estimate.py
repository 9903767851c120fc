"""What `doctor --estimate` prints and writes: which Mac trains which checkpoint, and how."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gemma_mlx.errors import InputError

MACS = (8, 16, 24, 32, 64, 128)
"""Memory in GB, as they are sold (2³⁰ bytes each)."""
SETTINGS = {
    "bf16": {},
    "bf16 c": {"recompute": 1},
    "8-bit": {"quantize": 8},
    "8-bit c": {"quantize": 8, "recompute": 1},
    "4-bit": {"quantize": 4},
    "4-bit c": {"quantize": 4, "recompute": 1},
}
"""What is tried, in this order; c: with checkpointing of every layer."""


def usable(mac: int) -> int:
    """Bytes that Metal recommends to use on a Mac of so many GB: two thirds up to 36 GB, three quarters above."""
    return mac * 2**30 * 2 // 3 if mac <= 36 else mac * 2**30 * 3 // 4


def run(model: str | None, rank: int, out: Path | None) -> None:
    """Print the tables, row by row; write them to a file.

    Args:
        model: one checkpoint's folder or Hub id; None for all published ones.

    Raises:
        InputError: `out` cannot be written, or what reading the checkpoint raises.
    """
    from gemma_mlx.files import write_whole

    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder; make it first")
    lines = []
    for line in table(specs(model), rank):
        click.echo(line)
        lines.append(line)
    if out is not None:
        write_whole(out, ("\n".join(lines) + "\n").encode())


def specs(model: str | None) -> dict[str, Any]:
    """Name -> spec of what the table is of."""
    from gemma_mlx.catalog import CHECKPOINTS
    from gemma_mlx.models.load import resolve
    from gemma_mlx.spec import read_spec

    if model is not None:
        return {Path(model).name: read_spec(resolve(model))}
    return {name: read_spec(config) for name, config in CHECKPOINTS.items()}


def table(found: dict[str, Any], rank: int) -> Iterator[str]:
    """The lines: what is assumed, the setting for each Mac, the peak of each setting."""
    from gemma_mlx.machine import describe
    from gemma_mlx.typical import CLIP_SECONDS, IMAGE_TOKENS, LABELS, TEXT_TOKENS

    yield "# Memory of a fine-tuning run"
    yield ""
    yield (
        "Estimated peak in GB (10⁹ bytes) of MLX's arrays in a training step: a row of "
        f"{TEXT_TOKENS} text tokens ({LABELS} of them with a label), one clip of {CLIP_SECONDS} s and one picture of "
        f"{IMAGE_TOKENS} soft tokens where the checkpoint reads such; batch 1; LoRA of rank {rank} on the decoder; "
        "AdamW; frozen towers; the table of per-layer embeddings on disk. c: `--checkpoint-layers 1`; 8-bit and 4-bit: "
        "`--quantize`."
    )
    yield ""
    yield (
        "A Mac's usable memory is taken as what Metal recommends: two thirds up to 36 GB, three quarters above. "
        "Estimates follow MLX's CPU operations where no GPU is at hand, which keep more than Metal's fused ones: "
        f"here {describe()}. Written by `python -m gemma_mlx doctor --estimate --out docs/memory.md`."
    )
    yield ""
    yield f"| checkpoint | {' | '.join(f'{mac} GB ({usable(mac) / 1e9:.1f})' for mac in MACS)} |"
    yield "| --- " * (1 + len(MACS)) + "|"
    peaks = {}
    for name, spec in found.items():
        peaks[name] = peaks_of(spec, rank)
        yield f"| {name} | {' | '.join(choice(peaks[name], usable(mac)) for mac in MACS)} |"
    yield ""
    yield f"| checkpoint | {' | '.join(SETTINGS)} | table on disk |"
    yield "| --- " * (2 + len(SETTINGS)) + "|"
    for name, row in peaks.items():
        shown = " | ".join(f"{row[setting].peak / 1e9:.1f}" for setting in SETTINGS)
        yield f"| {name} | {shown} | {row['bf16'].disk / 1e9:.1f} |"


def peaks_of(spec: Any, rank: int) -> dict[str, Any]:
    """Setting -> estimate."""
    from gemma_mlx.estimate import estimate
    from gemma_mlx.lora import apply_lora
    from gemma_mlx.ops.device import assumed_gpu
    from gemma_mlx.skeleton import skeleton
    from gemma_mlx.typical import typical_batch

    found, batch = {}, typical_batch(spec)
    for name, setting in SETTINGS.items():
        model = skeleton(spec, quantize=setting.get("quantize"))
        apply_lora(model, "decoder", rank)
        with assumed_gpu():
            found[name] = estimate(model, batch, recompute=setting.get("recompute", 0))
    return found


def choice(peaks: dict[str, Any], limit: int) -> str:
    """The first setting that fits, with its peak."""
    fits = next((name for name in SETTINGS if peaks[name].peak <= limit), None)
    return "no" if fits is None else f"{fits} {peaks[fits].peak / 1e9:.1f}"
