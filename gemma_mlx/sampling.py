"""How a token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How answers are made. Temperature 0 takes the likeliest token.

    Attributes:
        max_tokens: the most tokens of an answer.
        temperature, top_p, top_k, min_p: of mlx-lm's sampling chain.
        repetition_penalty: above 1 for less of what the last ``repetition_context`` tokens hold; 1 changes nothing.
        repetition_context: tokens, the prompt's among them, that the penalty looks at.
        stop: texts that end an answer, which holds what is before them.
        seed: makes sampling repeatable.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    stop: tuple[str, ...] = ()
    seed: int | None = None
