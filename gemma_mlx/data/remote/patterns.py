"""Names of many objects in one: ``shard-{000..127}.tar``, ``{train,extra}/*.tar``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma_mlx.errors import InputError

MAX_NAMES = 100_000
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_BRACES = 50


def expanded(pattern: str) -> list[str]:
    """The names that a pattern's braces stand for, in order; the last braces vary first.

    ``{000..127}`` counts (up or down, with the zeros of its ends), ``{a,b}`` lists, and both may stand in a list.
    Braces with neither dots nor a comma are part of the name, as in a shell.

    Raises:
        InputError: over `MAX_NAMES` names, a brace that is not closed, or a range of something else than numbers.
    """
    if pattern.count("{") > _BRACES:
        raise InputError(f"{pattern[:80]}…: has more than {_BRACES} braces; give fewer")
    names: list[str] = []
    for name in _expand(pattern, pattern):
        names.append(name)
        if len(names) > MAX_NAMES:
            raise InputError(f"{pattern}: stands for more than {MAX_NAMES:,} names; give fewer")
    return names


def _expand(text: str, pattern: str) -> Iterator[str]:
    start = text.find("{")
    if start < 0:
        yield text
        return
    end = _closing(text, start, pattern)
    head, inner, rest = text[:start], text[start + 1 : end], text[end + 1 :]
    choices = _choices(inner, pattern)
    if choices is None:
        head, choices = text[: start + 1], (f"{choice}}}" for choice in _expand(inner, pattern))
    for choice in choices:
        for tail in _expand(rest, pattern):
            yield f"{head}{choice}{tail}"


def _closing(text: str, start: int, pattern: str) -> int:
    """Where the brace that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise InputError(f"{pattern}: a {{ without its }}; write {{000..127}} or {{a,b}}")


def _choices(inner: str, pattern: str) -> Iterator[str] | None:
    """What the inside of braces stands for; None for itself."""
    if found := _RANGE.fullmatch(inner):
        first, last = found.groups()
        width = max(len(first), len(last)) if any(len(x) > 1 and x[0] == "0" for x in (first, last)) else 0
        step = 1 if int(first) <= int(last) else -1
        return (f"{i:0{width}d}" for i in range(int(first), int(last) + step, step))
    pieces = _split(inner)
    if len(pieces) > 1:
        return (choice for piece in pieces for choice in _expand(piece, pattern))
    if ".." in inner:
        raise InputError(f"{pattern}: {{{inner}}} is no range of numbers; write {{000..127}} or {{a,b}}")
    return None


def _split(inner: str) -> list[str]:
    """Pieces between the commas outside inner braces."""
    pieces, depth = [""], 0
    for c in inner:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += c
    return pieces
