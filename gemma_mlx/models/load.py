"""Checkpoints: a folder of safetensors -> a model with lazy weights, and back."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.models.families import build, float_dtype
from gemma_mlx.models.gguf import gguf_weights
from gemma_mlx.models.names import (
    channels_last_parts,
    may_be_dropped,
    module_path,
    part_of,
    stored_name,
    to_mlx_axes,
    to_torch_axes,
)
from gemma_mlx.models.quantize import expect_packed, packing, put_module, quantize_model, quantized_paths
from gemma_mlx.models.stacks import settle
from gemma_mlx.models.tables import DISK_BYTES, TABLE, DiskTable, tables_on_disk
from gemma_mlx.spec import AudioSpec, ModelSpec, read_spec

if TYPE_CHECKING:
    from gemma_mlx.data.processor import Processor

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES |= {"U32": 4, "U16": 2, "U64": 8}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    name: str
    shape: tuple[int, ...]
    file: Path
    dtype: str
    """safetensors' name of it: "BF16"."""
    offset: int
    """Of its first byte in the file."""


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors that a safetensors file says it holds, after checking that its bytes are all there.

    MLX reads lazily, so that a cut-off file would fail in the middle of a run, or not at all.

    Raises:
        InputError: unreadable, not safetensors, or shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length)) if length < size else None
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except (OSError, struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file, or cut off within its header; download it again")
    header.pop("__metadata__", None)
    tensors, end = [], 0
    for name, entry in header.items():
        try:
            start, stop = entry["data_offsets"]
            shape, item = tuple(map(int, entry["shape"])), _ITEM_BYTES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: the header's entry for {name} is malformed; download the file again") from None
        if item is None:
            raise InputError(f"{path}: {name} has dtype {entry['dtype']}, which is not supported")
        if stop - start != item * math.prod(shape):
            raise InputError(f"{path}: {name} {list(shape)} takes {stop - start} bytes; the header is corrupt")
        tensors.append(StoredTensor(name, shape, path, entry["dtype"], 8 + length + start))
        end = max(end, stop)
    if size != 8 + length + end:
        raise InputError(f"{path}: {size} bytes, but its header promises {8 + length + end}; download it again")
    return tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those of its index, else the single file.

    Raises:
        InputError: none, or a file of the index is missing.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder}: found neither model.safetensors nor {INDEX}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: expected a JSON object with a 'weight_map'") from None
    missing = [n for n in names if not (folder / n).exists()]
    if missing:
        raise InputError(f"{index}: names {', '.join(missing)}, missing from the folder; download again")
    return [folder / n for n in names]


