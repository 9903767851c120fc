"""The door ``python -m gemma_mlx.train``: read the flags, call ``gemma_mlx.loop``, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from gemma_mlx.cli.door import enter
from gemma_mlx.cli.options import field_options, flag_name
from gemma_mlx.config import FIELDS, configure, read_yaml
from gemma_mlx.errors import InputError


@click.command(name="train", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@field_options(*FIELDS, fill=False)
@click.option("--config", metavar="FILE", help="YAML file of options, named as the flags; flags win over it.")
@click.option("--demo", is_flag=True, help="The built-in example, offline: a tiny model learns new words and digits.")
def command(config: str | None, demo: bool, **flags: Any) -> None:
    """Fine-tune Gemma with LoRA on rows of sounds, pictures and texts."""
    values, labels = merge(config, flags)
    if demo:
        run_demo(values, labels)
        return
    from gemma_mlx.loop import train

    train(configure(values, labels))


def merge(config: str | None, flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(options given, what messages call each): the file's, with the flags' on top."""
    values = read_yaml(config) if config else {}
    labels = {name: f"{config}: {name}" for name in values}
    given = {name: value for name, value in flags.items() if value is not None}
    return {**values, **given}, {**labels, **{name: flag_name(name) for name in given}}


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Command-line words -> options given and their labels, as ``configure`` takes them."""
    params = dict(command.make_context("train", list(arguments)).params)
    params.pop("demo")
    return merge(params.pop("config"), params)


def run_demo(values: dict[str, Any], labels: dict[str, str]) -> None:
    """The embedded example; it takes no option but ``--out``."""
    if other := next((name for name in values if name != "out"), None):
        raise InputError(f"{labels[other]}: the demo has its own settings; only --out can be given beside --demo")
    from gemma_mlx.demo.run import main as demo

    demo(out=values.get("out"), quiet=False)


def main() -> None:
    """Entry point; exits with 0, 2 for bad input, 130 or 143 after a signal."""
    sys.exit(enter(command, name="python -m gemma_mlx.train"))


if __name__ == "__main__":
    main()
