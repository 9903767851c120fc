"""What llama.cpp's converter needs of a tokenizer, made from tokenizer.json where the checkpoint lacks it.

For Gemma 3 and 3n that is SentencePiece's ``tokenizer.model``: without it the converter takes the vocabulary for
GPT-2's. For Gemma 4 it is the list of merges, which llama.cpp refuses to do without.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import BYTE, CONTROL, NORMAL, RESERVED, UNKNOWN, USER_DEFINED

MODEL, FILE, MERGES = "tokenizer.model", "tokenizer.json", "merges.txt"
_BYTE_PAIRS = 2
_SPACE = "▁"
_SCORE = -1000.0


def complete(folder: Path, model_type: str) -> list[str]:
    """Make what is missing, in place; returns lines for the user.

    Args:
        folder: a checkpoint's folder that may be written to.
        model_type: of its config.json.

    Raises:
        InputError: there is no tokenizer, or one that llama.cpp has no form for.
    """
    own = model_type.startswith("gemma3")
    if own and (folder / MODEL).is_file():
        return []
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        model = content["model"]
        vocabulary, merges = model["vocab"], model["merges"]
    except FileNotFoundError:
        raise InputError(f"--format gguf: the base has no {FILE}, which llama.cpp's converter needs") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--format gguf: the base's {FILE} holds no byte-pair vocabulary with merges") from None
    if own:
        (folder / MODEL).write_bytes(sentencepiece(pieces(vocabulary, content.get("added_tokens") or [])))
        return []
    if merges:
        return []
    special = {token["content"] for token in content.get("added_tokens") or []}
    merges = whole_words(set(vocabulary) - special)  # beside tokenizer.json: `tokenizers` refuses parts of words there
    (folder / MERGES).write_text("".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")
    return [
        "the tokenizer knows whole words and has no merges; llama.cpp needs some, and got such as spell out each known "
        "word: it may cut unknown ones differently"
    ]


def pieces(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """(text, score, kind) by id, as in Gemma's tokenizer.model: of two merges the piece with the smaller id goes first.

    Raises:
        InputError: ids with gaps.
    """
    texts = {i: text for text, i in vocabulary.items()} | {token["id"]: token["content"] for token in added}
    special = {token["id"]: bool(token["special"]) for token in added}
    if sorted(texts) != list(range(len(texts))):
        raise InputError(f"--format gguf: the base's {FILE} leaves ids out; llama.cpp has no form for that")
    found, ordinary = [], 0
    for i in range(len(texts)):
        kind = _kind(texts[i], special.get(i))
        text = texts[i].replace(_SPACE, " ") if kind == USER_DEFINED else texts[i]
        found.append((text, float(-ordinary) if kind == NORMAL else 0.0 if kind == BYTE else _SCORE, kind))
        ordinary += kind == NORMAL
    return found


def _kind(text: str, special: bool | None) -> int:
    if text == "<unk>":
        return UNKNOWN
    if special or text.startswith(RESERVED):
        return CONTROL
    if special is False:
        return USER_DEFINED
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def sentencepiece(found: list[tuple[str, float, int]]) -> bytes:
    """A SentencePiece model of these pieces: byte pairs, bytes for what is unknown, nothing normalised."""
    ids = {text: i for i, (text, _, _) in enumerate(found)}
    trainer = [(3, _BYTE_PAIRS), (4, len(found)), (35, any(kind == BYTE for _, _, kind in found))]
    names = ((40, "<unk>"), (41, "<bos>"), (42, "<eos>"), (43, "<pad>"))
    trainer += [(number, ids.get(text, -1)) for number, text in names]
    normalizer = [(1, b"identity"), (3, False), (4, False), (5, True)]
    items: Iterable[tuple[int, bytes]] = (
        (1, message([(1, text.encode()), (2, score), (3, kind)])) for text, score, kind in found
    )
    return message([*items, (2, message(trainer)), (3, message(normalizer))])


def message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """Fields (number, value) in the wire format of protocol buffers: bytes, float32, or whole numbers."""
    return b"".join(part for number, value in fields for part in _field(number, value))


def _field(number: int, value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield from (_varint(number << 3 | 2), _varint(len(value)), value)
    elif isinstance(value, float):
        yield from (_varint(number << 3 | 5), struct.pack("<f", value))
    else:
        yield from (_varint(number << 3), _varint(int(value) & (1 << 64) - 1))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def whole_words(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build every word of a vocabulary letter by letter from its left, best first.

    A longer left part goes first, so that a word that was begun is finished; of two beginnings the one that would
    otherwise be torn by the other goes first.

    Raises:
        InputError: two words tear each other.
    """
    words = [word for word in vocabulary if len(word) > 1 and word.removeprefix(_SPACE).isalpha()]
    begun = {word[:2]: None for word in sorted(words)}
    order: TopologicalSorter[str] = TopologicalSorter({start: () for start in begun})
    for word in words:
        for at in range(1, len(word) - 1):
            if (inner := word[at : at + 2]) in begun and inner != word[:2]:
                order.add(inner, word[:2])
    try:
        starts = list(order.static_order())
    except CycleError as error:
        raise InputError(
            f"--format gguf: the base's tokenizer has no merges; its words leave no order for them ({error.args[1]})"
        ) from None
    longer = {(word[:n], word[n]) for word in words for n in range(2, len(word))}
    return [*sorted(longer, key=lambda pair: (-len(pair[0]), pair)), *((start[0], start[1]) for start in starts)]
