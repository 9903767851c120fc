"""Gemma 3n's conversation format: Gemma 3's turns, with line breaks around every medium."""

from __future__ import annotations

from typing import Any

from gemma_mlx.data.template_gemma3 import DEFAULT_TEMPLATE as TEXT_TEMPLATE

IMAGE_SLOT, AUDIO_SLOT = "<image_soft_token>", "<audio_soft_token>"

DEFAULT_TEMPLATE = TEXT_TEMPLATE.replace(
    "{{- part.text | trim -}}",
    "{{- '<image_soft_token>' if part.type == 'image' else '<audio_soft_token>' if part.type == 'audio' else "
    "part.text | trim -}}",
)
"""For checkpoints that come without a template (the base models)."""


class WithBreaks:
    """A chat template whose media stand between two pairs of line breaks (transformers' ``Gemma3nProcessor``).

    They are put into the text, not among the ids, because they join with line breaks beside them into one token.
    """

    def __init__(self, template: Any, slots: tuple[str, ...]):
        self._template, self._slots = template, slots

    def render(self, *arguments: Any, **options: Any) -> str:
        """As `ChatTemplate.render`."""
        text = self._template.render(*arguments, **options)
        for slot in self._slots:
            text = text.replace(slot, f"\n\n{slot}\n\n")
        return text
