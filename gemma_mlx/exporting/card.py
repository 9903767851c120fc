"""The model card of an export: README.md with the metadata that the Hub reads.

It says what is known of the base, the data, the settings and the scores. It never holds a row's text, a path of this
machine or a prompt: those may be private.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gemma_mlx import __version__
from gemma_mlx.config import CONFIG_FILE, read_yaml
from gemma_mlx.exporting.card_data import data_lines, data_summary, score_lines
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.lora import read_adapter_config
from gemma_mlx.spec import read_spec

CARD = "README.md"
SETTINGS = (
    "targets", "full", "rank", "alpha", "dora", "dropout", "quantize", "dtype", "epochs", "steps", "batch_size",
    "accumulate", "packing", "lr", "schedule", "warmup", "min_lr", "weight_decay", "optimizer", "clip", "seed",
    "train_on", "audio_window", "image_tokens",
)  # fmt: skip
"""Options of a run that a card may show: numbers and choices."""
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_TERMS = {"gemma3n": "gemma", "gemma3_text": "gemma"}
"""Licences by model type, where every published checkpoint of it has the same."""
_LIBRARY = {"hf": "transformers", "peft": "peft", "mlx": "mlx", "gguf": "gguf"}
_RELATION = {"hf": "finetune", "peft": "adapter", "mlx": "adapter", "gguf": "quantized"}


def write_card(
    folder: Path, source: Source, form: str, options: ExportOptions, scores: str | Path | None = None
) -> None:
    """Write README.md.

    Args:
        folder: the export, its other files already there.
        source: what was exported.
        form: the format's name.
        options: how it was written.
        scores: an evaluation's folder.

    Raises:
        InputError: `scores` holds no report that can be read.
    """
    config = read_yaml(source.run / CONFIG_FILE) if source.run else {}
    summary = data_summary(source.run, config)
    header = metadata(source, form, options, config, summary)
    parts = [
        f"# {title(source)}",
        _about(source, form, options, header),
        "## How to use it\n\n" + usage(folder, source, form, options),
        "## Data\n\n" + data_lines(summary),
        "## Training\n\n" + _settings(source, config),
        "## Scores\n\n" + score_lines(source.run, scores),
        "## Licence\n\n" + _licence(header),
        "## Intended use and limits\n\n" + _limits(),
    ]
    text = "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(parts) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def title(source: Source) -> str:
    """The card's heading."""
    name = source.shown_name.rpartition("/")[2]
    return f"{name}, fine-tuned" if source.adapter is not None else name


def metadata(
    source: Source, form: str, options: ExportOptions, config: dict[str, Any], summary: dict[str, Any]
) -> dict[str, Any]:
    """The header of the card."""
    spec, found = read_spec(source.base), {}
    if name := source.public_name:
        found["base_model"] = name
        found["base_model_relation"] = "quantized" if source.adapter is None and form == "gguf" else _RELATION[form]
    if licence := licence_of(source):
        found["license"] = licence
    found["library_name"] = "mlx" if options.bits else _LIBRARY[form]
    media = spec.vision is not None or spec.audio is not None
    found["pipeline_tag"] = "image-text-to-text" if media else "text-generation"
    if languages := [name for name in summary.get("languages", {}) if re.fullmatch(r"[a-z]{2,3}", name)]:
        found["language"] = languages
    if dataset := _DATASET.match(str(config.get("data") or "")):
        found["datasets"] = [dataset[1]]
    found["tags"] = ["gemma", "gemma-mlx", *_kinds(source), *(["mlx"] if form == "mlx" else [])]
    return found


def _kinds(source: Source) -> list[str]:
    """lora or dora, full: what was trained."""
    if source.adapter is None:
        return []
    read = read_adapter_config(source.adapter)
    kinds = ["dora" if read["dora"] else "lora"] if read["keys"] else []
    return kinds + (["full-fine-tuning"] if read["modules"] else [])


def licence_of(source: Source) -> str | None:
    """The base's licence: what its card says, else what is known of its kind; None where nothing is."""
    card = source.base / CARD
    if card.is_file():
        found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            header = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            header = None
        if isinstance(header, dict) and isinstance(header.get("license"), str):
            return header["license"]
    kind = read_spec(source.base).config["model_type"]
    if kind in _TERMS:
        return _TERMS[kind]
    return "apache-2.0" if (source.public_name or "").startswith("google/gemma-4") else None


