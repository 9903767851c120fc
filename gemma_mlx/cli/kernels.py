"""`doctor --kernels`: the table of the kernels' self-test."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gemma_mlx.errors import InputError
from gemma_mlx.files import write_whole
from gemma_mlx.kernel_check import Result, as_json, check_all, faster
from gemma_mlx.ops.trust import trust

HEADINGS = ("op", "size", "dtype", "error", "", "kernel ms", "plain ms", "times faster", "MB", "GB/s")
WIDTHS = (18, 6, 9, 8, 5, 10, 10, 13, 9, 7)


def run(out: Path | None) -> int:
    """Prints a line an op, and trusts those that are right and faster; 0 if all are within tolerance, else 1.

    Raises:
        InputError: no kernel runs here, or `out` cannot be written.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder; make it first")
    results: list[Result] = []
    for result in check_all():
        if not results:
            click.echo(_line(HEADINGS))
        results.append(result)
        click.echo(_line(row(result)))
        if result.failure:
            click.echo(f"  {result.failure.strip().splitlines()[0]}")
    wrong = [r for r in results if not r.within]
    if out:
        write_whole(out, (json.dumps(as_json(results), indent=1) + "\n").encode())
        click.echo(f"written: {out}")
    click.echo(f"{len(results) - len(wrong)} of {len(results)} within tolerance")
    chosen = faster(results)
    try:
        trust(chosen)
    except OSError as e:
        raise InputError(f"the result cannot be kept in the cache folder: {e}") from e
    click.echo(f"from now on kernels run here for: {', '.join(chosen) or 'nothing'} (right, and faster than plain MLX)")
    return 1 if wrong else 0


def row(result: Result) -> tuple[str, ...]:
    """A result's cells."""
    verdict = "ok" if result.within else "FAILS" if result.failure else "WRONG"
    cells = [result.op, result.size, result.dtype, f"{result.error:.1e}", verdict]
    if result.seconds is None:
        return (*cells, "", "", "", f"{result.moved / 1e6:.2f}", "")
    return (
        *cells, f"{1e3 * result.seconds:.3f}", f"{1e3 * result.plain_seconds:.3f}",
        f"{result.plain_seconds / result.seconds:.2f}", f"{result.moved / 1e6:.2f}", f"{result.bandwidth / 1e9:.0f}",
    )  # fmt: skip


def _line(cells: tuple[str, ...]) -> str:
    first, *others = (c.ljust(w) if i < 3 or i == 4 else c.rjust(w)
                      for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True)))  # fmt: skip
    return " ".join([first, *others]).rstrip()
