"""What MLX makes of a kernel, and what of that is compiled here."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from metal.fault import Fault
from metal.spelling import refused

from gemma_mlx.ops.kernel import Launch, metal, text_of

_ARRAY = re.compile(
    r"^(\s*)threadgroup\s+((?:[\w:]|<[^;{}()]*>)+)\s+(\w+\s*(?:\[[^;=]*\])*(?:\s*,\s*\w+\s*(?:\[[^;=]*\])*)*)\s*;(.*)$"
)
_PARAMETER = re.compile(r"^\s*(.+?)\s*\b(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]$")
_NAME_AND_SIZES = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")


@dataclass(frozen=True)
class Parameter:
    """One of the generated function's: a buffer (its type, a pointer or a reference) or a position."""

    type: str
    name: str
    attribute: str
    buffer: int | None


@dataclass(frozen=True)
class Source:
    """MLX's text of a kernel.

    Attributes:
        text: all of it, what MLX would give to Metal's compiler after its own utilities.
        name: of the function with its template arguments.
        parameters: the function's.
        header_line, body_line: lines of the text, from 1, at which header and body begin; 0: no header.
    """

    text: str
    name: str
    parameters: tuple[Parameter, ...]
    header_line: int
    body_line: int


def printed(call) -> str:
    """What `call` writes to the process's standard output, from C++ too."""
    sys.stdout.flush()
    held = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            call()
        finally:
            sys.stdout.flush()
            os.dup2(held, 1)
            os.close(held)
        file.seek(0)
        return file.read().decode()


def generated(launch: Launch) -> str:
    """The text that MLX makes for the launch, by tracing it: that needs no Metal."""
    made = metal(launch.kernel)

    def traced(*arrays: mx.array) -> list[mx.array]:
        with_arrays = Launch(
            launch.kernel, arrays, launch.template, launch.grid, launch.threadgroup, launch.shapes, launch.dtypes,
            launch.init,
        )  # fmt: skip
        return with_arrays.through(made, verbose=True)

    with tempfile.TemporaryDirectory() as folder:
        out = printed(lambda: mx.export_function(str(Path(folder) / "traced.mlxfn"), traced, *launch.inputs))
    return out.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def source(launch: Launch) -> Source:
    """MLX's text for the launch, and where its parts are."""
    text, kernel = generated(launch), launch.kernel
    start = text.index("[[kernel]] void custom_kernel_")
    opening = text.index("(\n", start)
    closing = text.index(") {\n", opening)
    name = re.search(r"\w+$", text[:opening])[0]
    instance = re.search(r"decltype\((.+?)\) \1;\s*$", text[closing:], re.DOTALL)
    parameters = []
    for part in text[opening + 2 : closing].split(",\n"):
        type_, parameter, attribute, buffer = _PARAMETER.match(part).groups()
        parameters.append(Parameter(type_, parameter, attribute, None if buffer is None else int(buffer)))
    header = text.find(kernel.header) if kernel.header.strip() else -1
    return Source(
        text,
        instance[1] if instance else name,
        tuple(parameters),
        text[:header].count("\n") + 1 if header >= 0 else 0,
        text[: closing + 4].count("\n") + 1,
    )


def check_spelling(launch: Launch) -> None:
    """
    Raises:
        Fault: "compile": the kernel's text has what Metal's compiler refuses and clang would take.
    """
    kernel = launch.kernel
    types = tuple(name for name, value in launch.template.items() if isinstance(value, mx.Dtype))
    texts = [(file, text_of(file), True) for file in kernel.headers] or [(f"{kernel.name}.h", kernel.header, True)]
    for file, text, header in [*texts, (f"{kernel.name}.metal", kernel.body, False)]:
        if found := refused(text, header, types):
            raise Fault("compile", file, *found)


def _parts(launch: Launch, made: Source) -> dict[int, tuple[str, int]]:
    """Line of the text -> (file, line in it) where a file of the kernel begins."""
    kernel = launch.kernel
    parts = {made.body_line: (f"{kernel.name}.metal", 1)}
    if made.header_line:
        line = made.header_line
        texts = [(file, text_of(file)) for file in kernel.headers]
        if "\n".join(text for _, text in texts) != kernel.header:
            texts = [(f"{kernel.name}.h", kernel.header)]
        for file, text in texts:
            parts[line] = (file, 1)
            line += text.count("\n") + 1
    return parts


def declared(line: str, count: int) -> tuple[str, int]:
    """(the line with declarations of threadgroup arrays as the emulator's macro, how many arrays there are now).

    C++ has no variables of a function that its threads share; this is the one change to MLX's text.
    """
    found = _ARRAY.match(line)
    if not found:
        return line, count
    indent, element, names, rest = found.groups()
    made = []
    for name, sizes in _NAME_AND_SIZES.findall(names):
        made.append(f"EMULATED_ARRAY({name}, ({element}), {sizes.strip() or '[1]'}, {count});" if sizes else
                    f"EMULATED_VALUE({name}, ({element}), {count});")  # fmt: skip
        count += 1
    return indent + " ".join(made) + rest, count


def translation_unit(launch: Launch, made: Source) -> str:
    """The C++ that is compiled: MLX's text with ``#line``s, and a function that calls the kernel for one thread."""
    parts, lines, arrays = _parts(launch, made), [], 0
    for number, line in enumerate(made.text.split("\n"), 1):
        if number in parts:
            file, at = parts[number]
            lines.append(f'#line {at} "{file}"')
        if made.body_line <= number and not line.startswith("template [[host_name("):
            line, arrays = declared(line, arrays)
        elif line.startswith("template [[host_name("):
            line = re.sub(r"\[\[.*?\]\] ", "", line)  # attributes that C++ does not take there
        lines.append(line)
    arguments = [
        f"metal::emulated::buffer<{p.type}>(buffers[{p.buffer}])"
        if p.buffer is not None
        else f"metal::emulated::position<{p.type}>(at->{p.attribute})"
        for p in made.parameters
    ]
    return "\n".join(
        [
            '#include "metal.h"',
            *lines,
            '#line 1 "entry"',
            "EMULATED_ENTRY(unsigned char* const* buffers, const EmulatedPositions* at) {",
            f"  {made.name}({', '.join(arguments)});",
            "}",
            "",
        ]
    )
