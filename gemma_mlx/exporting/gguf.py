"""A trained model for llama.cpp and what builds on it (Ollama, LM Studio): GGUF files and a Modelfile."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from gemma_mlx.data.template_gemma3 import DEFAULT_TEMPLATE
from gemma_mlx.data.template_gemma3 import TURN_CLOSE as OLD_CLOSE
from gemma_mlx.data.template_gemma3 import TURN_OPEN as OLD_OPEN
from gemma_mlx.data.tokenizer import TURN_CLOSE, TURN_OPEN, Tokenizer
from gemma_mlx.errors import InputError
from gemma_mlx.exporting import hf
from gemma_mlx.exporting.base_files import TEMPLATE
from gemma_mlx.exporting.gguf_again import merge_gguf
from gemma_mlx.exporting.gguf_converter import TYPES, check_packages, convert
from gemma_mlx.exporting.gguf_limits import check_limits
from gemma_mlx.exporting.gguf_lora import ARCHITECTURES, write_lora
from gemma_mlx.exporting.gguf_tokenizer import complete
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.exporting.tensors import check_space
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.models.load import INDEX, stored_tensors
from gemma_mlx.progress import Reporter
from gemma_mlx.spec import ModelSpec, read_spec

MODELFILE = "Modelfile"
_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
_WITHOUT_TOWERS = {
    "gemma3": "Gemma3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM", "gemma3n": "Gemma3nForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration", "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
}  # fmt: skip
"""model_type -> what a config.json that does not name its architecture is."""


def write(source: Source, folder: Path, options: ExportOptions) -> list[str]:
    """Write the merged model, or with ``options.gguf_lora`` the adapter alone; returns lines to tell the user.

    A merged model is ``<name>-<type>.gguf``; its towers, where it has some, are ``mmproj-<name>-<type>.gguf``. An
    adapter alone is ``<name>-lora.gguf``. Beside them lies a Modelfile for Ollama.

    Raises:
        InputError: a package is missing, the converter does not take the model, or llama.cpp could not apply the
            adapter; and as `gemma_mlx.exporting.hf.write`.
    """
    spec = read_spec(source.base)
    model_type = spec.config["model_type"]
    if model_type not in ARCHITECTURES:
        raise InputError(f"--format gguf: llama.cpp's converter does not take a model of type {model_type}")
    check_limits(spec)
    name = name_of(source)
    if options.gguf_lora:
        return _lora(source, folder, spec, f"{name}-lora.gguf")
    kind = kind_of(options, spec)
    file = folder / f"{name}-{kind}.gguf"
    if is_gguf(source.base):
        changed = merge_gguf(
            source, file, kind, DEFAULT_TEMPLATE, Reporter(options.quiet).counter(f"{file.name}: tensors")
        )
        lines, towers = [f"{changed} tensors changed by the adapter; the rest is the base's, unpacked to {kind}"], None
    else:
        check_packages()
        lines, towers = _converted(source, folder, options, spec, file, kind)
    write_modelfile(folder, [file.name, *([towers.name] if towers else [])], None, spec, source.base)
    if towers:
        lines += notes(spec)
    return [*lines, command(file.name, towers.name if towers else None, None)]


def name_of(source: Source) -> str:
    """A file's name: the base's, and the run's or the adapter's."""
    parts = [Path(source.base_name).name.removesuffix(".gguf")]
    own = source.run or (source.adapter if source.kept is None else None)
    parts += [own.resolve().name] if own is not None else []
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)) or "model"


def kind_of(options: ExportOptions, spec: ModelSpec) -> str:
    """The type of the weights: as asked, else that of ``dtype``, else the base's own.

    Raises:
        InputError: another type than the four.
    """
    kind = options.gguf_type or _KINDS.get(options.dtype or spec.dtype, "bf16")
    if kind not in TYPES:
        raise InputError(f"--gguf-type {kind}: expected one of {', '.join(TYPES)}")
    return kind


def _lora(source: Source, folder: Path, spec: ModelSpec, name: str) -> list[str]:
    lines = write_lora(source, folder / name, spec.config["model_type"])
    template = Tokenizer(source.base, spec).chat_template
    if template is None:
        (folder / TEMPLATE).write_text(DEFAULT_TEMPLATE, encoding="utf-8")
    base = source.base.name if is_gguf(source.base) else f"{Path(source.base_name).name}.gguf"
    write_modelfile(folder, [base], name, spec, source.base)
    where = f"put {base} (the base as GGUF) beside {name}"
    return [*lines, where, command(base, None, name, None if template else TEMPLATE)]


def _converted(
    source: Source, folder: Path, options: ExportOptions, spec: ModelSpec, file: Path, kind: str
) -> tuple[list[str], Path | None]:
    """Merge into a checkpoint that is thrown away, and have it converted; (lines, the towers' file)."""
    say = Reporter(options.quiet)
    towers = folder / f"mmproj-{file.name}" if options.mmproj and has_towers(spec.config) else None
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=folder.parent) as temporary:
        tree = Path(temporary)
        lines = hf.write(source, tree, replace(options, dtype="float32" if kind == "f32" else None, bits=None))
        lines += prepare(tree, spec)
        check_space(folder, expected_bytes(tree, kind))
        convert(tree, file, kind, False, say)
        if towers:
            convert(tree, towers, kind, True, say)
    return lines, towers


