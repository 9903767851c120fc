"""How far a quantized base is from the float one, part by part: prints the table of docs/quantized.md.

    python benchmarks/quantized_error.py --model gemma-3-270m.gguf --tokens 512 --windows 2

Text checkpoints with a tokenizer. The text is Python's own reference (`pydoc_data.topics`), unless --text names a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gemma_mlx  # noqa: F401  (OpenBLAS before mlx.core)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.models.families import build
from gemma_mlx.models.load import load
from gemma_mlx.models.quantize import quantize_model

PARTS = {"attention": ("self_attn",), "mlp": ("mlp",), "embeddings and head": ("embed_tokens",), "all": ()}


def windows(tokenizer, bos: int, text: str, length: int, count: int) -> np.ndarray:
    """int32 [count, length] of consecutive tokens, each row behind <bos>."""
    ids = tokenizer.encode(text[: 12 * length * count])[: (length - 1) * count]
    return np.concatenate([np.full((count, 1), bos), np.reshape(ids, (count, length - 1))], axis=1).astype(np.int32)


def log_probabilities(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits, log probabilities), float32 [N, V], of every position of every row."""
    logits = np.concatenate([np.array(model(input_ids=row[None]))[0] for row in ids])
    shifted = logits - logits.max(1, keepdims=True)
    return logits, shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def perplexity(log_p: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean cross entropy of each next token."""
    rows = log_p.reshape(*ids.shape, -1)[:, :-1]
    return float(np.exp(-np.take_along_axis(rows, ids[:, 1:, None], axis=-1).mean()))


def main() -> None:
    """Load, quantize each part in turn, compare, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    if options.text:
        text = options.text.read_text()
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    model, processor = load(options.model, dtype="float32")
    ids = windows(processor.tokenizer, model.spec.text.bos_token_id, text, options.tokens, options.windows)
    weights = tree_flatten(model.parameters())
    size = sum(w.nbytes for _, w in weights)
    logits, log_p = log_probabilities(model, ids)
    print(f"{ids.size} positions; standard deviation of the float logits {logits.std():.2f}\n")
    print("| packed | bits | bytes of float32 | rms error of logits | KL divergence | same argmax | perplexity |")
    print("|---|---|---|---|---|---|---|")
    print(f"| nothing | 32 | 100% | 0 | 0 | 100% | {perplexity(log_p, ids):.3f} |")
    for bits in (8, 6, 4):
        for name, parts in PARTS.items():
            packed = build(model.spec)
            packed.load_weights(weights)
            quantize_model(packed, bits, parts)
            held = sum(w.nbytes for _, w in tree_flatten(packed.parameters()))
            own, own_log_p = log_probabilities(packed, ids)
            kl = float((np.exp(log_p) * (log_p - own_log_p)).sum(1).mean())
            same = float((own.argmax(1) == logits.argmax(1)).mean())
            rms = float(np.sqrt(((own - logits) ** 2).mean()))
            print(
                f"| {name} | {bits} | {held / size:.0%} | {rms:.3f} | {kl:.4f} | {same:.1%} | "
                f"{perplexity(own_log_p, ids):.3f} |",
                flush=True,
            )
            del packed, own, own_log_p
            mx.clear_cache()


if __name__ == "__main__":
    main()
