"""Tiny checkpoints that llama.cpp can compute, with a tokenizer, random adapters, and both programs' logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import adapter_pairs as pairs
import llama
import mlx.core as mx
import numpy as np
import tiny
import tiny_gemma3
import tiny_gemma3n
import tiny_gguf
from mlx.utils import tree_flatten, tree_unflatten

from gemma_mlx import gguf_file
from gemma_mlx.exporting import gguf
from gemma_mlx.exporting.gguf_lora import import_gguf
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.merging import merge

ROWS_3N = 512
LIKE_3N = dict(  # llama.cpp has twenty layers with own keys, ten sparse ones and two widths fixed
    hidden_size_per_layer_input=256, laurel_rank=64,
    num_hidden_layers=25, layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 5, num_kv_shared_layers=5,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 15, vocab_size=ROWS_3N + 32, vocab_size_per_layer_input=ROWS_3N,
)  # fmt: skip
MAKERS = {
    "E2B": partial(tiny.make, seed=10, text=dict(num_kv_shared_layers=5)),
    "E4B": partial(tiny.make, seed=34, text={**pairs.E4B, "num_kv_shared_layers": 6}),
    "31B": pairs.MAKERS["31B"],
    "26B": pairs.MAKERS["26B"],
    "12B": pairs.MAKERS["12B"],
    "3n": partial(
        tiny_gemma3n.make, seed=4, text=LIKE_3N, vision=dict(vocab_offset=ROWS_3N),
        audio=dict(vocab_offset=ROWS_3N + tiny_gemma3n.NV),
    ),
    "Gemma 3": partial(tiny_gemma3.make, seed=0, query_pre_attn_scalar=tiny_gemma3.TEXT["head_dim"]),
}  # fmt: skip
PER_LAYER = "decoder,per_layer_input_gate,per_layer_projection"
TARGETS = {
    "E2B": PER_LAYER, "E4B": PER_LAYER, "26B": "decoder,router.proj", "3n": f"{PER_LAYER},linear_left,linear_right",
}  # fmt: skip
TOKENS = 48  # six times the window
QUIET = partial(ExportOptions, quiet=True)


@dataclass
class Pair:
    """A base, an adapter on it, and our float32 logits with it."""

    base: Path
    adapter: Path
    ids: list[int]
    logits: np.ndarray

    def export(self, out: Path, adapter: bool = True, **options) -> tuple[Path, list[str]]:
        """(the model's or the adapter's file, what the user is told)."""
        out.mkdir()
        source = Source(self.base, "tiny", adapter=self.adapter if adapter else None)
        lines = gguf.write(source, out, QUIET(**options))
        return next(f for f in sorted(out.glob("*.gguf")) if not f.name.startswith("mmproj")), lines


def save_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of 512 tokens with merges, in the form of Gemma's own."""
    file = tiny_gguf.write(folder / "vocabulary.gguf", tiny_gemma3.make(folder / "unused"))
    gguf_file.tokenizer(file).save(str(folder / "tokenizer.json"))
    file.unlink()
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pair(name: str, folder: Path, targets: str | None = None) -> Pair:
    """A family's tiny checkpoint with a random adapter."""
    base = folder / "base"
    MAKERS[name](base)
    save_tokenizer(base)
    targets = targets or TARGETS.get(name, "decoder")
    model, adapter = pairs.adapted(name, base, folder / "adapter", targets)
    ids = [2, *np.random.default_rng(5).integers(12, 280, TOKENS - 1).tolist()]
    return Pair(base, adapter, ids, logits(model, ids))


def logits(model, ids) -> np.ndarray:
    """[len(ids), vocabulary] of one row of text."""
    return np.array(model(input_ids=mx.array([ids]), mm_token_type_ids=mx.zeros((1, len(ids)), mx.int32)))[0]


def rounded(model, kind: str):
    """The model with its adapter merged and the decoder's matrices rounded to a GGUF type, where its blocks fit."""
    gguf_package, found = import_gguf(), []
    merge(model)
    number, wide = gguf_package.GGMLQuantizationType[kind.upper()], gguf_package.GGMLQuantizationType.F16
    for path, tensor in tree_flatten(model.model.language_model.parameters()):
        if tensor.ndim == 2:
            own = wide if kind == "q8_0" and tensor.shape[1] % 32 else number  # the converter's choice
            packed = gguf_package.quantize(np.array(tensor), own)
            tensor = mx.array(gguf_package.dequantize(packed, own).astype(np.float32).reshape(tensor.shape))
        found.append((path, tensor))
    model.model.language_model.update(tree_unflatten(found))
    return model


def as_float32(file: Path, out: Path) -> Path:
    """A Gemma 4 GGUF file's values and metadata, all tensors as float32."""
    gguf_package = import_gguf()
    reader, writer = gguf_package.GGUFReader(file), gguf_package.GGUFWriter(out, "gemma4")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), *[*field.types, None][:2])
    for t in reader.tensors:
        values = gguf_package.dequantize(t.data, t.tensor_type).astype(np.float32)
        writer.add_tensor(t.name, values.reshape(tuple(reversed(t.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def compared(
    what: str, ours: np.ndarray, file: Path, ids: list[int], lora: tuple[Path, ...] = ()
) -> tuple[float, float]:
    """(smallest cosine over positions, largest difference) of our logits and llama.cpp's; prints them."""
    with llama.Model(file, lora) as model:
        theirs = model.logits(ids)[:, : ours.shape[1]]
        assert set(model.settings()) == {"f32"}
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    far = float(np.abs(ours - theirs).max())
    print(
        f"{what}: cosine >= {cosine.min():.7f} over {len(ids)} positions, difference <= {far:.1e}, std {ours.std():.2f}"
    )
    return float(cosine.min()), far
