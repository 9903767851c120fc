"""What is exported: the base and the adapter of a finished run, of one that is not, or named one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_mlx import checkpoint
from gemma_mlx.adapters.reading import find_adapter, read_adapter
from gemma_mlx.adapters.start import scales_of
from gemma_mlx.adapters.writing import own_config, write_files
from gemma_mlx.config import ADAPTER, CONFIG_FILE, METRICS, REMEMBERED, REPORT, TrainConfig, configure, read_yaml
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.card_data import read_object
from gemma_mlx.exporting.options import Source
from gemma_mlx.lora import ADAPTER_CONFIG, DoRALinear, _natural, remembered_options
from gemma_mlx.models.load import resolve
from gemma_mlx.plots import read_metrics


def find_source(
    run: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    model: str | Path | None = None,
    revision: str | None = None,
    *,
    step: int | None = None,
    adapter_weights: Sequence[float] | None = None,
) -> Source:
    """The base and the adapter that are meant.

    Args:
        run: a run's folder. Its best adapter by validation is taken; without validation the last one, of a run that is
            not finished from its newest whole checkpoint.
        adapter: an adapter's folder or Hub id instead of a run, in any layout that `read_adapter` knows; or several.
        model: the base; needed without a run, unless the adapter's file names it. With a run it stands in for the
            model that the run names, should that have moved.
        revision: of the base's Hub repository.
        step: the run's checkpoint of this step.
        adapter_weights: what each of several adapters counts.

    Raises:
        InputError: nothing was named, or something that is not there or damaged.
    """
    if run is not None and adapter is not None:
        raise InputError("export: name a run or an adapter, not both (a run's adapter is in its folder adapter/)")
    if step is not None and run is None:
        raise InputError("step: checkpoints belong to a run; name it")
    if run is not None:
        return _of_run(Path(run).expanduser(), model, revision, step)
    if adapter is None:
        if model is None:
            raise InputError("export: nothing was named; give a run, or a model with an adapter")
        return Source(resolve(model, revision), str(model), revision)
    return _of_adapters(adapter, model, revision, adapter_weights)


def _of_adapters(
    adapter: str | Path | Sequence[str | Path],
    model: str | Path | None,
    revision: str | None,
    weights: Sequence[float] | None,
) -> Source:
    names = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    read = [read_adapter(name) for name in names]
    base = model or next((found.base for found in read if found.base), None)
    if base is None:
        raise InputError(f"adapter {names[0]}: its files do not say which base it is for; name the model")
    revision = revision or (None if model else next((found.revision for found in read if found.revision), None))
    folder = resolve(base, revision)
    remembered = remembered_options(names)
    if len(names) == 1 and not weights:
        return Source(folder, str(base), revision, find_adapter(names[0]), remembered=remembered)
    kept = _combined(folder, str(base), names, weights, remembered)
    return Source(folder, str(base), revision, Path(kept.name), remembered=remembered, kept=kept)


def _combined(
    base: Path, name: str, adapters: Sequence[str | Path], weights: Sequence[float] | None, remembered: dict[str, Any]
) -> tempfile.TemporaryDirectory[str]:
    """The weighted sum of adapters as one, in a folder that goes when nobody holds it."""
    from gemma_mlx.adapters.attach import attach
    from gemma_mlx.lora import save_adapter
    from gemma_mlx.models.load import load_model

    model = load_model(base)
    attach(model, adapters, weights)
    kept = tempfile.TemporaryDirectory(prefix="gemma-mlx-adapter-")
    save_adapter(model, kept.name, name, options=remembered)
    return kept


def _of_run(run: Path, model: str | Path | None, revision: str | None, step: int | None) -> Source:
    if not (run / CONFIG_FILE).is_file():
        raise InputError(f"{run}: no run here ({CONFIG_FILE} is missing)")
    config = configure({**read_yaml(run / CONFIG_FILE), "resume": False})
    name = str(model or config.model)
    revision = revision or (None if model else getattr(config, "revision", None))
    try:
        base = resolve(name, revision)
    except InputError as error:
        if model:
            raise
        raise InputError(f"{run}: its base cannot be found ({error}); say where it is with --model") from None
    best = None if step is not None else best_step(run)
    if step is None and (run / ADAPTER / ADAPTER_CONFIG).is_file() and (best is not None or _finished(run)):
        finished = "" if _reported(run) is not None else "; the run is not finished"
        how = f"{_reported(run)}, its last" if best is None else f"{best}, the best by validation"
        told = (f"{run}: adapter of step {how}{finished}",)
        taken = _reported(run) if best is None else best
        return Source(base, name, revision, run / ADAPTER, run, taken, remembered_options(run / ADAPTER), told)
    snapshot, warnings = _checkpoint(run, step)
    kept = tempfile.TemporaryDirectory(prefix="gemma-mlx-adapter-")
    as_adapter(snapshot, config, Path(kept.name), scales_of(config, base))
    told = (*warnings, f"{run}: checkpoint of step {snapshot.step}{'' if step else ', the newest whole one'}")
    adapter = Path(kept.name)
    return Source(base, name, revision, adapter, run, snapshot.step, remembered_options(adapter), told, kept)


def best_step(run: Path) -> int | None:
    """The step whose validation loss is the lowest so far (the first of equals); None without validation."""
    path = run / METRICS
    scores = [r for r in read_metrics(path) if "valid_loss" in r] if path.is_file() else []
    return min(scores, key=lambda r: (r["valid_loss"], r["step"]))["step"] if scores else None


def _reported(run: Path) -> int | None:
    """Steps of a run that came to its end."""
    steps = read_object(run / REPORT).get("steps")
    return steps if isinstance(steps, int) else None


def _finished(run: Path) -> bool:
    """Whether adapter/ is of the last step: a finished run that was resumed for more steps has newer checkpoints."""
    reported, newest = _reported(run), max(_steps(run), default=0)
    return reported is not None and newest <= reported


def _steps(run: Path) -> dict[int, Path]:
    """Step -> folder of the run's checkpoints, oldest first."""
    return {int(folder.name.partition("-")[2]): folder for folder in checkpoint.checkpoints(run)}


