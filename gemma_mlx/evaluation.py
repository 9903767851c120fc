"""A score for a model on a file of rows: answers, compared with what the rows say, and with another model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_mlx.adapters.attach import attached
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.data.examples import Example
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.errors import InputError
from gemma_mlx.evaluating.answering import Asking, answer_all, muted
from gemma_mlx.evaluating.comparison import BASE, earlier_answers, other_model
from gemma_mlx.evaluating.identity import data_digest, model_digests, prompts_digest
from gemma_mlx.evaluating.ledger import InMemory, Record, opened
from gemma_mlx.evaluating.measuring import check_metrics
from gemma_mlx.evaluating.page import write_page
from gemma_mlx.evaluating.prediction import Prediction
from gemma_mlx.evaluating.report import NORMALIZE, PREDICTIONS, REPORT, Report
from gemma_mlx.evaluating.rows import Known, Rated, read_rows
from gemma_mlx.full import full_modules
from gemma_mlx.lora import lora_layers
from gemma_mlx.normalizers import normalizer

__all__ = ["PREDICTIONS", "REPORT", "Prediction", "Report", "evaluate", "muted"]

FINISHED, FINISHED_OTHER = "finished.jsonl", "finished_other.jsonl"
"""The ledgers of the model and of the one that it is compared with."""


def evaluate(
    model: Any,
    processor: Processor,
    data: str | Path | Sequence[Example],
    out: str | Path | None = None,
    *,
    max_tokens: int = 128,
    batch_size: int = 8,
    limit: int | None = None,
    normalize: str = NORMALIZE,
    metrics: Sequence[str] = (),
    language: str | None = None,
    group_by: Sequence[str] = (),
    cluster_by: str | None = None,
    likelihood: bool = False,
    compare: str | Path | None = None,
    without_media: bool = False,
    restart: bool = False,
    page: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> Report:
    """Answer every row greedily and compare with its reference.

    Rows with a clip whose reference is its ``text`` are transcripts and get word and character error rates; all others
    are answers and get exact match, F1 and ANLS.

    Args:
        data: what `gemma_mlx.data.rows.Rows` reads, or examples.
        out: a folder for ``predictions.csv``, ``report.json``, ``report.html``, and the list of finished rows with
            which a killed evaluation goes on: run again with the same options it answers only the others.
        max_tokens: the most tokens of an answer.
        batch_size: rows answered at a time.
        limit: only the first so many rows.
        normalize: what is made equal before texts are compared, see `gemma_mlx.normalizers.normalizer`.
        metrics: names of `gemma_mlx.scoring.METRICS`, over all rows, in place of those by kind of row.
        language: of rows that name none; decides what the normaliser does.
        group_by: scores of parts of the rows as well: by ``language``, ``source``, ``duration``, ``media``,
            ``reference_length``, ``task`` or a column.
        cluster_by: rows with one value of this column (a speaker) are drawn together in intervals and tests.
        likelihood: measure perplexity and token accuracy of the references too; rows of mere text are then let in.
        compare: "base" for the same model without its adapter, an adapter to put in its place, or the
            ``predictions.csv`` of an earlier evaluation of the same rows. The model is afterwards as it was.
        without_media: silence for every clip and grey for every picture: what the model then says is guessed.
        restart: answer rows again that ``out`` already has.
        page: whether ``report.html`` is written.
        progress: called with (rows done, all) after each batch.
        reading: options of `Rows`, such as ``media_roots`` and ``columns``.

    Raises:
        InputError: bad rows, naming file and line, unknown names, or an ``out`` of another evaluation; before the first
            answer.
    """
    check_metrics(metrics)
    normalizer(normalize)
    _check_comparison(model, compare)
    asking = Asking(max_tokens, batch_size, without_media, likelihood)
    wanted = dict.fromkeys(group_by, "--group-by") | ({cluster_by: "--cluster-by"} if cluster_by else {})
    with _fetching(data, reading):
        rated = read_rows(data, reading, wanted, limit, likelihood, language or "")
        earlier = earlier_answers(Path(compare), rated.examples) if compare and _is_file(compare) else []
        prompts = [processor.prompt(e, with_features=False).input_ids for e in rated.examples]
        answered = _Answered(processor, rated, asking, prompts, out, restart, progress, _passes(compare))
        predictions, digests = answered.by(model, FINISHED)
        about = _about(data, model, processor, answered, digests) | ({"compare": str(compare)} if compare else {})
        report = Report(
            predictions, normalize, tuple(metrics), tuple(group_by), cluster_by,
            *_other(model, compare, earlier, predictions, answered), about,
        )  # fmt: skip
        if out is not None:
            report.write(out)
            if page:
                write_page(Path(out), report, rated.examples, processor)
    return report


@contextmanager
def _fetching(data: Any, reading: dict[str, Any]) -> Iterator[None]:
    """Puts a fetcher into ``reading``, for as long as media may be read."""
    if not isinstance(data, str | Path):
        yield
        return
    named = [str(data), *map(str, reading.get("media_roots", ()))]
    with reading.get("fetcher") or LazyFetcher(named) as fetcher:
        reading["fetcher"] = fetcher
        yield


class _Answered:
    """How rows are answered by one model after another."""

    def __init__(
        self, processor: Processor, rated: Rated, asking: Asking, prompts: list[Any], out: str | Path | None,
        restart: bool, progress: Callable[[int, int], None] | None, passes: int,
    ):  # fmt: skip
        self.processor, self.rated, self.asking, self.restart = processor, rated, asking, restart
        self.lengths = [len(ids) for ids in prompts]
        self.out, self.progress, self.passes, self._done = out, progress, passes, 0
        self.identity = {"data": data_digest(rated.examples), "prompts": prompts_digest(prompts), **asking.told()}

    def by(self, model: Any, name: str) -> tuple[tuple[Prediction, ...], dict[str, str]]:
        """(predictions in the order of the rows, digests of the model); finished rows are in the ledger ``name``."""
        examples, digests = self.rated.examples, model_digests(model)
        with self._ledger(name, digests) as ledger:
            records = answer_all(
                model, self.processor, examples, self.lengths, self.asking, ledger, self._counted(len(examples))
            )
        self._done += len(examples)
        return tuple(map(_prediction, examples, self.rated.known, records)), digests

    def _counted(self, count: int) -> Callable[[int, int], None] | None:
        done, all_rows, progress = self._done, count * self.passes, self.progress
        return progress and (lambda now, _: progress(done + now, all_rows))

    def _ledger(self, name: str, digests: dict[str, str]) -> Any:
        if self.out is None:
            return nullcontext(InMemory())
        folder = Path(self.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder}: cannot be made ({error.strerror}); choose another folder") from None
        return opened(folder / name, {**self.identity, **digests}, self.restart)


def _prediction(example: Example, known: Known, record: Record) -> Prediction:
    """A row with its record."""
    likelihood = (record["nll"], record["labels"], record["correct"]) if "nll" in record else None
    return Prediction(
        example.row_id, example.where, "text" if example.completion else example.task, example.reference,
        record.get("text", ""), record.get("finish", "stop"), known.language, known.source, record["seconds"],
        len(example.media()), known.cells, likelihood,
    )  # fmt: skip


def _is_file(compare: str | Path) -> bool:
    return Path(compare).suffix == ".csv"


def _passes(compare: str | Path | None) -> int:
    """How many models answer."""
    return 1 if compare is None or _is_file(compare) else 2


def _check_comparison(model: Any, compare: str | Path | None) -> None:
    if compare is None:
        return
    if str(compare) == BASE and not lora_layers(model) and not full_modules(model):
        raise InputError("--compare base: the model has no adapter, so it is the base; name an --adapter")
    elif not _is_file(compare) and str(compare) != BASE:
        read_adapter(compare)


def _other(
    model: Any, compare: str | Path | None, earlier: list[tuple[str, str]], predictions: tuple[Prediction, ...],
    answered: _Answered,
) -> tuple[tuple[Prediction, ...] | None, str]:  # fmt: skip
    """(what the predictions are compared with, its name)."""
    if compare is None:
        return None, BASE
    if _is_file(compare):
        pairs = zip(predictions, earlier, strict=True)
        return tuple(replace(p, prediction=text, finish=end, likelihood=None) for p, (text, end) in pairs), "earlier"
    with other_model(model, compare) as other:
        return answered.by(other, FINISHED_OTHER)[0], BASE if str(compare) == BASE else "other"


def _about(
    data: Any, model: Any, processor: Processor, answered: _Answered, digests: dict[str, str]
) -> dict[str, Any]:  # fmt: skip
    """What was evaluated on what, and how."""
    source = str(data) if isinstance(data, str | Path) else "examples"
    adapter = {"adapter": list(attached(model).names), "adapter_sha256": digests["adapter"]}
    return {
        "data": {"source": source, "rows": len(answered.rated), "sha256": answered.identity["data"]},
        "model": {"folder": str(processor.folder), "sha256": digests["model"], **adapter},
        "settings": answered.asking.told(),
    }
