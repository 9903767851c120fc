"""What the commands that use a trained model share: load it, and read rows the way its run did."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from gemma_mlx.cli.options import fetcher_of
from gemma_mlx.data.examples import Prompts
from gemma_mlx.data.processor import Processor
from gemma_mlx.lora import remembered_options
from gemma_mlx.models.load import check_finite, load


def given_flags() -> set[str]:
    """Parameters of the running command that the user gave."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}


def load_model_and_rows(options: dict[str, Any]) -> tuple[Any, Processor, dict[str, Any]]:
    """(model, processor, how to read rows) from a command's flags, which are taken out of ``options``.

    A flag that was not given has the value that the adapter's run had, where the adapter remembers it: an answer is
    only right to the question that was trained.
    """
    given = given_flags()
    for name, value in remembered_options(options["adapter"], given).items():
        if name in options and name not in given:
            options[name] = value
    names = ("model", "adapter", "adapter_weights", "dtype", "allow_unexpected", "audio_window", "quantize")
    model, processor = load(**{name: options.pop(name) for name in names}, image_tokens=options["image_tokens"])
    check_finite(model, processor.folder)
    names = ("image_tokens", "long_audio")
    processor = Processor(processor.folder, processor.spec, **{name: options.pop(name) for name in names})
    return model, processor, reading_of(options)


def reading_of(options: dict[str, Any]) -> dict[str, Any]:
    """How to read rows (arguments of `gemma_mlx.data.rows.Rows`) from flags, which are taken out of ``options``."""
    prompts = Prompts(*(options.pop(name, None) for name in ("audio_prompt", "image_prompt", "system")))
    reading = {"media_roots": options.pop("media_root", ()), "columns": options.pop("columns", {}), "prompts": prompts}
    reading |= {new: options.pop(name) for new, name in _SAME if name in options}
    if "media_cache_gb" in options:
        named = [click.get_current_context().params.get("data") or "", *reading["media_roots"]]
        reading["fetcher"] = fetcher_of(named, options)
    return reading


_SAME = (("lines", "text_rows"), ("patches", "patches"), ("language_mode", "language_mode"))
