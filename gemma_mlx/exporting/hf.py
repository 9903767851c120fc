"""A merged checkpoint as Hugging Face has it, or packed again for MLX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mlx.exporting.base_files import write_base_files
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.exporting.packed import packed_entries
from gemma_mlx.exporting.tensors import NAMES, write_tensors
from gemma_mlx.exporting.tree import Tree, dtype_name, open_tree, plain_entries
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.progress import Reporter, megabytes

_QUANTIZED = ("quantization", "quantization_config")
_DTYPE = ("dtype", "torch_dtype")
_PARTS = ("text_config", "vision_config", "audio_config")


def write(source: Source, folder: Path, options: ExportOptions) -> list[str]:
    """Write the base with the adapter merged into it, as a whole checkpoint; returns lines to tell the user.

    The base may be in transformers' layout, a conversion for MLX (quantized or not) or a GGUF file; what comes out is
    in transformers' layout and floating point, or with ``options.bits`` in MLX's and packed. Files of the tokenizer,
    the templates and the processors are the base's byte for byte; of a GGUF file they are made from what it carries.

    Raises:
        InputError: as `gemma_mlx.models.load_model` and `attach`; a dtype that does not exist or cannot hold a value;
            no room on the disk.
    """
    dtype = dtype_name(options.dtype)
    tree = open_tree(source)
    changed, config = len(tree.changed), config_text(source, tree, options)
    if options.bits:
        entries, settings = packed_entries(tree, options.bits, dtype)
        config = json.dumps({**json.loads(config), **settings}, indent=2).encode() + b"\n"
    else:
        entries = plain_entries(tree, dtype)
    del tree  # its arrays belong to the entries now, which are let go one by one
    total, tensors = sum(entry.nbytes for entry in entries), sum(len(entry.parts) for entry in entries)
    told = megabytes(Reporter(options.quiet), "written", total)
    write_tensors(folder, entries, options.shard_bytes, "mlx" if options.bits else "pt", told)
    (folder / "config.json").write_bytes(config)
    write_base_files(source.base, folder)
    return [f"{tensors} tensors, {total / 1e9:.2f} GB; {changed} of them changed by the adapter"]


def config_text(source: Source, tree: Tree, options: ExportOptions) -> bytes:
    """config.json: the base's byte for byte, unless the weights are no longer as it says."""
    spec_config = tree.model.spec.config
    own = source.base / "config.json"
    if not is_gguf(source.base):
        text = own.read_bytes()
        config = json.loads(text)
        if config == spec_config and options.dtype is None and not any(key in config for key in _QUANTIZED):
            return text
    config = {key: value for key, value in spec_config.items() if key not in _QUANTIZED}
    if is_gguf(source.base):
        config = {key: value for key, value in config.items() if value is not None}
        config |= {"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}
    return json.dumps(with_dtype(config, options.dtype or _name(tree.dtype)), indent=2).encode() + b"\n"


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says this dtype, in its parts too where they say one."""
    config = {key: value for key, value in config.items() if key not in _DTYPE} | {"dtype": dtype}
    for part in _PARTS:
        inner = config.get(part)
        if isinstance(inner, dict) and any(key in inner for key in _DTYPE):
            config[part] = {key: value for key, value in inner.items() if key not in _DTYPE} | {"dtype": dtype}
    return config


def _name(stored: str) -> str:
    """ "BF16" -> "bfloat16"."""
    return next(str(dtype) for dtype, name in NAMES.items() if name == stored).removeprefix("mlx.core.")
