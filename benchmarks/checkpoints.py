"""Prints the table of docs/checkpoints.md: every published checkpoint's parts and bytes, from shapes alone.

    python benchmarks/checkpoints.py
"""

import mlx.core as mx

import gemma_mlx.blas  # noqa: F401  before mlx.core
from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.inspection import parts_of_model
from gemma_mlx.models.families import build
from gemma_mlx.spec import read_spec

COLUMNS = {
    "decoder": ("attention", "mlp", "experts", "norms and the rest"),
    "embeddings": ("embeddings (and head)",),
    "per-layer table": ("per-layer embeddings",),
    "vision": ("vision tower", "vision embedder"),
    "audio": ("audio tower", "audio embedder"),
}


def row(name: str, config: dict) -> list[str]:
    """One line: media, parameters by part in millions, gigabytes in bfloat16 and with the decoder at 8 and 4 bits."""
    spec = read_spec(config)
    model = build(spec)
    model.set_dtype(mx.bfloat16)
    parts = parts_of_model(model)
    media = ["text", *(["pictures"] if spec.vision else []), *(["speech"] if spec.audio else [])]
    if config["model_type"] in ("gemma4", "gemma4_unified"):
        media.append("video")
    millions = [sum(parts[p].weights for p in names if p in parts) / 1e6 for names in COLUMNS.values()]
    sizes = [sum(p.bytes for p in parts.values()), *(sum(p.packed[bits] for p in parts.values()) for bits in (8, 4))]
    counted = [f"{m:,.0f}" if m else "" for m in millions]
    return [name, ", ".join(media), f"{sum(millions) / 1e3:.3f}", *counted, *(f"{size / 1e9:.2f}" for size in sizes)]


def table() -> str:
    """All of them, as Markdown."""
    counts = ("parameters, 10⁹", *(f"{c}, 10⁶" for c in COLUMNS))
    heads = ["checkpoint", "reads", *counts, "GB in bf16", "8 bits", "4 bits"]
    lines = [heads, ["---"] * len(heads), *(row(name, config) for name, config in CHECKPOINTS.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(table())
