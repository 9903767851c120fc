"""A base that is a GGUF file itself, with an adapter merged into it, as a GGUF file of one floating type (or Q8_0).

Metadata and vocabulary are the base's, so no converter is needed. llama.cpp's norms are one more than Gemma 3's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.exporting.gguf_lora import import_gguf
from gemma_mlx.exporting.options import Source
from gemma_mlx.exporting.tensors import check_space
from gemma_mlx.exporting.tree import Tree, open_tree, rows_of
from gemma_mlx.gguf_file import open_gguf
from gemma_mlx.models.gguf import gguf_path

TEMPLATE_KEY = "tokenizer.chat_template"
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_WRITTEN = ("GGUF.", "general.architecture", "general.file_type")


def merge_gguf(source: Source, path: Path, kind: str, template: str, count: Callable[[int, int], None]) -> int:
    """Write the merged model; returns how many tensors the adapter changed.

    Args:
        source: its base is a GGUF file.
        path: the file to write.
        kind: of matrices: "f32", "f16", "bf16" or "q8_0"; vectors stay float32.
        template: a chat template for a base that carries none.
        count: is told (tensors written, of how many).
    """
    gguf = import_gguf()
    reader, tree = open_gguf(source.base), open_tree(source)
    check_space(path.parent, sum(int(np.prod(t.shape)) for t in reader.tensors) * {"f32": 4, "q8_0": 1}.get(kind, 2))
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, field in reader.fields.items():
        if not key.startswith(_WRITTEN):
            kinds = [*field.types, None]
            writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    if TEMPLATE_KEY not in reader.fields:
        writer.add_chat_template(template)
    types = {t.name: _type(gguf, t, kind) for t in reader.tensors}
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape.tolist()))
        raw = gguf.quant_shape_to_byte_shape(shape, types[t.name]) if types[t.name].name == "Q8_0" else shape
        size = int(np.prod(raw)) * (1 if raw is not shape else {"F32": 4}.get(types[t.name].name, 2))
        writer.add_tensor_info(t.name, raw, np.dtype(np.uint8 if raw is not shape else np.float32), size, types[t.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, t in enumerate(reader.tensors):
        writer.write_tensor_data(gguf.quantize(_values(gguf, tree, t), types[t.name]))
        count(i + 1, len(reader.tensors))
    writer.close()
    return len(tree.changed)


def _type(gguf: Any, tensor: Any, kind: str) -> Any:
    """Matrices of `kind`, whatever else float32, as the converter does."""
    return gguf.GGMLQuantizationType[kind.upper() if len(tensor.shape) > 1 else "F32"]


def _values(gguf: Any, tree: Tree, tensor: Any) -> np.ndarray:
    """A tensor's float32 values with the adapter in them; what it leaves alone is the file's own."""
    path = gguf_path(tensor.name)
    if path not in tree.changed:
        shape = tuple(reversed(tensor.shape.tolist()))
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    values = np.array(rows_of(tree.model, path)(slice(None))).astype(np.float32)
    return values + 1.0 if "norm" in tensor.name else values