def _checkpoint(run: Path, step: int | None) -> tuple[checkpoint.Snapshot, list[str]]:
    """(the checkpoint of a step, or the newest whole one, a line for each newer one that is damaged)."""
    known = _steps(run)
    if step is None:
        snapshot, warnings = checkpoint.newest(run)
        if snapshot is None:
            raise InputError(f"{run}: holds neither an adapter nor a checkpoint yet; let the run go on")
        return snapshot, warnings
    if step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise InputError(f"step {step}: {run} has no such checkpoint; there are: {there}")
    try:
        return checkpoint.load(known[step]), []
    except checkpoint.DamagedCheckpoint as damage:
        raise InputError(f"step {step}: {damage}; choose another checkpoint") from None


def as_adapter(
    snapshot: checkpoint.Snapshot, config: TrainConfig, folder: Path, scales: Mapping[str, float] | None = None
) -> None:  # fmt: skip
    """Write a checkpoint's trained weights as the adapter that its run would have saved.

    Args:
        snapshot: the checkpoint.
        config: of its run.
        folder: gets the two files.
        scales: path -> scale of layers whose scale is not the run's alpha / rank.
    """
    weights, names = snapshot.weights, sorted(snapshot.weights, key=_natural)  # a file has them in any order
    ranks = {name.rpartition(".")[0]: weights[name].shape[1] for name in names if name.endswith(".lora_a")}
    own = {f"{path}.{leaf}" for path in ranks for leaf in DoRALinear.TENSORS}
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names if name not in own))
    scales = dict.fromkeys(ranks, config.adapter_alpha / config.rank) | dict(scales or {})
    remembered = {name: getattr(config, name) for name in REMEMBERED}
    mine = {"base_model": config.model, "targets": config.targets, "options": remembered}
    dora = any(f"{path}.m" in weights for path in ranks)
    write_files(folder, weights, own_config(ranks, scales, config.dropout, dora, modules, mine))
