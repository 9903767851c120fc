"""The spine of training: config -> Run, top to bottom.

Everything that starts training builds a ``TrainConfig`` and calls ``train``. Nothing is written before the options,
the checkpoint, the rows and the adapter's targets have been checked.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx import checkpoint, machine
from gemma_mlx.adapters.start import adopted, first_weights
from gemma_mlx.config import ADAPTER, CONFIG_FILE, LEDGER, METRICS, REMEMBERED, REPORT, TrainConfig, configure
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.buckets import MOST_VALID
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import padding
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.errors import InputError
from gemma_mlx.estimate import Estimate
from gemma_mlx.files import flush, write_whole
from gemma_mlx.fit import fitted
from gemma_mlx.lora import save_adapter
from gemma_mlx.models.load import check_finite, load_model, resolve
from gemma_mlx.models.quantize import quantize_model
from gemma_mlx.optim import Weights, learning_rate
from gemma_mlx.optimizers import OPTIMIZERS, rounding_key
from gemma_mlx.plots import plot_loss, read_metrics
from gemma_mlx.preparation import (
    PAD_MULTIPLE,
    buckets_of,
    fetcher_of,
    in_order,
    lanes_of,
    make_trainable,
    open_rows,
    plan_of,
    total_steps,
    with_options,
)
from gemma_mlx.progress import Reporter, duration
from gemma_mlx.signals import Interrupted, StopRequest, stop_request
from gemma_mlx.step import Step, Sums, add
from gemma_mlx.tower_store import open_store

BAD_ROWS = "bad_rows.csv"
PLOT = "loss.png"


@dataclass
class Window:
    """Sums since the last line of metrics.jsonl."""

    steps: int = 0
    loss: float = 0.0
    labels: int = 0
    correct: float = 0.0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    wait: float = 0.0


@dataclass
class Progress:
    """All of a run's state that is not an array; goes into every checkpoint as JSON, which keeps floats exactly."""

    step: int = 0
    data: dict[str, int] | None = None
    evaluated: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    metrics_bytes: int = 0
    ledger_bytes: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def restored(cls, step: int, state: dict[str, Any]) -> Progress:
        """The progress of a checkpoint."""
        return cls(**{**state, "step": step, "window": Window(**state["window"])})


@dataclass
class Run:
    """A finished run: where it lies, what it found, and the model with the last step's adapter still on it."""

    folder: Path
    config: TrainConfig
    report: dict[str, Any]
    model: Any
    processor: Processor

    @property
    def adapter(self) -> Path:
        """Folder of the best adapter (the last one if there was no validation)."""
        return self.folder / ADAPTER

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / METRICS)


def finetune(model: Any, *, processor: Processor | None = None, quiet: bool = False, **options: Any) -> Run:
    """Fine-tune from Python: ``finetune("google/gemma-4-E2B-it", data="train.csv", out="runs/x", rank=8)``.

    ``model`` is a folder, a Hub id, or a loaded model with its ``processor``; the adapter is put on it in place. The
    options are those of ``TrainConfig``. Raises InputError for bad input and ``Interrupted`` after a signal.
    """
    if isinstance(model, str | Path):
        return train(configure({"model": str(model), **options}), quiet=quiet)
    if processor is None:
        raise InputError("finetune: a loaded model needs its processor too: finetune(model, processor=processor, ...)")
    return train(configure({"model": str(processor.folder), **options}), model, processor, quiet)


def train(config: TrainConfig, model: Any = None, processor: Processor | None = None, quiet: bool = False) -> Run:
    """Train as ``config`` says and leave everything in its run folder."""
    say = Reporter(quiet)
    folder = checked_folder(config)
    machine.set_limits()
    given = model is not None
    if not given:
        source = resolve(config.model)
        config = adopted(config, source)
        model = load_model(source, config.dtype, config.allow_unexpected, config.audio_window)
        processor = Processor(source, model.spec)
    else:
        config = adopted(config, processor.folder)
    processor = with_options(processor, config)
    with fetcher_of(config) as fetcher:
        return _run(config, folder, model, given, processor, fetcher, say)


