"""``python -m gemma_mlx VERB`` and ``gemma-mlx VERB``."""

from __future__ import annotations

import importlib
import sys

import click

from gemma_mlx.cli.door import enter

VERBS = {
    "train": ("gemma_mlx.train", "Fine-tune a model on rows of any kind."),
    "evaluate": ("gemma_mlx.cli.evaluate", "Score a model on rows with answers."),
    "prepare": ("gemma_mlx.cli.prepare", "Check, convert, split and download data, without a model."),
    "doctor": ("gemma_mlx.cli.doctor", "Describe a checkpoint: parts, sizes, what trains, why it would not load."),
    "generate": ("gemma_mlx.cli.generate", "Answer a prompt about text, sound and pictures."),
    "export": ("gemma_mlx.cli.export", "Write what was trained for Hugging Face, PEFT, mlx-lm or llama.cpp."),
}
"""Verb -> the module that holds its ``command``, and one line for the help page."""


class Verbs(click.Group):
    """A group that imports a verb's module only when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(VERBS[cmd_name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-mlx")
def verbs() -> None:
    """Fine-tune Gemma on audio, images and text with LoRA, in MLX."""


def main() -> None:
    """Entry point of the ``gemma-mlx`` script."""
    sys.exit(enter(verbs, name="gemma-mlx"))


if __name__ == "__main__":
    main()
