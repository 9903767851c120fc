"""Flags of the commands, derived from the fields of ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from gemma_mlx.config import FIELDS, TrainConfig, convert
from gemma_mlx.data.remote.lazy import LazyFetcher

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
METAVARS = {"text": "TEXT", "int": "N", "float": "X", "list": "TEXT", "mapping": "NAME=COLUMN"}


def flag_name(name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def field_option(name: str, fill: bool = True, **overrides: Any) -> Decorator:
    """The flag of one config field.

    With ``fill`` the command receives a converted value, the field's default included; without, the text as typed or
    None, so that the caller can tell what was given. ``overrides`` go to ``click.option``.
    """
    f, rules = FIELDS[name], FIELDS[name].metadata
    kind, default = rules["kind"], getattr(TrainConfig(), name)
    shown = "" if default in (None, False, [], {}) else f"  [default: {default:g}]" if kind == "float" else None
    shown = f"  [default: {default}]" if shown is None else shown

    def filled(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        value = None if value == () else value
        if not fill:
            return value
        return default if value is None else convert(f, value, flag_name(name))

    arguments: dict[str, Any] = {"callback": filled, "help": rules["help"] + shown}
    if not overrides.get("required"):  # click takes an explicit None for a value
        arguments["default"] = None
    if kind == "flag":
        arguments["is_flag"] = True
    else:
        choices = "|".join(map(str, rules["choices"]))
        arguments |= {"type": str, "metavar": choices or METAVARS[kind], "multiple": kind in ("list", "mapping")}
    return click.option(flag_name(name), name, **(arguments | overrides))


def field_options(*names: str, fill: bool = True) -> Decorator:
    """The flags of several fields, in this order on the help page."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            function = field_option(name, fill)(function)
        return function

    return decorate


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--model`` (required), ``--adapter``, ``--adapter-weight`` and how to load them: model, adapter (None or a tuple
    of names), adapter_weights (likewise), dtype, audio_window, quantize, allow_unexpected."""
    function = field_options("dtype", "audio_window", "quantize", "allow_unexpected")(function)
    function = adapter_options(function)
    return field_option("model", required=True)(function)


def _none_if_empty(_context: click.Context, _parameter: click.Parameter, value: tuple[Any, ...]) -> Any:
    return value or None


def adapter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--adapter`` and ``--adapter-weight``: adapter and adapter_weights, None or a tuple each."""
    function = click.option(
        "--adapter-weight", "adapter_weights", multiple=True, type=float, metavar="X", callback=_none_if_empty,
        help="What an adapter counts, one for each in order; default: 1.",
    )(function)  # fmt: skip
    return click.option(
        "--adapter", multiple=True, metavar="FOLDER", callback=_none_if_empty,
        help="Adapter (of a run, PEFT, mlx-lm or mlx-vlm; a Hub id too); of several the weighted sum; without it the "
        "base.",
    )(function)  # fmt: skip


def fetcher_of(named: Iterable[str], options: dict[str, Any]) -> LazyFetcher:
    """What reads data far away, by the flags ``allow_host`` and ``media_cache_…``, which are taken out of ``options``;
    hosts of what the user named may have private addresses."""
    return LazyFetcher(
        named, hosts=options.pop("allow_host"), folder=options.pop("media_cache_dir"),
        limit_bytes=int(options.pop("media_cache_gb") * 1e9),
    )  # fmt: skip


DATA_OPTIONS = tuple(n for n, f in FIELDS.items() if f.metadata["group"] == "data" and n != "train_on")
"""How rows are read, beside where they are."""

data_options = field_options(*DATA_OPTIONS)
"""How rows are read: media_root, column, audio_prompt, image_prompt, system, image_tokens, long_audio."""