def _run(
    config: TrainConfig, folder: Path, model: Any, given: bool, processor: Processor, fetcher: LazyFetcher,
    say: Reporter,
) -> Run:  # fmt: skip
    """From the rows on."""
    rows = open_rows(config.data, processor, config, say, fetcher, config.train_split)
    valid = open_rows(config.valid, processor, config, say, fetcher, config.valid_split)
    config, needed, told = fitted(config, model, given, rows, valid)
    if config.quantize and not given:
        quantize_model(model, config.quantize)
    check_finite(model, config.model)
    trained = make_trainable(model, config)
    job = Job(config, folder, model, processor, rows, valid, say, needed)
    for line in told:
        say.say(line)
    say.say(
        f"{count_of(rows)} rows, {job.total} steps of {config.batch_size * config.accumulate}; {trained}, "
        f"{sum(w.size for w in job.weights.values()):,} weights; padding {job.padding:.0%}; {machine.describe()}"
    )
    try:
        with machine.awake(), stop_request() as stop:
            job.start()
            while not job.done:
                job.advance(stop)
            report = job.finish()
    finally:
        job.close()
    return Run(folder, config, report, model, processor)


def checked_folder(config: TrainConfig) -> Path:
    """The run folder, after checking that the needed options are there and that no run would be overwritten."""
    for name in ("model", "data", "out"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing: {name} is needed to train")
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: this is a file; name a folder")
    holds_run = [n for n in (CONFIG_FILE, METRICS, checkpoint.FOLDER) if (folder / n).exists()]
    if holds_run and not config.resume:
        raise InputError(f"--out {folder}: holds a run already ({holds_run[0]}); add --resume, or name another folder")
    return folder


class Job:
    """A run under way: arrays, progress, and the files they go to."""

    def __init__(
        self, config: TrainConfig, folder: Path, model: Any, processor: Processor, rows: Dataset,
        valid: Dataset | None, say: Reporter, estimate: Estimate | None = None,
    ):  # fmt: skip
        self.estimate = estimate
        self.config, self.folder, self.model, self.valid, self.say = config, folder, model, valid, say
        self.step = Step(
            model, config.clip, lanes=lanes_of(config, rows), pick_labels=config.label_positions == "auto",
            recompute=config.checkpoint_layers, optimizer=OPTIMIZERS[config.optimizer],
            towers=open_store(config.tower_cache, config.tower_cache_gb, config.tower_cache_dir),
        )  # fmt: skip
        self.weights: Weights = first_weights(model, config)
        self.moments = self.step.optimizer.init(self.weights)
        self.pad_id = processor.pad_id
        self.rows, plan = rows, plan_of(config, rows)
        self.multiple = PAD_MULTIPLE[mx.default_device().type.name]
        if self.step.compiled:  # which pads to buckets from what is not padded yet
            self.multiple, self.step.buckets = 1, buckets_of(self.step, config, rows, plan_of)
            if valid is not None:
                self.step.valid_buckets = buckets_of(self.step, config, valid, in_order, MOST_VALID)
        self.batches = Batches(
            rows, config.batch_size, self.pad_id, seed=config.seed, pad_to_multiple=self.multiple, plan=plan,
            finish=self.step.lay_out, **reading_of(config),
        )  # fmt: skip
        self.total = total_steps(config, plan)
        own = self.step.buckets
        seen = rows.seen
        self.padding = own.padding if own else padding(plan_of(config, seen).batches(0), seen.lengths, self.multiple)
        files = {"data": rows.examples.fingerprint(), "valid": valid.examples.fingerprint() if valid else ""}
        self.progress = Progress(files=files)
        self.bad: set[str] = set()  # what is wrong with each
        self.saved = (0, 0)  # (step, step of the last validation) in the newest checkpoint

    @property
    def done(self) -> bool:
        """All steps taken, or stopped early, and nothing left to evaluate."""
        p, c = self.progress, self.config
        early = bool(c.patience) and p.stale >= c.patience
        return (p.step >= self.total or early) and not self._due(c.eval_every, p.evaluated, bool(self.valid))

    def _due(self, every: int, last: int, wanted: bool = True) -> bool:
        step = self.progress.step
        return wanted and step > last and (step >= self.total or (every > 0 and step % every == 0))

    def start(self) -> None:
        """Read the base's weights, go to the newest checkpoint if resuming, create the folder."""
        if self.config.resume:
            self._resume()
        self.batches.start()  # made while the weights are read
        mx.eval(self.model.parameters(), self.weights)  # a compiled step would otherwise read them from disk each time
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / CONFIG_FILE, self.config.to_yaml().encode())
        for name, size in ((METRICS, self.progress.metrics_bytes), (LEDGER, self.progress.ledger_bytes)):
            with (self.folder / name).open("ab") as f:
                f.truncate(size)
        self.step.install(self.weights)
        mx.reset_peak_memory()
        self.say.begin(self.progress.step, self.total)

    def _resume(self) -> None:
        snapshot, warnings = checkpoint.newest(self.folder)
        for line in warnings:
            self.say.warn(line)
        if snapshot is None:
            return
        files = self.progress.files
        self.progress = Progress.restored(snapshot.step, snapshot.state)
        for name, found in files.items():
            if found != self.progress.files[name]:
                raise InputError(f"--{name} {getattr(self.config, name)}: the file changed since the run began")
        shapes = {name: w.shape for name, w in self.weights.items()}
        if {name: w.shape for name, w in snapshot.weights.items()} != shapes:
            raise InputError(f"{self.folder}: the checkpoint's adapter does not fit this model")
        # In the model's order: the norm's sum over tensors must not follow the order of a file.
        self.weights = {name: snapshot.weights[name] for name in shapes}
        self.moments = {
            kind: {name: snapshot.moments[kind][name] for name in group} for kind, group in self.moments.items()
        }
        self.saved = (snapshot.step, self.progress.evaluated)
        self.bad = read_bad_rows(self.folder / BAD_ROWS)
        self.batches.seek(self.progress.data)
        self.say.say(f"resumed at step {snapshot.step}")

    def advance(self, stop: StopRequest) -> None:
        """One step, then whatever is due after it. A signal ends the run here, after saving."""
        p, c = self.progress, self.config
        if p.step < self.total and not self._due(c.eval_every, p.evaluated, bool(self.valid)):
            self._train_step()
        if self._due(c.eval_every, p.evaluated, bool(self.valid)) and not stop:
            self._validate(stop)
        if self._due(c.save_every, self.saved[0]):
            self.save()
        if stop:
            self.save()
            raise Interrupted(
                f"stopped at step {p.step} of {self.total}; go on with: python -m gemma_mlx.train --resume "
                f"--out {self.folder}",
                stop.signum,
            )

    def _train_step(self) -> None:
        """Sum gradients over the accumulated batches, divide once by their labels, clip, update, log."""
        p, c, began, wait = self.progress, self.config, time.perf_counter(), 0.0
        grads, sums, row_ids = None, Sums(), []
        for micro in range(c.accumulate):
            asked = time.perf_counter()
            batch = next(self.batches)
            wait += time.perf_counter() - asked
            row_ids += self.batches.row_ids
            more, part = self.step.gradients(self.weights, batch, dropout_key(c.seed, p.step, micro))
            grads = more if grads is None else add(grads, more)
            sums.add(part.loss, part.correct, part)
            if c.accumulate > 1:
                mx.eval(grads, sums.loss, sums.correct)
        lr = learning_rate(p.step, self.total, c.lr, c.schedule, c.warmup, c.min_lr)
        scalars, key = self.step.optimizer.scalars(p.step + 1, lr, c.weight_decay), rounding_key(c.seed, p.step)
        self.weights, self.moments, norm = self.step.apply(self.weights, self.moments, grads, sums.labels, scalars, key)
        mx.eval(self.weights, self.moments, norm, sums.loss, sums.correct)
        loss, correct = sums.loss.item(), sums.correct.item()
        self.step.install(self.weights)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise InputError(f"step {p.step + 1}: loss or gradient is not finite; lower --lr, or resume with less")
        p.step, p.data = p.step + 1, self.batches.state()
        self._account(row_ids)
        seconds = time.perf_counter() - began
        p.tokens, p.label_tokens, p.seconds = p.tokens + sums.tokens, p.label_tokens + sums.labels, p.seconds + seconds
        w = p.window
        w.steps, w.loss, w.correct, w.labels = w.steps + 1, w.loss + loss, w.correct + correct, w.labels + sums.labels
        w.tokens, w.positions = w.tokens + sums.tokens, w.positions + sums.positions
        w.seconds, w.wait = w.seconds + seconds, w.wait + wait
        if p.step % c.log_every == 0 or p.step == self.total:
            self._log_window(lr, norm.item())

    def _account(self, row_ids: list[str]) -> None:
        """A line of the ledger, which rows the step was made of; and the list of bad rows."""
        p = self.progress
        line = {"step": p.step, "epoch": p.data["epoch"], "position": p.data["position"], "rows": row_ids}
        p.ledger_bytes += self._append(LEDGER, line)
        self._list_bad(self.rows, self.batches)

    def _list_bad(self, rows: Dataset, batches: Batches) -> None:
        """The list of bad rows, if there are more."""
        if (more := [*rows.bad.values(), *batches.bad.values()]) and not self.bad.issuperset(more):
            self.bad.update(more)
            write_bad_rows(self.folder / BAD_ROWS, sorted(self.bad))

    def _log_window(self, lr: float, norm: float) -> None:
        p, w = self.progress, self.progress.window
        record = {
            "step": p.step,
            "loss": w.loss / max(w.labels, 1),
            "lr": lr,
            "grad_norm": norm,
            "token_accuracy": w.correct / max(w.labels, 1),
            "tokens": p.tokens,
            "label_tokens": p.label_tokens,
            "padding": 1 - w.tokens / max(w.positions, 1),
            "tokens_per_second": w.tokens / max(w.seconds, 1e-9),
            "step_seconds": w.seconds / w.steps,
            "data_wait": w.wait / w.steps,
            "compilations": self.step.compilations,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        p.window = Window()
        self._write(record)
        self.say.step(record, self.total)

    def _write(self, record: dict[str, Any]) -> None:
        self.progress.metrics_bytes += self._append(METRICS, record)

    def _append(self, name: str, record: dict[str, Any]) -> int:
        """A line of JSON at the end of a file of the run; its bytes."""
        line = (json.dumps(record) + "\n").encode()
        with (self.folder / name).open("ab") as f:
            return f.write(line)

    def _validate(self, stop: StopRequest) -> None:
        """Loss and token accuracy on the validation rows; keeps the adapter if it is the best yet."""
        loss, correct, labels = 0.0, 0.0, 0
        with Batches(
            self.valid, self.config.batch_size, self.pad_id, epochs=1, pad_to_multiple=self.multiple,
            plan=in_order(self.config, self.valid), **reading_of(self.config),
        ) as batches:  # fmt: skip
            for batch in batches:
                sums = self.step.evaluate(self.weights, batch)
                mx.eval(sums.loss, sums.correct)
                loss, correct = loss + sums.loss.item(), correct + sums.correct.item()
                labels += sums.labels
                if stop:
                    return  # not evaluated; the resumed run does it again
        self._list_bad(self.valid, batches)
        p = self.progress
        p.evaluated = p.step
        record = {"step": p.step, "valid_loss": loss / max(labels, 1), "valid_accuracy": correct / max(labels, 1)}
        better = p.best_loss is None or record["valid_loss"] < p.best_loss
        if better:
            p.best_loss, p.best_step, p.stale = record["valid_loss"], p.step, 0
            self._save_adapter()
        else:
            p.stale += 1
        self._write(record)
        self.say.say(
            f"step {p.step}: validation loss {record['valid_loss']:.4f}, token accuracy "
            f"{record['valid_accuracy']:.1%}{' (best)' if better else ''}"
        )

    def _save_adapter(self) -> None:
        c = self.config
        options = {name: getattr(c, name) for name in REMEMBERED}
        save_adapter(self.model, self.folder / ADAPTER, c.model, c.targets, options, self.weights)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        if self.saved == (self.progress.step, self.progress.evaluated):
            return
        for name in (METRICS, LEDGER):
            flush(self.folder / name)
        state = dataclasses.asdict(self.progress)
        step = state.pop("step")
        state["data"] = self.batches.state()
        checkpoint.save(self.folder, checkpoint.Snapshot(step, self.weights, self.moments, state), self.config.keep)
        self.saved = (step, self.progress.evaluated)

    def finish(self) -> dict[str, Any]:
        """Last checkpoint, adapter, plot and report."""
        p = self.progress
        self.save()
        if p.best_step is None:
            self._save_adapter()
        records = read_metrics(self.folder / METRICS)
        losses = [r["loss"] for r in records if "loss" in r][-20:]
        report = {
            "steps": p.step,
            "stopped_early": p.step < self.total,
            "final_loss": sum(losses) / max(len(losses), 1),
            "best_step": p.best_step,
            "best_valid_loss": p.best_loss,
            "tokens": p.tokens,
            "label_tokens": p.label_tokens,
            "bad_rows": len(self.bad),
            "train_seconds": p.seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "estimated_peak_gb": self.estimate and self.estimate.peak / 1e9,
            "adapter_weights": sum(w.size for w in self.weights.values()),
            "compiled": self.step.compiled,
            "compilations": dict(self.step.traces),
            "tower_cache": self.step.tower_report(),
            "device": machine.describe(),
            "config": dataclasses.asdict(self.config),
        }
        plot_loss(records, self.folder / PLOT, title=str(self.folder))
        write_whole(self.folder / REPORT, (json.dumps(report, indent=2) + "\n").encode())
        self.say.end()
        best = f", best validation loss {p.best_loss:.4f} at step {p.best_step}" if p.best_step else ""
        self.say.say(f"{p.step} steps in {duration(p.seconds)}{best}; adapter: {self.folder / ADAPTER}")
        return report

    def close(self) -> None:
        """Stop the readers and the bar."""
        self.batches.close()
        self.say.end()


def dropout_key(seed: int, step: int, micro: int) -> mx.array:
    """The random key of one batch's dropout: follows from its place alone, so no generator state is needed."""
    return mx.random.key(int(np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]))


def reading_of(config: TrainConfig) -> dict[str, Any]:
    """How batches are read: threads, bytes, bad rows."""
    return {
        "workers": config.workers,
        "max_bytes": int(config.read_ahead_mb * 1e6),
        "on_bad_row": config.on_bad_row,
        "max_bad_rows": config.max_bad_rows,
    }


def count_of(rows: Dataset) -> str:
    """How many rows, for messages."""
    return "uncounted" if rows.examples.n is None else f"{rows.examples.n}"


def read_bad_rows(path: Path) -> set[str]:
    """What `write_bad_rows` wrote, if it did."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as f:
        return {line["reason"] for line in csv.DictReader(f)}


def write_bad_rows(path: Path, told: Iterable[str]) -> None:
    """A CSV of what is wrong with rows that were skipped, one message each; it names the row first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["reason"], *([line] for line in told)])
    write_whole(path, text.getvalue().encode())
