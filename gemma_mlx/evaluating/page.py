"""A report as one page for a browser: no server, no network, no script from elsewhere.

Every text of a row passes `html.escape`; the page's policy lets no other script run than its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gemma_mlx.alignment import Word, coloured
from gemma_mlx.data.examples import Example
from gemma_mlx.evaluating import console
from gemma_mlx.evaluating.console import nothing_to_group, of_group, remarks, told
from gemma_mlx.evaluating.measuring import cleaner, row_errors
from gemma_mlx.evaluating.page_media import EMBEDDED, Shelf
from gemma_mlx.evaluating.report import PAGE, Report
from gemma_mlx.files import write_whole

ROWS, MEDIA_ROWS = 10_000, 250
"""The most rows of a page, the worst; of those with media, so many of the worst, and as many of the others by lot."""
_HERE = Path(__file__).parent
_TAGS = {"delete": "del", "insert": "ins"}
_KINDS = {
    "": "all rows",
    "wrong": "with errors",
    "right": "without errors",
    "cut": "cut off",
    "better": "better than {other}",
    "worse": "worse than {other}",
}


def write_page(
    folder: Path, report: Report, examples: Sequence[Example], processor: Any, rows: int = ROWS,
    media_rows: int = MEDIA_ROWS, room: int = EMBEDDED,
) -> None:  # fmt: skip
    """Write ``report.html`` into ``folder``, and media that have no room in it into ``report_media/``.

    Args:
        examples: of the report's predictions, one each.
        processor: knows what of a clip the model hears.
        rows, media_rows: see `ROWS`.
        room: bytes of media inside the page.
    """
    shown = report.worst_first[:rows]
    playable = _playable(shown, examples, media_rows)
    shelf = Shelf(folder, processor, room)
    other_errors = row_errors(report.measured_other, len(examples))
    lines = [_row(report, examples[i], i, other_errors[i], shelf if i in playable else None) for i in shown]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    title = f"Evaluation of {len(examples):,} rows"
    parts = {
        "policy": _policy(script), "title": title, "top": "\n".join(_top(report)), "kinds": _options(report),
        "cap": escape(_cap(len(examples), len(shown), playable, examples)), "heads": _heads(report),
        "rows": "\n".join(lines), "script": script,
    }  # fmt: skip
    write_whole(folder / PAGE, _filled((_HERE / "page.html").read_text(encoding="utf-8"), parts).encode())


def _filled(template: str, parts: dict[str, str]) -> str:
    """``{{name}}`` replaced in one pass: what stands inside a part is never a place for another."""
    pieces = template.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (p.partition("}}") for p in pieces[1:]))


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = "data: 'self' file:"
    return (
        f"default-src 'none'; img-src {own}; media-src {own}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def _playable(shown: Sequence[int], examples: Sequence[Example], most: int) -> set[int]:
    """Rows whose media are in the page: the worst, and others by lot."""
    having = [i for i in shown if examples[i].media()]
    rest = having[most:]
    drawn = np.random.default_rng(0).choice(len(rest), min(most, len(rest)), replace=False)
    return {*having[:most], *(rest[k] for k in drawn)}


def _cap(count: int, shown: int, playable: set[int], examples: Sequence[Example]) -> str:
    text = "Worst first." if count == shown else f"The {shown:,} worst of {count:,} rows; all are in predictions.csv."
    having = sum(bool(example.media()) for example in examples)
    if having > len(playable):
        text += f" Media of {len(playable):,} of the {having:,} rows with some are here: the worst, and others by lot."
    return text


# --- above the rows


def _top(report: Report) -> Iterable[str]:
    """Scores, what must be known beside them, and groups."""
    model = report.about.get("model", {})
    known = {"Data": report.about.get("data", {}).get("source"), "Model": model.get("folder")}
    known |= {"Adapter": ", ".join(model.get("adapter", ())), "Compared with": report.about.get("compare")}
    told_of = "<br>".join(f"{what}: {escape(str(value))}" for what, value in known.items() if value)
    yield f'<p class="quiet">{told_of}</p>'
    yield _scores(report)
    yield from (f'<p class="quiet">{escape(line)}</p>' for line in remarks(report))
    for by, groups in report.group_scores.items():
        if not groups:
            yield f'<p class="quiet">{escape(nothing_to_group(by))}</p>'
            continue
        yield f"<h2>By {escape(by)}</h2>"
        heads = ["", "rows", *(m.title for m in report.measured)]
        lines = [[group.name, f"{group.size:,}", *map(of_group, scores)] for group, scores in groups]
        yield _figures(heads, lines)


def _scores(report: Report) -> str:
    heads = ["", "rows", "score", "95 % interval"]
    both = {c.own.name: c for c in report.compared}
    if report.other is not None:
        heads += [report.other_name, "difference", "95 % interval", "p", "better rows", "worse rows"]
    lines = []
    for m in report.measured:
        line = [m.title, f"{len(m.rows):,}", m.tell(m.value), told(m, report.intervals[m.name])]
        if c := both.get(m.name):
            test = c.paired
            around = "" if np.isnan(test.low) else f"{console.change(m, test.low)} to {console.change(m, test.high)}"
            line += [m.tell(c.other.value), console.change(m, test.difference), around]
            line += [f"{test.p_value:.4f}", f"{len(c.better):,}", f"{len(c.worse):,}"]
        lines.append(line)
    return _figures(heads, lines)


def _figures(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<table class="figures"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


# --- the rows


def _options(report: Report) -> str:
    names = list(_KINDS) if report.other is not None else list(_KINDS)[:4]
    told_as = {name: escape(_KINDS[name].format(other=report.other_name)) for name in names}
    return "".join(f'<option value="{name}">{text}</option>' for name, text in told_as.items())


def _heads(report: Report) -> str:
    names = ["error", *(["change"] if report.other is not None else []), "texts", "seconds", "row", "media"]
    cells = [f'<th scope="col"><button type="button">{name}</button></th>' for name in names]
    return "".join(cells).replace('scope="col"', 'scope="col" aria-sort="descending"', 1)


def _row(report: Report, example: Example, i: int, other_error: float, shelf: Shelf | None) -> str:
    p, error = report.predictions[i], report.errors[i]
    change = error - other_error if report.other is not None else math.nan
    kinds = [
        name for name, is_so in (
            ("wrong", error > 0), ("right", error == 0), ("cut", p.finish == "length"), ("better", change < 0),
            ("worse", change > 0),
        ) if is_so
    ]  # fmt: skip
    cells = [_number(error)]
    if report.other is not None:
        cells.append(_number(change, "+.3f"))
    cells.append(f'<td data-value="{len(p.reference)}">{_texts(report, i)}</td>')
    cells.append(_number(math.nan if p.seconds is None else p.seconds, ".1f"))
    cells.append(
        f'<td class="quiet" data-value="{escape(p.row_id)}" title="{escape(p.where)}">{_facts(report, i)}</td>'
    )
    cells.append(_media(example, shelf))
    return f'<tr data-kinds="{" ".join(kinds)}">{"".join(cells)}</tr>'


def _number(value: float, form: str = ".3f") -> str:
    known, told_as = (value, format(value, form)) if not math.isnan(value) else ("", "")
    return f'<td class="number" data-value="{known}">{told_as}</td>'


def _texts(report: Report, i: int) -> str:
    """Reference and answers, one below the other, wrong words marked."""
    p = report.predictions[i]
    if p.task == "text":
        return _line("text", escape(p.reference))
    clean = cleaner(report.normalize, p.language)
    wanted, said = coloured(p.reference, p.prediction, clean, p.language or None)
    lines = [_line("reference", _marked(wanted)), _line("model", _marked(said))]
    if report.other is not None:
        other = coloured(p.reference, report.other[i].prediction, clean, p.language or None)[1]
        lines.append(_line(report.other_name, _marked(other)))
    return "".join(lines)


def _line(label: str, marked: str) -> str:
    name = f'<span class="label">{escape(label)}</span>'
    return f'<div class="line">{name}<span class="words" dir="auto">{marked}</span></div>'


def _marked(words: Sequence[Word]) -> str:
    """Words with a tag around those that are not equal, spaces outside of it."""
    found = []
    for word in words:
        text = escape(word.text.rstrip())
        tag = _TAGS.get(word.kind)
        if tag:
            text = f"<{tag}>{text}</{tag}>"
        elif word.kind == "substitute":
            text = f'<span class="substitute">{text}</span>'
        found.append(text + word.text[len(word.text.rstrip()) :])
    return "".join(found)


def _facts(report: Report, i: int) -> str:
    """The row's name, file and line, and what it is grouped by, each on a line of its own direction."""
    p = report.predictions[i]
    where = PurePath(p.where).name
    named = "" if p.row_id == p.where else p.row_id
    cut = "cut off" if p.finish == "length" else ""
    facts = [named, where, p.language, "" if p.source in where else p.source, cut, *p.cells.values()]
    return "".join(f'<div dir="auto">{escape(fact)}</div>' for fact in facts if fact)


def _media(example: Example, shelf: Shelf | None) -> str:
    media = example.media()
    if shelf is None:
        return f'<td class="quiet" data-value="{len(media)}">{"not in this page" if media else ""}</td>'
    cells = []
    for tag, address, words in shelf.of_row(example):
        if tag == "audio":
            cells.append(f'<audio controls preload="none" src="{escape(address)}" title="{escape(words)}"></audio>')
        elif tag == "img":
            cells.append(f'<img loading="lazy" src="{escape(address)}" alt="{escape(words)}" title="{escape(words)}">')
        else:
            cells.append(f'<span class="quiet">{escape(words)}</span>')
    return f'<td data-value="{len(media)}">{"".join(cells)}</td>'
