"""One row's answer beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """A row and what the model said to it.

    Attributes:
        row_id: the row's name in reports.
        where: file and line.
        task: "transcript" or "answer": which scores it enters; "text" for a text without a question, which has a
            likelihood alone.
        reference: what is right.
        prediction: what was said.
        finish: "stop", or "length" where the answer was cut off at its most tokens.
        language, source: as the row says; "" where it does not.
        seconds: that its clips last; None without one.
        media: clips, pictures and videos.
        cells: columns that rows are grouped by.
        likelihood: (nats of the reference, its tokens, how many of them were the likeliest), where measured.
    """

    row_id: str
    where: str
    task: str
    reference: str
    prediction: str
    finish: str = "stop"
    language: str = ""
    source: str = ""
    seconds: float | None = None
    media: int = 0
    cells: Mapping[str, str] = field(default_factory=dict)
    likelihood: tuple[float, int, int] | None = None

    def facts(self) -> dict[str, Any]:
        """What `gemma_mlx.grouping.breakdown` reads."""
        own = {"language": self.language, "source": self.source, "duration": self.seconds, "media": self.media}
        return {**self.cells, **own, "reference": self.reference, "where": self.where, "task": self.task}
