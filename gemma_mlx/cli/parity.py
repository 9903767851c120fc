"""What `doctor --parity` prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_mlx.errors import InputError

if TYPE_CHECKING:
    from gemma_mlx.parity import Modality, Parity, Part

WORDS = {
    "input_ids": "token ids",
    "mm_token_type_ids": "token types",
    "pixel_values": "pixels",
    "image_position_ids": "places of patches",
    "input_features": "audio features",
    "vision_tower": "vision tower",
    "audio_tower": "audio tower",
    "embed_vision": "vision embedder",
    "embed_audio": "audio embedder",
    "embeddings": "embeddings",
    "norm": "hidden states",
    "logits": "logits",
}
KINDS = {"text": "text", "image": "picture", "audio": "clip"}
CAPTION = """difference: the largest, ours from transformers'. noise: transformers' from itself, computed otherwise.
size: root mean square. Of the decoder's layers: the first beyond its bound, else the nearest to it.
"""


def run(folder: Path, out: Path | None, **options: Any) -> int:
    """Compare, print, write; returns the exit code: 0 within bound, 1 beyond.

    Raises:
        InputError: `out` cannot be written, or what `compare` raises.
    """
    from gemma_mlx.files import write_whole
    from gemma_mlx.parity import compare

    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder; make it first")
    result = compare(folder, **options, say=lambda text: click.echo(f"… {text}", err=True))
    show(result)
    if out is not None:
        write_whole(out, (json.dumps(result.as_json(), indent=2) + "\n").encode())
        click.echo(f"written: {out}")
    return 0 if result.within else 1


def name_of(part: str) -> str:
    """``layers.3`` -> "decoder layer 3"."""
    return WORDS.get(part, part.replace("layers.", "decoder layer "))


def show(result: Parity) -> None:
    """The table and the verdicts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    facts = result.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.print(f"model: {facts['model']} ({facts['model_type']}), {facts['dtype']} ({facts['dtype_why']})")
    console.print(f"{versions}; {facts['machine']}; torch on {facts['device']}")
    table = Table("", "part", "difference", "noise", "bound", "size", "", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(table.columns):
        column.no_wrap, column.justify = True, "right" if 2 <= i < 6 else "left"
    for modality in result.modalities:
        for i, part in enumerate([*modality.inputs, *_rows(modality.parts)]):
            noise = "" if part in modality.inputs else f"{part.noise:.1e}"
            figures = f"{part.difference:.1e}", noise, f"{part.bound:.1e}", f"{part.size:.3g}"
            kind = KINDS[modality.kind] if i == 0 else ""
            table.add_row(kind, name_of(part.name), *figures, "" if part.within else "BEYOND")
        table.add_section()
    console.print(table)
    console.print(CAPTION)
    for line in verdicts(result):
        console.print(line)


def _rows(parts: list[Part]) -> list[Part]:
    """One row for all decoder layers: the first beyond its bound, else the one that comes nearest to it."""
    layers = [part for part in parts if part.name.startswith("layers.")]
    beyond = [part for part in layers if not part.within]
    nearest = beyond[0] if beyond else max(layers, key=lambda part: part.difference / part.bound if part.bound else 0)
    return [part for part in parts if part not in layers or part is nearest]


def verdicts(result: Parity) -> list[str]:
    """A line for each modality, and what the open questions come to."""
    lines = [line for modality in result.modalities for line in _verdict(modality)]
    lines += _open("audio window", "keys", result.windows)
    lines += _open("a picture that sees itself whole", "layers", result.runs)
    return lines


def _open(what: str, unit: str, found: dict[str, dict[str, float]]) -> list[str]:
    """What an open question comes to: the loss either way, and which way transformers goes."""
    if not found:
        return []
    nearest = min(found, key=lambda name: found[name]["difference"])
    lines = [f"{what}: transformers computes {nearest} {unit}"]
    losses = {name: figures["loss"] for name, figures in found.items() if "loss" in figures}
    if len(losses) == 2:
        told = ", ".join(f"{loss:.4f} with {name} {unit}" for name, loss in losses.items())
        (a, first), (b, second) = losses.items()
        lower = f"lower with {a if first < second else b}, by {abs(first - second):.4f}"
        lines.append(f"{what}: loss on the answer {told}: {lower if first != second else 'no difference'}")
    return lines


def _verdict(modality: Modality) -> list[str]:
    kind = KINDS[modality.kind]
    loss = ", ".join(f"{who} {value:.6f}" for who, value in modality.loss.items())
    loss = f"; loss on the answer: {loss}" if loss else ""
    state = "within bound"
    if modality.beyond:
        state = f"BEYOND the bound, first in: {' and in: '.join(map(name_of, modality.beyond))}"
    return [
        f"{kind} ({modality.source}, {modality.tokens:,} tokens): {state}{loss}",
        *(f"{kind}: {note}" for note in modality.notes),
    ]