def _indexed_names(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Raise where the index places a tensor in a file that does not hold it."""
    index = folder / INDEX
    if not index.exists():
        return
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        found = stored.get(name)
        if found is None or found.file.name != file:
            raise InputError(f"{index}: {name} should be in {file}, which does not hold it")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of all that the files hold.

    Raises:
        InputError: a file is missing or damaged, or a tensor is in two.
    """
    stored: dict[str, StoredTensor] = {}
    for file in checkpoint_files(folder):
        for tensor in read_header(file):
            if tensor.name in stored:
                raise InputError(f"{file}: {tensor.name} is also in {stored[tensor.name].file.name}")
            stored[tensor.name] = tensor
    _indexed_names(folder, stored)
    return stored


def without_absent_media(spec: ModelSpec, names: Iterable[str], where: str | Path) -> ModelSpec:
    """The spec without the media that config.json promises and a conversion leaves out whole; warns of it.

    mlx-lm converts the text decoder alone and leaves `audio_config` where it is. Only files in MLX's spelling, or
    quantized ones, are taken for conversions: in any other a tower that is not there is a tower that is missing.

    Args:
        spec: of config.json.
        names: of all stored tensors.
        where: for the warning.
    """
    names = set(names)
    if "quantization" not in spec.config and not any(name.startswith("language_model.") for name in names):
        return spec
    held = {part_of(module_path(name)) for name in names}
    parts = {"vision": ("vision_tower", "vision_embedder", "embed_vision"), "audio": ("audio_tower", "embed_audio")}
    absent = [
        kind
        for kind, modules in parts.items()
        if getattr(spec, kind) is not None and held.isdisjoint(f"model.{module}" for module in modules)
    ]
    if not absent:
        return spec
    warnings.warn(f"{where}: this conversion holds nothing for {' and '.join(absent)}; loaded without", stacklevel=3)
    config = spec.config | {f"{kind}_config": None for kind in absent}
    return replace(spec, config=config, **dict.fromkeys(absent))


def _match(
    folder: Path, stored: dict[str, StoredTensor], model: Any, allow_unexpected: bool
) -> dict[str, tuple[StoredTensor, tuple[int, ...] | None]]:
    """Module path -> (stored tensor, axes to transpose) for every parameter of the model.

    Modules whose weights the files hold quantized become quantized ones.

    Raises:
        InputError: a tensor is missing, has another shape, or is not expected.
    """
    spec = model.spec
    shapes = {module_path(t.name, spec.unified): t.shape for t in stored.values()}
    expect_packed(model, shapes, spec.config, str(folder))
    wanted = {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
    channels_last = channels_last_parts(shapes, wanted)
    matched, unexpected = {}, []
    for tensor in stored.values():
        path = module_path(tensor.name, spec.unified)
        if path not in wanted:
            if not may_be_dropped(path, spec) and not may_be_dropped(tensor.name, spec):
                unexpected.append(tensor.name)
            continue
        axes = to_mlx_axes(path, tensor.shape, wanted[path], part_of(path) in channels_last)
        if axes is None and tensor.shape != wanted[path]:
            raise InputError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, but config.json makes it "
                f"{list(wanted[path])}"
            )
        matched[path] = (tensor, axes)
    if missing := sorted(set(wanted) - set(matched)):
        shape = list(wanted[missing[0]])
        raise InputError(f"{folder}: {len(missing)} missing tensors: {_some(missing)} (the first has shape {shape})")
    if unexpected and not allow_unexpected:
        file = stored[unexpected[0]].file
        raise InputError(
            f"{file}: {len(unexpected)} unexpected tensors: {_some(sorted(unexpected))}; "
            "--allow-unexpected ignores them"
        )
    return matched


def chosen_dtype(name: str | None, spec: ModelSpec) -> mx.Dtype:
    """The dtype by name; by default the checkpoint's own on a GPU, and float32 on a CPU, where bfloat16 is slow."""
    if name is None:
        name = spec.dtype if mx.default_device().type == mx.gpu else "float32"
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _leave_on_disk(model: Any, matched: dict[str, tuple[StoredTensor, Any]], dtype: mx.Dtype, disk_bytes: int) -> None:
    """Put a `DiskTable` in the place of a per-layer table of so many bytes, and take its tensors off the list."""
    for path in {path.rpartition(".")[0] for path in matched if TABLE in path.split(".")}:
        stored = {name.removeprefix(f"{path}."): t for name, (t, _) in matched.items() if name.startswith(f"{path}.")}
        table = DiskTable(stored, dtype, **packing(model, path))
        if table.nbytes >= disk_bytes:
            put_module(model, path, table)
            for name in stored:
                del matched[f"{path}.{name}"]


def _weights(
    folder: Path, stored: dict[str, StoredTensor], model: Any, dtype: mx.Dtype, allow_unexpected: bool, disk_bytes: int
) -> list[tuple[str, mx.array]]:
    """(module path, lazy weight) of every parameter, from safetensors."""
    matched = _match(folder, stored, model, allow_unexpected)
    _leave_on_disk(model, matched, dtype, disk_bytes)
    files = {file: mx.load(str(file)) for file in {t.file for t, _ in matched.values()}}
    weights = []
    for path, (tensor, axes) in matched.items():
        array = files[tensor.file][tensor.name]
        array = array if axes is None else array.transpose(axes)
        # Packed weights are integers and stay as they are.
        weights.append((path, array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array))
    return weights


def load_model(
    folder: str | Path,
    dtype: str | None = None,
    allow_unexpected: bool = False,
    audio_window: int = 12,
    vision_runs: str = "sliding",
    quantize: int | None = None,
    disk_bytes: int | None = None,
) -> Any:
    """The model of a checkpoint folder, all weights frozen and none read yet (MLX reads them at first use).

    Args:
        folder: config.json with model.safetensors, or with an index and its shards; or a GGUF file of Gemma 3, which
            is unpacked as it is read. Of a conversion that leaves towers out, what it holds (with a warning).
        dtype: "float32", "bfloat16" or "float16"; None for the checkpoint's own on a GPU and float32 on a CPU.
        allow_unexpected: ignore tensors that the model has no place for. The key and value tensors that published
            files hold for layers that share another layer's are always ignored.
        audio_window: keys that an audio frame attends to, itself included: 12 (transformers) or 13 (Google's JAX).
        vision_runs: in which layers the slots of a picture see each other, where the checkpoint has them do so:
            "sliding" (transformers' Gemma 4, and vLLM for all sizes) or "all", whatever the window (what transformers
            5.23 does in the forward of ``Gemma4Unified``, the 12B, though not with a static cache).
        quantize: 4, 6 or 8 bits for the decoder's matrices, which are then read and packed here, one by one; None for
            what the files hold, be it quantized or not.
        disk_bytes: a table of per-layer embeddings at least this large stays in its file; the rows of a batch are read
            from there. The values are the same. None: 256 MiB.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, misshapen or unexpected; it is named.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    if isinstance(spec.audio, AudioSpec):
        spec = replace(spec, audio=replace(spec.audio, attention_window=audio_window))
    if vision_runs not in ("sliding", "all"):
        raise InputError(f"vision_runs {vision_runs!r}: expected 'sliding' or 'all'")
    if hasattr(spec.text, "vision_runs"):
        spec = replace(spec, text=replace(spec.text, vision_runs=vision_runs))
    stored = {} if is_gguf(folder) else stored_tensors(folder)
    spec = without_absent_media(spec, stored, folder)
    target = chosen_dtype(dtype, spec)
    model = build(spec)
    if is_gguf(folder):
        wanted = {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
        weights = gguf_weights(folder, wanted, target, allow_unexpected)
    else:
        least = DISK_BYTES if disk_bytes is None else disk_bytes
        weights = _weights(folder, stored, model, target, allow_unexpected, least)
    model.load_weights(weights)
    settle(model)
    model.freeze()
    if quantize is not None:
        del weights  # they would keep every float weight that is packed now
        quantize_model(model, quantize)
    return model


def not_finite(model: Any, tables: bool = False) -> list[str]:
    """A line for each tensor that holds NaN or infinity (clip bounds may be infinite). Reads all weights.

    `tables`: read those that are left on disk too.
    """
    problems = []
    for name, array in tree_flatten(model.parameters()):
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        bad = mx.isnan(array) if name.endswith(("_min", "_max")) else ~mx.isfinite(array)
        if count := int(bad.sum().item()):
            problems.append(_bad_line(name, count, array.size))
    for path, table in tables_on_disk(model).items() if tables else ():
        rows, width = table.shape
        pieces = (np.arange(i, min(i + 4096, rows)) for i in range(0, rows, 4096))
        if count := sum(int((~mx.isfinite(table(ids))).sum().item()) for ids in pieces):
            problems.append(_bad_line(f"{path}.weight", count, rows * width))
    return problems


def _bad_line(name: str, count: int, size: int) -> str:
    return f"{name}: {count} of {size} values are not finite; download the checkpoint again"


def check_finite(model: Any, where: str | Path) -> None:
    """Raise InputError where a weight of the checkpoint `where` is not a number: all answers would be none."""
    if problems := not_finite(model):
        more = f" ({len(problems) - 1} more tensors too)" if len(problems) > 1 else ""
        raise InputError(f"{where}: {problems[0]}{more}")


def _shards(tensors: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    """Tensors in order, cut into groups of at most `SHARD_BYTES`."""
    shards, size = [{}], 0
    for name, array in tensors.items():
        if size and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def save_model(model: Any, folder: str | Path) -> None:
    """Write config.json and safetensors that transformers and `load_model` read: its names, torch's layouts.

    Every file is written beside its place and renamed; the weights come before config.json.

    Raises:
        InputError: the model holds an adapter (weights that a checkpoint has no names for), or is quantized.
    """
    folder = Path(folder)
    if packed := [*quantized_paths(model), *(path for path, t in tables_on_disk(model).items() if t.packed)]:
        raise InputError(f"{folder}: {len(packed)} matrices are quantized; load the base without quantizing to save it")
    own = {name for name, _ in tree_flatten(build(model.spec).parameters())}
    params = dict(tree_flatten(model.parameters()))
    params |= {f"{path}.weight": table.whole() for path, table in tables_on_disk(model).items()}
    if extra := sorted(set(params) ^ own):
        raise InputError(f"{folder}: not weights of a checkpoint: {_some(extra)}; merge the adapter first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, array in params.items():
        axes = to_torch_axes(name, array.ndim)
        tensors[stored_name(name, model.spec.unified)] = array if axes is None else mx.contiguous(array.transpose(axes))
    shards = _shards(tensors)
    files = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        files |= dict.fromkeys(shard, file)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            mx.save_safetensors(f"{part}/{file}", shard, metadata={"format": "pt"})
            os.replace(f"{part}/{file}", folder / file)
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)  # of an earlier save: it would be read first
    else:
        total = sum(a.nbytes for a in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    dtype = str(float_dtype(model)).removeprefix("mlx.core.")
    _write_json(folder / "config.json", {**model.spec.config, "dtype": dtype})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself (a GGUF file too), or the local copy of a Hub repository, downloaded if need be.

    Raises:
        InputError: neither a folder nor a repository that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    if is_gguf(path):
        raise InputError(f"model {path}: no such file")
    name = str(model)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise InputError(f"model {name}: no such folder, and not a Hub id (organisation/name)")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.jinja", "*.model"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as e:  # offline, gated, unknown: huggingface_hub has a dozen classes for these
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"model {name}: not a local folder, and the Hub did not give it ({reason})") from e


def load(
    model: str | Path,
    quantize: int | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_unexpected: bool = False,
    audio_window: int | None = None,
    adapter_weights: Sequence[float] | None = None,
    image_tokens: int | None = None,
) -> tuple[Any, Processor]:
    """A model and its processor, from a folder or a Hub id.

    The processor is lazy: a folder without a tokenizer loads too.

    Args:
        model: folder, or Hub id such as "google/gemma-4-E2B-it".
        quantize: as for `load_model`; None for what the adapter was trained on.
        adapter: folder of a saved adapter (of this library, PEFT, mlx-lm or mlx-vlm), a run's folder or a Hub id,
            attached to the model; of several the weighted sum.
        adapter_weights: what each adapter counts; 1 by default.
        dtype, allow_unexpected: as for `load_model`.
        audio_window: as for `load_model`; None for the one that the adapter was trained with, else 12.
        revision: branch, tag or commit of a Hub repository.
        image_tokens: soft tokens that a picture may take; None for what the adapter was trained with.

    Raises:
        InputError: as `load_model`; the model cannot be found; an adapter does not fit; adapters were trained with
            other values of what is None here.
    """
    folder = resolve(model, revision)
    from gemma_mlx.adapters.attach import attach
    from gemma_mlx.data.processor import Processor
    from gemma_mlx.lora import remembered_options

    if adapter_weights and adapter is None:
        raise InputError("adapter_weight: there is no adapter to weight; name it")
    used = {"quantize": quantize, "audio_window": audio_window, "image_tokens": image_tokens}
    given = {name: value for name, value in used.items() if value is not None}
    decided = {"audio_window": 12, **remembered_options(adapter, given, used), **given}
    loaded = load_model(
        folder, dtype, allow_unexpected, decided["audio_window"], quantize=decided.get("quantize")
    )  # fmt: skip
    if adapter is not None:
        attach(loaded, adapter, adapter_weights)
    return loaded, Processor(folder, loaded.spec, image_tokens=decided.get("image_tokens"))
