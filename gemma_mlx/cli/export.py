"""``python -m gemma_mlx export``: what was trained, in the form that another program reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from gemma_mlx.cli.options import adapter_options
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.manifest import bytes_of, verify
from gemma_mlx.exporting.options import FORMATS
from gemma_mlx.progress import Reporter, megabytes

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How it is written: fields of `ExportOptions`."""
    for option in reversed(
        (
            click.option(
                "--dtype", type=click.Choice(("float32", "bfloat16", "float16")),
                help="Of the written weights; default: the base's own.",
            ),
            click.option(
                "--bits", type=int, metavar="4|6|8", help="hf: pack the merged weights again, in MLX's layout."
            ),
            click.option(
                "--shard-gb", type=float, default=5.0, show_default=True, metavar="X",
                help="hf: the most of one safetensors file.",
            ),
            click.option(
                "--gguf-type", type=click.Choice(("f32", "f16", "bf16", "q8_0")),
                help="gguf: type of the weights; default: as --dtype.",
            ),
            click.option("--gguf-lora", is_flag=True, help="gguf: the adapter alone, as a LoRA for llama.cpp."),
            click.option("--mmproj/--no-mmproj", default=True, help="gguf: also the towers, where there are any."),
            click.option(
                "--merge-towers", is_flag=True,
                help="peft: the towers' layers are merged into a base that is written beside the adapter, for programs "
                "that adapt the decoder alone.",
            ),
            click.option(
                "--adapter-rank", type=click.IntRange(1), metavar="N",
                help="peft, mlx: bring layers to this rank at most, by their largest singular values.",
            ),
        )
    ):  # fmt: skip
        function = option(function)
    return function


@click.command()
@click.option("--run", metavar="FOLDER", help="A run's folder, finished or not.")
@click.option("--out", metavar="FOLDER", help="The folder to make.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="hf", show_default=True,
    help="hf: a merged checkpoint; peft, mlx: an adapter for PEFT or for mlx-lm and mlx-vlm; gguf: for llama.cpp.",
)  # fmt: skip
@click.option("--step", type=int, metavar="N", help="The run's checkpoint of this step, not its best adapter.")
@click.option("--model", metavar="FOLDER|ID", help="The base; without --run, or where the run's base has moved.")
@adapter_options
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of the base's Hub repository.")
@_options
@click.option("--scores", metavar="FOLDER", help="An evaluation's folder: its scores go into the model card.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export, once the new one is whole.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the folder to this Hub repository (organisation/name).")
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@click.option("--verify", "checked", metavar="FOLDER", help="Write nothing: check an export against its manifest.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings.")
def command(checked: str | None, form: str, shard_gb: float, **options: Any) -> int:
    """Write what was trained for other programs.

    From a run: its best adapter by validation; without validation the last one, of a run that is not finished that of
    its newest whole checkpoint. Or from --model and --adapter, or from --model alone.

    The folder appears whole or not at all. It gets a model card (README.md) and manifest.json with the digest of every
    file; --verify compares. Nothing is uploaded without --push-to-hub.
    """
    if checked is not None:
        return _verify(checked, options["quiet"])
    from gemma_mlx.exporting.run import export

    if options["private"] and options["push_to_hub"] is None:
        raise InputError("--private: concerns --push-to-hub; name the repository")
    adapters = options.pop("adapter")
    export(
        format=form, adapter=list(adapters) if adapters else None, shard_bytes=max(1, int(shard_gb * 1e9)), **options
    )
    return 0


def _verify(folder: str, quiet: bool) -> int:
    """Say what is wrong with an export; 2 where something is."""
    problems = verify(folder, megabytes(Reporter(quiet), "checked", bytes_of(folder)))
    for line in problems:
        print(f"{folder}: {line}", file=sys.stderr)
    if not problems and not quiet:
        print(f"{folder}: whole")
    return 2 if problems else 0
