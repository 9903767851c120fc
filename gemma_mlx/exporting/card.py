"""The model card of an export."""

from __future__ import annotations

from pathlib import Path

from gemma_mlx.exporting.options import ExportOptions, Source


def write_card(
    folder: Path, source: Source, form: str, options: ExportOptions, scores: str | Path | None = None
) -> None:
    """Write README.md."""
    (folder / "README.md").write_text(f"# {source.base_name}, fine-tuned\n", encoding="utf-8")
