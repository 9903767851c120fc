"""Which line an instruction of a kernel comes from, by the line table of its shared object."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from elftools.elf.elffile import ELFFile


@cache
def _rows(path: Path) -> list[tuple[int, str, int]]:
    """(address, file, line), by address."""
    rows = []
    with path.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            first = 0 if program.header.version >= 5 else 1
            for entry in program.get_entries():
                if (state := entry.state) is not None:
                    name = program["file_entry"][state.file - first].name.decode()
                    rows.append((state.address, name, state.line))
    return sorted(rows, key=lambda row: row[0])


def line_of(path: Path, address: int) -> tuple[str, int]:
    """(file, line) of the call that returns to `address`; of the last line before, where clang gave it none."""
    best = ("", 0)
    for at, file, line in _rows(path):
        if at >= address:
            break
        if line:
            best = (file, line)
    return best
