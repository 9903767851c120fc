"""`python -m gemma_mlx generate`: answer one prompt, a file of prompts, or a person who chats."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import field_option, field_options, model_options
from gemma_mlx.errors import InputError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FORMATS = ("text", "timestamps", "srt", "vtt", "json")
BY_SUFFIX = {".srt": "srt", ".vtt": "vtt", ".json": "json"}
"""The form of a transcript whose --out has this suffix, where --format says nothing."""
STDIN = Path("-")
READING = ("media_root", "columns", "allow_host", "media_cache_gb", "media_cache_dir")


def sampling_options(function: Any) -> Any:
    """The flags of `gemma_mlx.sampling.Settings`."""
    share, count = click.FloatRange(0, 1), click.IntRange(1)
    flags = (
        click.option("--max-tokens", default=256, show_default=True, type=count, help="Longest answer."),
        click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: likeliest."),
        click.option("--top-p", default=1.0, show_default=True, type=share, help="Nucleus sampling."),
        click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="The k likeliest; 0: all."),
        click.option("--min-p", default=0.0, show_default=True, type=share, help="As a share of the top."),
        click.option(
            "--repetition-penalty", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True),
            help="Above 1: less of what was said lately.",
        ),
        click.option(
            "--repetition-context", default=20, show_default=True, type=count, help="Tokens that it looks back at."
        ),
        click.option("--stop", multiple=True, help="A text that ends an answer; repeatable."),
        click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
    )  # fmt: skip
    for flag in reversed(flags):
        function = flag(function)
    return function


def long_audio_options(function: Any) -> Any:
    """What happens to clips that are longer than the model hears."""
    flags = (
        field_option(
            "long_audio", type=click.Choice(["error", "truncate", "split"]), metavar=None,
            help="Clips over 30 s: stop with an error, keep the first 30 s, or transcribe them piece by piece, cut in "
            "pauses.  [default: error]",
            callback=lambda _context, _parameter, value: value or "error",
        ),
        click.option("--timestamps", is_flag=True, help="The same as --format timestamps."),
        click.option(
            "--format", "form", type=click.Choice(FORMATS),
            help="Transcribe --audio piece by piece, and write it so; default: as the suffix of --out says, else text.",
        ),
        click.option(
            "--piece-seconds", type=click.FloatRange(1), metavar="X",
            help="Longest piece; default: what the model hears.",
        ),
        click.option(
            "--edge-silence", nargs=2, type=click.FloatRange(0, 1), default=(0.25, 0.25), show_default=True,
            metavar="X Y", help="Seconds of silence that stay before a piece's first sound and behind its last.",
        ),
        click.option("--language", help="Language of the clip, for the default prompt: French."),
    )  # fmt: skip
    for flag in reversed(flags):
        function = flag(function)
    return function


@click.command()
@model_options
@field_options("image_tokens", "audio_prompt", "image_prompt", "system", *READING)
@click.option("--prompt", help="What to ask; default: --audio-prompt with a clip, --image-prompt with a picture.")
@click.option("--image", "images", multiple=True, type=FILE, help="A picture, before the prompt; repeatable.")
@click.option("--video", "videos", multiple=True, type=FILE, help="A video, before the prompt; repeatable.")
@click.option("--audio", "clips", multiple=True, type=FILE, help="A clip, after the prompt; repeatable.")
@click.option(
    "--prompts", "prompt_file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="JSONL of prompts, one a line; - for standard input. Media lie beside it or in --media-root.",
)  # fmt: skip
@click.option("--out", type=NEW_FILE, help="File for the answer, or the answers to --prompts; else stdout.")
@click.option(
    "--on-bad-row", default="stop", show_default=True, type=click.Choice(["stop", "skip"]),
    help="Bad lines of --prompts: stop before anything is answered, or write them with their error.",
)  # fmt: skip
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Prompts answered at a time.")
@click.option("--chat", is_flag=True, help="Talk to the model; the default where nothing is asked on a terminal.")
@click.option("--stream/--no-stream", default=None, help="Print the answer as it comes; default: on a terminal.")
@long_audio_options
@sampling_options
def command(prompt_file: str | None, chat: bool, **options: Any) -> None:
    """Answer one prompt about text, sound, pictures and videos; a file of prompts; or chat."""
    from gemma_mlx.sampling import Settings

    asked = [options[name] for name in ("prompt", "images", "videos", "clips")]
    if prompt_file is not None and (chat or any(asked)):
        raise click.UsageError("--prompts holds the prompts: leave out --prompt, --image, --video, --audio and --chat")
    talk = chat or (prompt_file is None and not any(asked) and sys.stdin.isatty())
    if prompt_file is None and not talk and not any(asked):
        raise click.UsageError("nothing to answer: give --prompt, --image, --video, --audio, --prompts or --chat")
    if talk and options["out"] is not None:
        raise click.UsageError("--out is for answers to --prompt and --prompts; in a chat, /save FILE writes it")
    given = {name: value for name, value in click.get_current_context().params.items() if name in _DECIDING}
    settings = Settings(**{name: options.pop(name) for name in Settings.__dataclass_fields__})
    if talk:
        _chat(settings, options)
    elif prompt_file is not None:
        _file(prompt_file, settings, options, given)
    else:
        _one(settings, options)


_DECIDING = (
    *("model", "adapter", "adapter_weights", "dtype", "audio_window", "quantize", "image_tokens", "audio_prompt"),
    *("image_prompt", "system", "columns", "language", "long_audio"),
)
"""Flags that decide the answers to a file of prompts, beside the settings."""


def _loaded(options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], bool]:
    """(model, processor, how to read rows, whether long clips are split); taken out of ``options``."""
    from gemma_mlx.cli.use import load_model_and_rows

    split = options["long_audio"] == "split"
    if split:
        options["long_audio"] = "error"
    return *load_model_and_rows(options), split


def _one(settings: Any, options: dict[str, Any]) -> None:
    """One prompt."""
    from gemma_mlx.data.turns import Example, system_turns
    from gemma_mlx.long_audio import is_too_long
    from gemma_mlx.prompting import user_turn

    out, form = options["out"], "timestamps" if options["timestamps"] else options["form"]
    alone = len(options["clips"]) == 1 and not options["images"] and not options["videos"]
    form = form or (BY_SUFFIX.get(out.suffix.lower()) if out and alone else None)
    if form and not alone:
        raise click.UsageError("--timestamps and --format are for one --audio without other media")
    model, processor, reading, split = _loaded(options)
    prompts = reading["prompts"]
    media = (options[name] for name in ("images", "videos", "clips"))
    turn = user_turn(options["prompt"], *media, prompts, options["language"])
    example = Example((*system_turns(prompts.system), turn))
    if form or (split and is_too_long(processor, example)):
        _transcribe(model, processor, example, settings, form or "text", options)
    else:
        _answer(model, processor, example, settings, options)


def _answer(model: Any, processor: Any, example: Any, settings: Any, options: dict[str, Any]) -> None:
    from gemma_mlx.generation import answers, stream

    out, streamed = options["out"], options["stream"]
    if streamed is None:
        streamed = out is None and sys.stdout.isatty()
    if streamed and out is None:
        for piece in stream(model, processor, example, settings):
            click.echo(piece, nl=False)
        click.echo()
        return
    [(_, answer)] = answers(model, processor, [example], settings, 1)
    _write(out, answer.text + "\n")
    if answer.finish == "length":
        click.echo(f"note: the answer ends at --max-tokens {settings.max_tokens}", err=True)


def _transcribe(model: Any, processor: Any, example: Any, settings: Any, form: str, options: dict[str, Any]) -> None:
    """A clip piece by piece; lines of time and text are printed as they come."""
    from gemma_mlx.long_audio import answer_in_pieces, line

    at_once = form == "timestamps" and options["out"] is None
    found = answer_in_pieces(
        model, processor, example, settings=settings, batch_size=options["batch_size"], **_pieces(options),
        on_piece=(lambda piece: click.echo(line(piece))) if at_once else _reached(),
    )  # fmt: skip
    if not at_once:
        _write(options["out"], found.written(form))
    if found.skipped_seconds >= 1:
        click.echo(f"note: {found.skipped_seconds:.1f} of {found.seconds:.1f} s are silent and were left out", err=True)
    if found.unfinished:
        first = ", ".join(str(i + 1) for i in found.unfinished[:5])
        click.echo(f"note: pieces {first} end at --max-tokens {settings.max_tokens}", err=True)


def _reached() -> Any:
    """Tells, every ten seconds, how far a transcript is."""
    import time

    from gemma_mlx.long_audio import stamp
    from gemma_mlx.progress import LINE_SECONDS

    told = time.monotonic()

    def tell(piece: Any) -> None:
        nonlocal told
        if time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            click.echo(f"transcribed to {stamp(piece.end_s)}", err=True)

    return tell


def _pieces(options: dict[str, Any]) -> dict[str, Any]:
    return {"piece_seconds": options["piece_seconds"], "edge_seconds": tuple(options["edge_silence"])}


def _write(out: Path | None, text: str) -> None:
    from gemma_mlx.files import write_whole

    if out is None:
        click.echo(text, nl=False)
        return
    try:
        write_whole(out, text.encode())
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror}); give another path") from None


def _file(name: str, settings: Any, options: dict[str, Any], given: dict[str, Any]) -> None:
    """A file of prompts."""
    if options["timestamps"] or options["form"]:
        raise click.UsageError("--timestamps and --format are for --audio; answers to --prompts have pieces with times")
    out = options["out"]
    out = None if out == STDIN else out
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder; make it first")
    if out is not None and name != "-" and out.exists() and os.path.samefile(out, name):
        raise InputError(f"--out {out} is the file of prompts; give another")
    with tempfile.TemporaryDirectory(prefix="gemma_mlx_") as folder:
        path = Path(name)
        if name == "-":
            path = Path(folder) / "prompts.jsonl"
            path.write_bytes(click.get_binary_stream("stdin").read())
        _answer_file(path, name, out, settings, options, given)


def _answer_file(
    path: Path, name: str, out: Path | None, settings: Any, options: dict[str, Any], given: dict[str, Any]
) -> None:
    from gemma_mlx.progress import Reporter
    from gemma_mlx.prompting import Answering, PromptFile, answer_file
    from gemma_mlx.signals import Interrupted

    model, processor, reading, split = _loaded(options)
    where = {"name": "standard input", "base": os.getcwd()} if name == "-" else {}
    prompts = PromptFile(path, **reading, **where)
    how = Answering(
        settings, options["batch_size"], _pieces(options) if split else None, options["on_bad_row"] == "skip"
    )
    progress = Reporter().counter("answering")
    try:
        told = answer_file(model, processor, prompts, out or sys.stdout, how, given, progress)
    except KeyboardInterrupt as stop:
        hint = f"; the same command goes on with {out}" if out else ""
        raise Interrupted(f"interrupted{hint}", getattr(stop, "signum", 2)) from None
    if out or told.bad or told.cut:
        counts = {"by an earlier call": told.before, "skipped as bad": told.bad, "ended at --max-tokens": told.cut}
        parts = [f"{told.answered} of {len(prompts)} lines", *(f"{n} {what}" for what, n in counts.items() if n)]
        click.echo(", ".join(parts) + (f": {out}" if out else ""), err=True)


def _chat(settings: Any, options: dict[str, Any]) -> None:
    """A person on a terminal, or lines from a pipe."""
    from gemma_mlx.cli.chat import Chat
    from gemma_mlx.cli.use import given_flags
    from gemma_mlx.lora import remembered_options

    given = given_flags()
    trained = remembered_options(options["adapter"], given)
    names = ("audio_window", "quantize")
    loaded = {name: options[name] if name in given else trained.get(name, options[name]) for name in names}
    language = options["language"]
    model, processor, reading, _ = _loaded(options)
    prompts = reading["prompts"]
    Chat(model, processor, settings, prompts, given=given, language=language, loaded=loaded).run()
