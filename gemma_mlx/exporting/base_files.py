"""What a checkpoint has beside its weights: tokenizer, templates, settings of generation and of the processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gemma_mlx import gguf_file
from gemma_mlx.data.tokenizer import Tokenizer
from gemma_mlx.models.load import INDEX
from gemma_mlx.spec import read_spec

TEMPLATE, TOKENIZER, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_LEFT = frozenset({"config.json", INDEX, "manifest.json", "adapter_config.json", "report.json"})
_NAMES = frozenset({"LICENSE", "NOTICE"})
_FOLDERS = ("additional_chat_templates",)


def base_files(base: Path) -> list[Path]:
    """The files of a checkpoint folder that go along with its weights, as paths within it."""
    top = [
        item
        for item in sorted(base.iterdir())
        if item.is_file()
        and not item.name.startswith(".")
        and item.name not in _LEFT
        and (item.suffix in _SUFFIXES or item.stem in _NAMES)
    ]
    deeper = [item for name in _FOLDERS for item in sorted((base / name).glob("*")) if item.is_file()]
    return [item.relative_to(base) for item in (*top, *deeper)]


def write_base_files(base: Path, folder: Path) -> None:
    """Copy these files byte for byte; of a GGUF file, make them from what it carries."""
    if gguf_file.is_gguf(base):
        _from_gguf(base, folder)
        return
    for file in base_files(base):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / file, folder / file)


def _from_gguf(base: Path, folder: Path) -> None:
    """The tokenizer as transformers loads it, the template, and the ids that end generation."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(base, read_spec(base))
    text = tokenizer.spec.text
    names = {"bos_token": text.bos_token_id, "eos_token": tokenizer.eos_id, "pad_token": text.pad_token_id}
    special = {name: found for name, i in names.items() if (found := tokenizer.text_of(i))}
    special |= {"unk_token": "<unk>"} if tokenizer.id_of("<unk>") is not None else {}
    made = gguf_file.tokenizer(base)
    if bos := special.get("bos_token"):  # the published tokenizers put it before every text
        made.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B:1", [(bos, text.bos_token_id)])
    made.save(str(folder / TOKENIZER))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    _write(folder / TOKENIZER_CONFIG, settings)
    _write(
        folder / GENERATION,
        {"bos_token_id": text.bos_token_id, "eos_token_id": list(tokenizer.eos_ids), "pad_token_id": text.pad_token_id},
    )
    if tokenizer.chat_template:
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
