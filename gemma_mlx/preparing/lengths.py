"""Rows' lengths in tokens: counted with a checkpoint's tokenizer and template, or estimated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_mlx.data.examples import Example, Text
from gemma_mlx.errors import InputError
from gemma_mlx.preparing.check import Seen
from gemma_mlx.spec import SAMPLE_RATE, audio_soft_tokens, image_soft_tokens

BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token of Gemma's, about: 4 letters of English, a character and a third of Chinese."""
TURN_TOKENS, FRAMES, FRAME_TOKENS, IMAGE_TOKENS = 5, 32, 70, 280
"""Around a turn; frames of a video, soft tokens of each; the most soft tokens of a picture."""
_FILES = ["*.json", "*.jinja", "*.model"]

TokenCount = Callable[[Example, list[Seen]], int]


def estimated(image_tokens: int | None = None) -> TokenCount:
    """A rough length from characters and media, where there is no tokenizer."""

    def count(example: Example, media: list[Seen]) -> int:
        texts = [p.text for turn in example.turns for p in turn.parts if isinstance(p, Text)]
        total = TURN_TOKENS * len(example.turns) + sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts)
        for seen in media:
            if seen.kind == "audio":
                total += 2 + audio_soft_tokens(round(seen.seconds * SAMPLE_RATE))
            elif seen.kind == "image":
                total += 2 + image_soft_tokens(*seen.size, image_tokens or IMAGE_TOKENS)
            else:
                total += FRAMES * (5 + image_soft_tokens(*seen.size, FRAME_TOKENS))
        return total

    return count


def counted(model: str, **options: Any) -> TokenCount:
    """The length that training sees, from a checkpoint's tokenizer, template and config; weights are never read.

    Args:
        model: the checkpoint's folder or Hub id.
        options: of `gemma_mlx.data.processor.Processor`.

    Raises:
        InputError: there is no such checkpoint, or it has no tokenizer.
    """
    from gemma_mlx.data.processor import Processor

    processor = Processor(checkpoint_folder(model), **options)
    _ = processor.tokenizer.control_tokens  # a missing tokenizer is no row's fault

    def count(example: Example, media: list[Seen]) -> int:
        return len(processor.sample(example, with_features=False).input_ids)

    return count


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint's small files; of a Hub id only these are fetched.

    Raises:
        InputError: neither a folder nor a repository that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise InputError(f"model {model}: no such folder, and not a Hub id (organisation/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except Exception as e:  # offline, gated, unknown: huggingface_hub has a dozen classes for these
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {model}: not a local folder, and the Hub did not give it ({reason})") from None