def _about(source: Source, form: str, options: ExportOptions, header: dict[str, Any]) -> str:
    base = source.shown_name + (f" at revision `{source.revision}`" if source.revision else "")
    kinds = {
        "hf": "merged weights in Hugging Face's layout",
        "peft": "an adapter for PEFT",
        "mlx": "an adapter for MLX (mlx-lm, mlx-vlm)",
        "gguf": "an adapter for llama.cpp (GGUF)" if options.gguf_lora else "merged weights for llama.cpp (GGUF)",
    }
    what = f"merged weights for MLX, packed in {options.bits} bits" if options.bits else kinds[form]
    lines = [f"{what[0].upper()}{what[1:]}, written by gemma-mlx {__version__}.", f"- Base: {base}"]
    if "base_model" not in header:
        lines[-1] += " (named by a path; its Hub id is not known)"
    if source.adapter is not None:
        lines.append(f"- Trained: {', '.join(_kinds(source))}" + (f", step {source.step}" if source.step else ""))
    return "\n".join([lines[0], "", *lines[1:], "- Digests of all files: `manifest.json`"])


def _settings(source: Source, config: dict[str, Any]) -> str:
    """Hyperparameters as a table."""
    if source.adapter is None:
        return "The base's weights; nothing was trained here."
    if not config:
        read = read_adapter_config(source.adapter)
        return f"Not known beyond the adapter's files: rank {read['rank']}, scale {read['scale']:g}."
    if config.get("steps"):  # they decide; epochs would then say what was not done
        config = {name: value for name, value in config.items() if name != "epochs"}
    rows = [f"| {name} | {config[name]} |" for name in SETTINGS if config.get(name) not in (None, False, "", [])]
    return "\n".join(["| option | value |", "| --- | --- |", *rows])


def _licence(header: dict[str, Any]) -> str:
    if header.get("license") == "gemma":
        return "The base is under the Gemma terms of use (https://ai.google.dev/gemma/terms), and so is this model."
    if "license" in header:
        return f"That of the base: {header['license']}."
    return "The base's files do not say under which licence they are; find out before passing this model on."


def _limits() -> str:
    return (
        "For the task and the kind of data that it was trained on. Outside of them it may be worse than its base, and "
        "what the base's card says of bias, safety and languages holds here too. Its answers can be wrong: check them "
        "where it matters."
    )


def usage(folder: Path, source: Source, form: str, options: ExportOptions) -> str:
    """Code that loads the export."""
    if options.bits:
        media = read_spec(source.base).vision is not None
        return _code("bash", f"python -m {'mlx_vlm.generate' if media else 'mlx_lm generate'} --model . --prompt Hello")
    return {"hf": _use_hf, "peft": _use_peft, "mlx": _use_mlx, "gguf": _use_gguf}[form](folder, source)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _class(base: Path) -> str:
    spec = read_spec(base)
    text_only = is_gguf(base) or spec.config["model_type"] == "gemma3_text"
    return "AutoModelForCausalLM" if text_only else "AutoModelForImageTextToText"


def _processor(base: Path) -> str:
    return "AutoTokenizer" if _class(base) == "AutoModelForCausalLM" else "AutoProcessor"


def _use_hf(folder: Path, source: Source) -> str:
    model, processor = _class(source.base), _processor(source.base)
    return _code(
        "python",
        f"""
from transformers import {model}, {processor}

model = {model}.from_pretrained("PATH_OR_ID", dtype="auto")
processor = {processor}.from_pretrained("PATH_OR_ID")
""",
    )


def _use_peft(folder: Path, source: Source) -> str:
    model = _class(source.base)
    base = '"PATH_OR_ID/base"' if (folder / "base").is_dir() else f'"{source.shown_name}"'
    return _code(
        "python",
        f"""
from peft import PeftModel
from transformers import {model}

base = {model}.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "PATH_OR_ID")
""",
    )


def _use_mlx(folder: Path, source: Source) -> str:
    program = "mlx_lm generate" if _class(source.base) == "AutoModelForCausalLM" else "mlx_vlm.generate"
    place = "mlx-vlm" if program == "mlx_vlm.generate" and (folder / "mlx-vlm").is_dir() else "."
    return _code("bash", f"python -m {program} --model {source.shown_name} --adapter-path {place} --prompt Hello")


def _use_gguf(folder: Path, source: Source) -> str:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    towers = next((name for name in files if "mmproj" in name), None)
    adapter = next((name for name in files if "lora" in name), None)
    model = next((name for name in files if name not in (towers, adapter)), "BASE.gguf")
    parts = [f"llama-cli -m {model}"]
    parts += [f"--lora {adapter}"] if adapter else []
    if towers:
        parts[0] = f"llama-mtmd-cli -m {model} --mmproj {towers}"
    return _code("bash", " ".join(parts) + " -p Hello")
