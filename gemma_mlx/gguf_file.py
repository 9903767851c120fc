"""GGUF files (llama.cpp's format) of Gemma 3: what a checkpoint folder's JSON files say, from the file's metadata.

Read through the package ``gguf`` (the extra ``gguf``). Names and conventions are those of llama.cpp's converter
(``convert_hf_to_gguf.py``, class ``Gemma3Model``).
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError

SUFFIX = ".gguf"
ARCHITECTURE = "gemma3"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens (llama.cpp's ``llama_token_type``)."""
RESERVED = ("<unused", "<mask>")
"""Beginnings of tokens that stand for nothing."""

LAYERS_OF_27B = 62  # its scores are scaled by the width of the stream, which no key says
_MARKER = re.compile(r"<(start|end)_of_\w+>")


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX


def open_gguf(path: str | Path) -> Any:
    """The file's ``gguf.GGUFReader`` (memory-mapped); the last one is kept.

    Raises:
        InputError: the package is missing, the file cannot be read or is cut off, or holds another model.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError:
        raise InputError(f"{path}: not found") from None
    return _open(str(path), size)


@lru_cache(maxsize=1)
def _open(path: str, size: int) -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path}: reading GGUF needs the package gguf: pip install 'gemma-mlx[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as e:
        raise InputError(f"{path}: not a readable GGUF file ({e}); download it again") from None
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if end > size:
        raise InputError(f"{path}: {size} bytes, but its tensors reach to {end}; download it again")
    found = value(reader, "general.architecture")
    if found != ARCHITECTURE:
        raise InputError(f"{path}: architecture {found!r}; GGUF files are read for {ARCHITECTURE!r} (Gemma 3) only")
    return reader


def value(reader: Any, key: str, default: Any = None) -> Any:
    """A metadata value, or the default where there is none."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config(path: str | Path) -> dict[str, Any]:
    """The file's metadata as the config.json of a ``gemma3_text`` checkpoint.

    Raises:
        InputError: as `open_gguf`, or a number is missing.
    """
    reader = open_gguf(path)

    def own(name: str, default: Any = None) -> Any:
        found = value(reader, f"{ARCHITECTURE}.{name}", default)
        if found is None:
            raise InputError(f"{path}: metadata {ARCHITECTURE}.{name} is missing; convert the model again")
        return found

    heads, hidden, layers = own("attention.head_count"), own("embedding_length"), own("block_count")
    head_dim = own("attention.key_length", 256)
    rows = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if rows is None:
        raise InputError(f"{path}: no tensor token_embd.weight; this file holds no whole model")
    pattern = own("attention.sliding_window_pattern", 6)
    types = None
    if isinstance(pattern, list):
        types = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    scaling = None
    if own("rope.scaling.type", "none") == "linear":
        scaling = {"rope_type": "linear", "factor": own("rope.scaling.factor")}
    return {
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden / heads if layers == LAYERS_OF_27B else head_dim,
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "sliding_window": own("attention.sliding_window"),
        "sliding_window_pattern": None if types else pattern,
        "layer_types": types,
        "rope_theta": own("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": own("rope.freq_base_swa", 10_000.0),
        "rope_scaling": scaling,
        "final_logit_softcapping": value(reader, f"{ARCHITECTURE}.final_logit_softcapping"),
        "max_position_embeddings": own("context_length", 32_768),
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id", 1),
        "pad_token_id": value(reader, "tokenizer.ggml.padding_token_id", 0),
    }


def chat_template(path: str | Path) -> str | None:
    """The chat template that the file carries, if any."""
    return value(open_gguf(path), "tokenizer.chat_template")


def tokenizer(path: str | Path) -> Any:
    """A ``tokenizers.Tokenizer`` that gives the ids of the checkpoint's own tokenizer.json.

    Raises:
        InputError: the file has no SentencePiece vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    reader = open_gguf(path)
    kind, tokens = value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.tokens")
    scores, kinds = value(reader, "tokenizer.ggml.scores"), value(reader, "tokenizer.ggml.token_type")
    if kind != "llama" or not tokens or scores is None or kinds is None or not len(tokens) == len(scores) == len(kinds):
        raise InputError(f"{path}: expected a SentencePiece vocabulary (tokenizer 'llama'), found {kind!r}")
    # The converter writes runs of spaces as spaces; everything else keeps SentencePiece's mark for a space.
    texts = [t.replace(" ", "▁") if k in (NORMAL, USER_DEFINED) else t for t, k in zip(tokens, kinds, strict=True)]
    vocabulary = {text: i for i, text in enumerate(texts)}
    model = models.BPE(
        vocab=vocabulary, merges=merges(texts, scores, kinds), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for special in (False, True):
        made.add_tokens(
            [
                AddedToken(text, special=special, normalized=False)
                for text, k in zip(texts, kinds, strict=True)
                if k in (UNKNOWN, CONTROL, USER_DEFINED) and _is_special(text, k) == special
            ]
        )
    return made


def _is_special(text: str, kind: int) -> bool:
    """Whether decoding leaves a token out: markers, not the unused ones or runs of white space."""
    return bool(_MARKER.fullmatch(text)) or (kind != USER_DEFINED and not text.startswith(RESERVED))


def merges(texts: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding merges, best first, from a SentencePiece vocabulary.

    Every way to cut a token into two tokens is one. They come by score; the converter gives user-defined tokens a very
    low one, but SentencePiece has them at 0, above all others. Ties go to the longer left, then right part.
    """
    known = {text for text, k in zip(texts, kinds, strict=True) if k in (NORMAL, USER_DEFINED)}
    found = []
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        if text not in known:
            continue
        own = 0.0 if kind == USER_DEFINED else score
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known:
                found.append((-own, -len(left), -len(right), left, right))
    found.sort(key=lambda pair: pair[:3])
    return [pair[3:] for pair in found]
