"""The spine of an export: source -> a folder beside its place -> the files -> card -> manifest -> its place."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_mlx.errors import InputError
from gemma_mlx.exporting.card import write_card
from gemma_mlx.exporting.card_data import read_object
from gemma_mlx.exporting.manifest import MANIFEST, bytes_of, files_of, write_manifest
from gemma_mlx.exporting.options import FORMATS, ExportOptions, Source
from gemma_mlx.exporting.push import check_push, push
from gemma_mlx.exporting.source import find_source
from gemma_mlx.exporting.tensors import check_space
from gemma_mlx.files import flush
from gemma_mlx.progress import Reporter, megabytes
from gemma_mlx.signals import terminated

_FIELDS = {field.name: field for field in dataclasses.fields(ExportOptions)}


def export(
    run: str | Path | None = None,
    out: str | Path | None = None,
    format: str = "hf",
    *,
    model: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    adapter_weights: Sequence[float] | None = None,
    revision: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    scores: str | Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    **options: Any,
) -> Path:
    """Write what was trained in the form that another program reads; returns the folder.

    The folder appears whole or not at all, with a model card (README.md) and a manifest of every file's digest.

    Args:
        run: a run's folder: its best adapter by validation, else its last or its newest whole checkpoint.
        out: the folder to make.
        format: "hf" (merged checkpoint), "peft", "mlx" (mlx-lm's and mlx-vlm's adapters) or "gguf" (llama.cpp).
        model: the base, without a run or where the run's has moved.
        adapter: an adapter's folder or Hub id instead of a run, or several.
        adapter_weights: what each of several adapters counts.
        revision: of the base's Hub repository.
        step: the run's checkpoint of this step.
        overwrite: replace an earlier export, once the new one is whole.
        scores: an evaluation's folder, for the card.
        push_to_hub: a Hub repository to upload the folder to.
        private: make that repository a private one.
        **options: fields of `ExportOptions`.

    Raises:
        InputError: whatever is missing, damaged or does not fit; nothing has been written then.
    """
    settings = checked_options(format, options)
    if out is None:
        raise InputError("--out: name the folder to write")
    out = checked_out(out, overwrite)
    if push_to_hub is not None:
        check_push(push_to_hub)
    say = Reporter(settings.quiet)
    source = find_source(run, adapter, model, revision, step=step, adapter_weights=adapter_weights)
    for line in source.told:
        say.say(line)
    check_space(out.parent, least_bytes(source, format))
    with sibling(out) as folder:
        for line in importlib.import_module(f"gemma_mlx.exporting.{format}").write(source, folder, settings):
            say.say(line)
        write_card(folder, source, format, settings, scores)
        total = bytes_of(folder)
        write_manifest(folder, source, format, megabytes(say, "checked", total))
        publish(folder, out)
    say.say(f"{format}: {total / 1e6:.1f} MB in {out}")
    if push_to_hub is not None:
        say.say(push(out, push_to_hub, private))
    return out


def checked_options(format: str, options: dict[str, Any]) -> ExportOptions:
    """The options with their defaults.

    Raises:
        InputError: an unknown format or option, or one that the format does not have.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    for name in options:
        if name not in _FIELDS:
            raise InputError(f"{name}: unknown option of export; known: {', '.join(_FIELDS)}")
    settings = ExportOptions(**options)
    if settings.bits is not None and (format != "hf" or settings.bits not in (4, 6, 8)):
        raise InputError(f"--bits {settings.bits}: 4, 6 or 8, and for --format hf alone")
    if settings.shard_bytes < 1:
        raise InputError(f"--shard-bytes {settings.shard_bytes}: at least 1 is needed")
    return settings


def checked_out(out: str | Path, overwrite: bool) -> Path:
    """The folder to make, absolute.

    Raises:
        InputError: it is a file, lies nowhere, or holds something.
    """
    out = Path(out).expanduser().absolute()
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder as {out.parent}; make it first")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out}: is no folder; give another name")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"--out {out}: is not empty; give another folder, or --overwrite to replace it")
    # Nothing but an export is ever deleted: a run's folder, or a home, holds what no other file has.
    if out.is_dir() and any(out.iterdir()) and "export" not in read_object(out / MANIFEST):
        raise InputError(f"--out {out}: is no earlier export (by its {MANIFEST}); --overwrite leaves it alone")
    return out


def least_bytes(source: Source, format: str) -> int:
    """Bytes that an export takes at the least; a writer that knows better checks again."""
    adapter = sum(p.stat().st_size for p in source.adapter.glob("*.safetensors")) if source.adapter else 0
    if format in ("peft", "mlx"):
        return adapter
    base = source.base
    return base.stat().st_size if base.is_file() else sum(p.stat().st_size for p in base.glob("*.safetensors"))


@contextlib.contextmanager
def sibling(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, gone at the end unless it was renamed."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        with terminated(f"--out {out}: stopped, nothing was written"):
            yield folder
    except OSError as error:
        raise InputError(f"--out {out}: could not be written ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Put a finished folder in its place; what was there goes once it is."""
    folder.chmod(0o755)
    for file in files_of(folder).values():
        flush(file)
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / "was")
    try:
        folder.rename(out)
    except BaseException:
        if old is not None:
            (old / "was").rename(out)
            old.rmdir()
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
