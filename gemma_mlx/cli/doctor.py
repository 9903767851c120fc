"""`python -m gemma_mlx doctor`: what a checkpoint is, what can be trained in it, and why it would not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import field_options
from gemma_mlx.errors import InputError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@field_options("model", "dtype", "rank")
@click.option("--read-weights", is_flag=True, help="Read every weight and look for values that are not finite.")
@click.option("--parity", is_flag=True, help="Compare with transformers on a text, a picture and a clip.")
@click.option("--device", metavar="NAME", help="With --parity: torch's device; default: mps if there is one, or cpu.")
@click.option("--audio", type=FILE, help="With --parity: a recorded clip, in place of the built-in one.")
@click.option("--text", help="With --parity: what is said in it.")
@click.option("--image", type=FILE, help="With --parity: a picture, in place of the built-in one.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --parity or --kernels: a JSON file to post; with --estimate: Markdown.",
)
@click.option("--kernels", is_flag=True, help="Test and time every kernel of this library on this machine's GPU.")
@click.option("--estimate", is_flag=True, help="Which Mac trains which checkpoint (or --model) with which settings.")
def command(
    model: str | None,
    dtype: str | None,
    rank: int,
    read_weights: bool,
    parity: bool,
    kernels: bool,
    estimate: bool,
    **compared: Any,
) -> int | None:
    """Describe a checkpoint; exits with 2 if it would not load.

    With --parity the checkpoint is run here and in transformers (--dtype float32 where its weights fit into memory),
    and every part's difference stands beside transformers' own rounding noise: 0 if all are within bound, else 1.

    With --kernels every kernel runs against plain MLX and is timed: 0 if all are within tolerance, 1 if one is not, 2
    where none runs.

    With --estimate nothing is loaded: tables of the memory that a typical run takes, from the checkpoints' shapes.
    """
    from gemma_mlx import machine
    from gemma_mlx.inspection import examine
    from gemma_mlx.models.load import resolve

    allowed = tuple(compared) if parity else ("out",) if estimate or kernels else ()
    if given := [f"--{name}" for name, value in compared.items() if value is not None and name not in allowed]:
        raise InputError(f"{given[0]} goes with --parity")
    if estimate:
        from gemma_mlx.cli.estimate import run as show_estimates

        show_estimates(model, rank, compared["out"])
        return None
    click.echo(f"machine: {machine.describe()}")
    if kernels:
        from gemma_mlx.cli.kernels import run as test_kernels

        return test_kernels(compared["out"])
    if model is None:
        if parity:
            raise InputError("--parity needs --model: the checkpoint's folder or Hub id")
        return None
    if parity:
        from gemma_mlx.cli.parity import run

        folder = resolve(model)
        name = folder.name if Path(model).expanduser().exists() else f"{model} at {folder.name}"
        return run(folder, compared.pop("out"), dtype=dtype, transcript=compared.pop("text"), name=name, **compared)
    found = examine(resolve(model), dtype, rank, read_weights)
    for line in report(found, rank):
        click.echo(line)
    if found.problems:
        more = f" ({len(found.problems) - 1} more above)" if len(found.problems) > 1 else ""
        raise InputError(f"{found.problems[0]}{more}")
    click.echo("it loads")
    return None


def report(found: Any, rank: int) -> list[str]:
    """The lines of the report."""
    from gemma_mlx.inspection import Part, size_text

    lines = [f"model: {found.model}"]
    if found.family:
        lines += [f"what it is: {found.family}", *found.facts]
    if found.parts:
        total = Part()
        for part in found.parts.values():
            total.tensors, total.weights = total.tensors + part.tensors, total.weights + part.weights
            total.bytes += part.bytes
            total.packed = {bits: total.packed[bits] + size for bits, size in part.packed.items()}
        rows = [("part", "tensors", "parameters", "in memory", "--quantize 8", "--quantize 4")]
        for name, part in [*found.parts.items(), ("all", total)]:
            sizes = (part.bytes, part.packed[8], part.packed[4])
            rows.append((name, f"{part.tensors:,}", f"{part.weights:,}", *map(size_text, sizes)))
        lines += ["", *_aligned(rows), ""]
        rows = [("--targets", "layers", f"adapter weights at --rank {rank}")]
        rows += [(name, f"{layers:,}", f"{weights:,}") for name, (layers, weights) in found.trainable.items()]
        lines += [*_aligned(rows), ""]
        rows = [("--full", "modules", "weights")]
        rows += [(name, f"{modules:,}", f"{weights:,}") for name, (modules, weights) in found.full.items()]
        lines += [*_aligned(rows), ""]
        if found.by_name:
            lines.append(f"trainable if named in --targets: {', '.join(found.by_name)}")
        lines.append(f"never trained: {', '.join(found.frozen)}")
    return [*lines, *(f"problem: {problem}" for problem in found.problems)]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip
