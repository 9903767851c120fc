"""A conversation as the rest of the library sees it: turns of text and media, wherever its row came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_mlx.data.blob import Medium


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text in a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a turn, by its file."""

    path: Medium


@dataclass(frozen=True, slots=True)
class Video:
    """A video in a turn, by its file; its sound is not heard."""

    path: Medium


@dataclass(frozen=True, slots=True)
class Audio:
    """A clip in a turn, by its file."""

    path: Medium


Part = Text | Image | Video | Audio


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says.

    Attributes:
        role: "system", "user", "model", or "tool" for what a tool gave back.
        parts: in reading order.
        extra: what else the chat template sees of the message: ``tool_calls``, ``reasoning``, ``name``, ….
        learned: false for a model turn that carries no loss whatever `train_on` says.
    """

    role: str
    parts: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learned: bool = True

    @property
    def text(self) -> str:
        """The texts of the parts as a template joins them: trimmed, without anything between."""
        return "".join(part.text.strip() for part in self.parts if isinstance(part, Text))


def system_turns(system: str | None) -> tuple[Turn, ...]:
    """A system turn, or none."""
    return (Turn("system", (Text(system),)),) if system else ()


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to learn from, or, where `completion` is true, one text to go on with.

    Attributes:
        turns: in order; a completion has one "model" turn with one `Text`.
        where: "train.csv:8", for messages.
        row_id: the row's name in reports.
        completion: the text stands alone, outside any chat template.
        task: "transcript" where the model is to write down what a clip says, else "answer": how it is scored.
        tools: what the model may call, as JSON schemas in the form of chat templates.
    """

    turns: tuple[Turn, ...]
    where: str = ""
    row_id: str = ""
    completion: bool = False
    task: str = "answer"
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def media(self) -> list[Image | Video | Audio]:
        """Pictures, videos and clips in reading order."""
        return [part for turn in self.turns for part in turn.parts if not isinstance(part, Text)]

    @property
    def reference(self) -> str:
        """The text of the last model turn: what a prediction is compared with ("" if there is none)."""
        turn = self.turns[-1] if self.turns and self.turns[-1].role == "model" else None
        return "".join(part.text for part in turn.parts if isinstance(part, Text)) if turn else ""
