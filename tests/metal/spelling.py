"""What Metal refuses and C++ takes: pointers and references that name no address space, variables of the program."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TYPES = (
    r"(?:float|half|bfloat|int|uint|short|ushort|char|uchar|long|ulong|bool)(?:[234])?"
    r"|(?:bfloat16|float16|u?int(?:8|16|32|64)|size)_t|simdgroup_matrix<[^<>]*>"
)
_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")
_TEMPLATE_TYPE = re.compile(r"\b(?:typename|class)\s+(\w+)")
_PROGRAM = re.compile(r"^\s*(?:static\s+|inline\s+)*(?:constexpr|const)\b[^(]*=")


def _code(text: str) -> str:
    """Comments and strings blanked, lines kept."""
    pattern = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _pointers(code: str, types: str) -> Iterator[int]:
    """Where a pointer or a reference to one of the types stands without its address space."""
    declarator = r"(?:[*&](?!&)|\(\s*[*&]\s*\w+\s*\)\s*\[)"
    for found in re.finditer(rf"(?<![\w:.])(?:metal::)?(?:{types})(?:\s+const)?\s*{declarator}", code):
        before = max(code.rfind(mark, 0, found.start()) for mark in ";{}(,<")
        if not _SPACES.search(code[before + 1 : found.end()]):
            yield found.start()


def refused(text: str, header: bool, template: tuple[str, ...] = ()) -> tuple[int, str] | None:
    """(line, message) of the first such place in a header or a body; None: there is none.

    Args:
        template: names of the kernel's own types.
    """
    code = _code(text)
    names = [re.escape(name) for name in (*template, *_TEMPLATE_TYPE.findall(code))]
    places = [
        (at, "a pointer or reference needs its address space") for at in _pointers(code, "|".join([_TYPES, *names]))
    ]
    depth, at = 0, 0
    for line in code.split("\n") if header else []:
        if depth == 0 and _PROGRAM.match(line) and not _SPACES.search(line):
            places.append((at, "a variable of the program must be constant"))
        depth += line.count("{") - line.count("}")
        at += len(line) + 1
    if not places:
        return None
    at, message = min(places)
    return code.count("\n", 0, at) + 1, message