def prepare(tree: Path, spec: ModelSpec) -> list[str]:
    """What the converter needs and the checkpoint may lack: architecture, template, its kind of tokenizer."""
    path = tree / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("architectures"):
        config["architectures"] = [_WITHOUT_TOWERS[config["model_type"]]]
    if config["model_type"].startswith("gemma4"):  # the converter asks for it of models without experts too
        config.get("text_config", config).setdefault("moe_intermediate_size", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    if config["model_type"].startswith("gemma3") and Tokenizer(tree, spec).chat_template is None:
        (tree / TEMPLATE).write_text(DEFAULT_TEMPLATE, encoding="utf-8")
    if config["model_type"] == "gemma3n":
        add_unread(tree, spec)
    return complete(tree, config["model_type"])


def add_unread(tree: Path, spec: ModelSpec) -> None:
    """Keys and values of Gemma 3n's upper layers, which nothing reads: llama.cpp does not load a file without them.

    Published checkpoints hold them; one that transformers saved does not, and gets zeros.
    """
    text, found = spec.text, {}
    width = text.num_key_value_heads * text.head_dim
    for i in range(text.num_hidden_layers - text.num_kv_shared_layers, text.num_hidden_layers):
        layer = f"model.language_model.layers.{i}.self_attn."
        found |= {f"{layer}{name}_proj.weight": mx.zeros((width, text.hidden_size)) for name in ("k", "v")}
        found[f"{layer}k_norm.weight"] = mx.zeros((text.head_dim,))
    held = stored_tensors(tree)
    missing = {name: tensor for name, tensor in found.items() if name not in held}
    if missing:
        mx.save_safetensors(str(tree / "model-unread.safetensors"), missing, metadata={"format": "pt"})
        (tree / INDEX).unlink(missing_ok=True)  # which does not name them


def has_towers(config: dict[str, Any]) -> bool:
    """Whether a config.json names a tower."""
    return any(config.get(part) for part in ("vision_config", "audio_config"))


def notes(spec: ModelSpec) -> list[str]:
    """Where llama.cpp reads media otherwise than the checkpoint means it."""
    if spec.config.get("vision_config") and not getattr(spec.text, "bidirectional_vision", True):
        return [
            "llama.cpp lets all slots of a picture see each other, which this checkpoint does not: answers to pictures "
            "may differ from those here"
        ]
    return []


def expected_bytes(tree: Path, kind: str) -> int:
    """About what the files of a checkpoint take as `kind`."""
    own = sum(file.stat().st_size for file in tree.glob("*.safetensors"))
    wide = 4.0 if kind == "f32" else 2.0
    return int(own * _BYTES[kind] / wide)


def write_modelfile(folder: Path, files: list[str], adapter: str | None, spec: ModelSpec, base: Path) -> None:
    """Ollama's recipe: the files, how turns are written, where an answer ends."""
    tokenizer = Tokenizer(base, spec)
    new = tokenizer.id_of(TURN_OPEN) is not None
    start, end = (TURN_OPEN, TURN_CLOSE) if new else (OLD_OPEN, OLD_CLOSE)
    lines = [f"FROM ./{file}" for file in files]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    lines += [f'TEMPLATE """{turns(start, end, system_turn=new)}"""', f'PARAMETER stop "{end}"']
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def turns(start: str, end: str, system_turn: bool) -> str:
    """A conversation in Ollama's template language; without system turns, what they say comes before the first user's.

    Args:
        start: opens a turn.
        end: closes it.
        system_turn: the format has a turn of that name.
    """
    role = '{{ if eq .Role "assistant" }}model{{ else }}' + ("{{ .Role }}" if system_turn else "user") + "{{ end }}"
    if system_turn:
        return f"{{{{ range .Messages }}}}{start}{role}\n{{{{ .Content }}}}{end}\n{{{{ end }}}}{start}model\n"
    return (
        "{{ $open := false }}{{ range .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{start}user\n{{{{ .Content }}}}\n\n{{{{ $open = true }}}}{{{{ else }}}}'
        f"{{{{ if not $open }}}}{start}{role}\n{{{{ end }}}}{{{{ .Content }}}}{end}\n{{{{ $open = false }}}}"
        f"{{{{ end }}}}{{{{ end }}}}{start}model\n"
    )


def command(model: str, towers: str | None, adapter: str | None, template: str | None = None) -> str:
    """How llama.cpp is started with these files."""
    parts = [f"llama-server -m {model}"]
    parts += [f"--mmproj {towers}"] if towers else []
    parts += [f"--lora {adapter}"] if adapter else []
    parts += [f"--chat-template-file {template}"] if template else []
    return "in this folder: " + " ".join([*parts, "--jinja"]) + "; or: ollama create NAME -f Modelfile"
