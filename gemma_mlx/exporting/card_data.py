"""What a model card says of the data and of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mlx.config import LEDGER, REPORT
from gemma_mlx.errors import InputError

_NAMES = {
    "wer": "word error rate", "cer": "character error rate", "bleu": "BLEU", "chrf": "chrF",
    "exact_match": "exact match", "f1": "F1", "anls": "ANLS", "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
}  # fmt: skip
_COUNTED = ("transcripts", "answers", "texts", "rows")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def data_summary(run: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    """Counts of what a run was trained on, no texts and no names: rows, tokens, and hours, pictures and languages where
    ``prepare`` left its report beside the data."""
    if run is None:
        return {}
    found: dict[str, Any] = {}
    if rows := _distinct_rows(run / LEDGER):
        found["rows"] = rows
    report = read_object(run / REPORT)
    for key in ("tokens", "label_tokens", "bad_rows"):
        if isinstance(report.get(key), int):
            found[key] = report[key]
    data = Path(str(config.get("data") or "")).expanduser()
    prepared = read_object(data / REPORT) or read_object(data.parent / REPORT)
    table = prepared.get("train", prepared.get("data", {}))
    table = table if isinstance(table, dict) else {}
    audio, images, videos = (table.get(kind) or {} for kind in ("audio", "images", "videos"))
    if "hours" in audio:
        found["audio_seconds"] = round(audio["hours"] * 3600)
    found |= {"pictures": images["pictures"]} if "pictures" in images else {}
    found |= {"films": videos["films"]} if "films" in videos else {}
    if isinstance(table.get("languages"), dict):
        found["languages"] = table["languages"]
    return found


def _distinct_rows(ledger: Path) -> int:
    """How many rows the steps were made of, each counted once."""
    seen: set[int] = set()
    try:
        with ledger.open(encoding="utf-8") as f:
            for line in f:
                try:
                    seen.update(map(hash, json.loads(line)["rows"]))
                except (ValueError, KeyError, TypeError):
                    break  # cut off
    except OSError:
        return 0
    return len(seen)


def data_lines(summary: dict[str, Any]) -> str:
    """The summary in words."""
    if not summary:
        return "Nothing is known of it here."
    words = {
        "rows": "rows", "tokens": "tokens seen", "label_tokens": "tokens learned", "bad_rows": "rows left out as bad",
        "audio_seconds": "seconds of audio", "pictures": "pictures", "films": "films",
    }  # fmt: skip
    lines = [f"- {words[key]}: {summary[key]:,}" for key in words if key in summary]
    if "languages" in summary:
        lines.append("- rows by language: " + ", ".join(f"{name} {n:,}" for name, n in summary["languages"].items()))
    return "\n".join(lines)


def score_lines(run: Path | None, scores: str | Path | None) -> str:
    """Validation losses of the run, and the metrics of an evaluation with their intervals.

    Raises:
        InputError: the evaluation's folder holds no report that can be read.
    """
    lines = []
    report = read_object(run / REPORT) if run else {}
    if report.get("best_valid_loss") is not None:
        lines.append(f"- validation loss: {report['best_valid_loss']:.4f} (step {report['best_step']})")
    if report.get("final_loss") is not None:
        lines.append(f"- training loss over the last steps: {report['final_loss']:.4f}")
    if scores is not None:
        lines += _evaluated(Path(scores).expanduser())
    return "\n".join(lines) or "None were measured."


def _evaluated(folder: Path) -> list[str]:
    report = read_object(folder / REPORT)
    metrics = [name for name in _NAMES if isinstance(report.get(name), int | float)]
    if not metrics:
        raise InputError(f"--scores {folder}: holds no evaluation's {REPORT} with scores")
    counted = ", ".join(f"{report[name]:,} {name}" for name in _COUNTED if isinstance(report.get(name), int))
    level = (report.get("intervals") or {}).get("level", 0.95)
    lines = ["", f"| metric ({counted or 'rows'}) | value | {level:.0%} interval |", "| --- | --- | --- |"]
    for name in metrics:
        lines.append(f"| {_NAMES[name]} | {report[name]:.4g} | {_interval(report, name)} |")
    if isinstance(report.get("normalizer"), str):
        lines += ["", f"Texts are compared after the normaliser {report['normalizer']}."]
    return lines


def _interval(report: dict[str, Any], name: str) -> str:
    found = (report.get("intervals") or {}).get(name)
    if isinstance(found, dict):
        found = [found.get("low"), found.get("high")]
    numbers = [x for x in found or [] if isinstance(x, int | float)][:2]
    return f"{numbers[0]:.4g} to {numbers[1]:.4g}" if len(numbers) == 2 else "not measured"
