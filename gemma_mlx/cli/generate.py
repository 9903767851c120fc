"""`python -m gemma_mlx generate`: answer one prompt about text, sound, pictures and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_mlx.cli.options import field_options, model_options

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@model_options
@field_options("image_tokens", "long_audio", "audio_prompt", "image_prompt", "system")
@click.option("--prompt", help="What to ask; default: --audio-prompt with a clip, --image-prompt with a picture.")
@click.option("--image", "images", multiple=True, type=FILE, help="A picture, before the prompt; repeatable.")
@click.option("--video", "videos", multiple=True, type=FILE, help="A video, before the prompt; repeatable.")
@click.option("--audio", "clips", multiple=True, type=FILE, help="A clip, after the prompt; repeatable.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Nucleus sampling.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="Only the k likeliest; 0: all.")
@click.option("--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="As a share of the top.")
@click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable.")
def command(
    prompt: str | None, images: tuple[Path, ...], videos: tuple[Path, ...], clips: tuple[Path, ...], **options: Any
) -> None:
    """Print the model's answer to one prompt."""
    from gemma_mlx.cli.use import load_model_and_rows
    from gemma_mlx.data.examples import DESCRIBE, DESCRIBE_VIDEO, TRANSCRIBE
    from gemma_mlx.generation import generate

    if prompt is None and not images and not videos and not clips:
        raise click.UsageError("nothing to answer: give --prompt, --image, --video or --audio")
    model, processor, reading = load_model_and_rows(options)
    prompts = reading["prompts"]
    describe = prompts.image or (DESCRIBE if images else DESCRIBE_VIDEO)
    prompt = prompt or (prompts.audio or TRANSCRIBE if clips else describe)
    content = [{"type": "image", "image": path} for path in images]
    content += [{"type": "video", "video": path} for path in videos]
    content += [{"type": "text", "text": prompt}]
    content += [{"type": "audio", "audio": path} for path in clips]
    messages = [{"role": "system", "content": prompts.system}] if prompts.system else []
    [answer] = generate(model, processor, [[*messages, {"role": "user", "content": content}]], **options)
    click.echo(answer)
