"""`python -m gemma_mlx generate`: answer one prompt about text, sound and pictures."""

from __future__ import annotations

from pathlib import Path

import click

from gemma_mlx.cli.options import field_option, model_options

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@model_options
@field_option("image_tokens")
@field_option("long_audio")
@click.option("--prompt", help="What to ask; default with a clip: transcribe it.")
@click.option("--system", help="System turn before the prompt.")
@click.option("--image", "images", multiple=True, type=FILE, help="A picture, before the prompt; repeatable.")
@click.option("--audio", "clips", multiple=True, type=FILE, help="A clip, after the prompt; repeatable.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Nucleus sampling.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="Only the k likeliest; 0: all.")
@click.option("--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="As a share of the top.")
@click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable.")
def command(
    model,
    adapter,
    dtype,
    audio_window,
    allow_unexpected,
    image_tokens,
    long_audio,
    prompt,
    system,
    images,
    clips,
    **how,
):
    """Print the model's answer to one prompt."""
    from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE
    from gemma_mlx.data.processor import Processor
    from gemma_mlx.generation import generate
    from gemma_mlx.models.load import load

    prompt = prompt or (TRANSCRIBE if clips else DESCRIBE if images else None)
    if prompt is None:
        raise click.UsageError("nothing to answer: give --prompt, --image or --audio")
    content = [{"type": "image", "image": path} for path in images]
    content += [{"type": "text", "text": prompt}]
    content += [{"type": "audio", "audio": path} for path in clips]
    messages = [{"role": "system", "content": system}] if system else []
    dtype = None if dtype == "auto" else dtype
    loaded, processor = load(
        model, adapter=adapter, dtype=dtype, allow_unexpected=allow_unexpected, audio_window=audio_window
    )
    processor = Processor(processor.folder, processor.spec, image_tokens=image_tokens, long_audio=long_audio)
    [answer] = generate(loaded, processor, [[*messages, {"role": "user", "content": content}]], **how)
    click.echo(answer)
