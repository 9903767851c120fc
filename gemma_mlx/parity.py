"""This library beside transformers on the same checkpoint and the same arrays, part by part.

Every part's largest difference stands beside the reference's own noise: how far the part moves when transformers
computes the same with its other attention (sdpa for eager), or with media and token embeddings moved by one rounding.
Parts come in the order of computation, so that the first one beyond its bound is where to look.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image as PilImage

import gemma_mlx
from gemma_mlx import machine
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.examples import Audio, Image
from gemma_mlx.data.media import load_audio, load_image
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import messages_of
from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import is_gguf
from gemma_mlx.models.load import load_model
from gemma_mlx.models.media import MEDIA, fixed_soft_tokens, module_names, soft_token_index
from gemma_mlx.models.quantize import quantized_paths
from gemma_mlx.parity_samples import Sample, make_samples
from gemma_mlx.spec import AudioSpec, ModelSpec
from gemma_mlx.spec_gemma3n import Gemma3nSpec

Trace = dict[str, np.ndarray]
"""Part -> what it gives, float32; names and order as in `TorchBackend.trace`."""
Variants = dict[str, Trace]
"""One sample's traces by what varies among them."""
LEAST = {"float32": 2e-4, "bfloat16": 2e-2}
"""Differences below this share of a part's size (root mean square) are within bound whatever the noise."""
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
"""Half a unit in the last place of 1: by how much inputs are moved to see the reference's noise."""
FACTOR = {"float32": 10, "bfloat16": 4}
"""A difference above this many times the noise is a defect. (bfloat16's noise is no small number.)"""
PIXEL_BOUND, UNIFIED_PIXEL_BOUND, FEATURE_BOUND = 1.5 / 255, 4.5 / 255, 1e-4
"""Bounds of preprocessing. Both resize pictures by Pillow and may differ by a step of 8 bits; in 12B transformers has
torchvision only, which in a picture of noise differs by two. Log-mel and samples: as in the tests."""
SHARE = 0.7
"""Part of the machine's memory that the weights may fill for float32 to be chosen."""
WINDOWS = (12, 13)


@dataclass
class Part:
    """One part's figures. `size` is the root mean square of what transformers gives."""

    name: str
    difference: float
    noise: float
    size: float
    bound: float

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.difference <= self.bound


@dataclass
class Modality:
    """What was found with one sample."""

    kind: str
    source: str
    tokens: int
    inputs: list[Part] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=dict)
    """"ours" and "transformers": mean cross entropy of the answer's tokens; empty where there is no answer."""
    notes: list[str] = field(default_factory=list)

    @property
    def beyond(self) -> list[str]:
        """The first input and the first part beyond their bounds."""
        return [next(part.name for part in parts if not part.within) for parts in (self.inputs, self.parts)
                if not all(part.within for part in parts)]  # fmt: skip


@dataclass
class Parity:
    """The whole comparison."""

    facts: dict[str, Any]
    modalities: list[Modality] = field(default_factory=list)
    windows: dict[str, dict[str, float]] = field(default_factory=dict)
    """Keys that an audio frame sees in ours, "12" and "13" (Gemma 4's tower) -> "loss" on the transcript, and
    "difference" of the tower from transformers'. The clip is judged with the first."""
    runs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Layers in which a picture sees itself whole in ours, "all" and "sliding" (Gemma 4 12B) -> "loss" of the answer,
    and "difference" of the hidden states from transformers'. The picture is judged with the first."""

    @property
    def within(self) -> bool:
        """Whether nothing is beyond its bound."""
        return not any(modality.beyond for modality in self.modalities)

    def as_json(self) -> dict[str, Any]:
        """Plain values; figures that are not finite become strings."""
        found = {"within": self.within, **asdict(self)}
        for told, modality in zip(found["modalities"], self.modalities, strict=True):
            told["beyond"] = modality.beyond
        return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    folder: Path,
    dtype: str | None = None,
    device: str | None = None,
    audio: Path | None = None,
    transcript: str | None = None,
    image: Path | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Parity:
    """Compare a checkpoint folder in both implementations, one model in memory at a time.

    Args:
        folder: config.json, safetensors and the tokenizer's files.
        dtype: "float32" or "bfloat16", of both; None for float32 if its weights fill at most 0.7 of the memory.
        device: torch's; None for MPS where there is one, else the CPU.
        audio, transcript, image: as for `make_samples`.
        name: of the model, for the report; the folder's if None.
        say: is told what goes on.

    Raises:
        InputError: transformers is missing or cannot read this checkpoint; what `make_samples` raises.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 is to mean float32 on chips that would round to 19 bits
    if is_gguf(folder):
        raise InputError(f"--parity {folder}: transformers is compared on safetensors; give the original folder")
    model = load_model(folder)
    spec = model.spec
    found = _reference_device(spec, device)
    if quantized_paths(model):
        raise InputError(f"--parity {folder}: its weights are packed by MLX; give the folder that they were made from")
    processor = Processor(folder, spec)
    samples = make_samples(processor, audio, transcript, image)
    chosen, why = _dtype(dtype, sum(array.size for _, array in tree_flatten(model.parameters())))
    del model
    result = Parity({"model": name or folder.name, **_facts(spec, chosen, why), "device": str(found)})
    ours = _ours(folder, chosen, samples, say)
    gc.collect()
    mx.clear_cache()
    say("transformers: loading")
    _theirs(_backend(folder, chosen, found), samples, ours, say, result)
    say("transformers: preprocessing")
    for sample, modality in zip(samples, result.modalities, strict=True):
        _compare_inputs(processor, sample, modality)
    return result


def _reference_device(spec: ModelSpec, device: str | None) -> Any:
    """torch's device, after a look whether all packages are there.

    Raises:
        InputError: they are not, or there is no such device.
    """
    for module in ("torch", "transformers"):
        if util.find_spec(module) is None:
            raise InputError(f'--parity needs {module}, which is not installed: pip install "gemma-mlx[torch]"')
    if isinstance(spec, Gemma3nSpec) and util.find_spec("timm") is None:
        raise InputError("--parity: transformers takes Gemma 3n's vision tower from timm: pip install timm torchvision")
    from gemma_mlx.torch_backend import usable_device

    return usable_device(device)


def _memory() -> int:
    """Bytes of the machine's memory; 0 where it does not tell."""
    info = mx.device_info()
    try:
        return int(info.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return 0


def _dtype(asked: str | None, weights: int) -> tuple[str, str]:
    """(dtype, why)."""
    if asked is not None:
        return asked, "asked for"
    memory, needed = _memory(), 4 * weights
    sizes = f"{needed / 1e9:.1f} GB of weights, {memory / 1e9:.1f} GB of memory"
    fits = not memory or needed <= SHARE * memory
    return ("float32", f"fits: {sizes}") if fits else ("bfloat16", f"float32 does not fit: {sizes}")


def _facts(spec: ModelSpec, dtype: str, why: str) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("mlx", "torch", "transformers")}
    return {
        "model_type": spec.config.get("model_type"),
        "decoder_layers": spec.text.num_hidden_layers,
        "dtype": dtype,
        "dtype_why": why,
        "versions": {"gemma_mlx": gemma_mlx.__version__, **versions},
        "machine": machine.describe(),
    }


def _ours(folder: Path, dtype: str, samples: list[Sample], say: Callable[[str], None]) -> list[Variants]:
    """The traces of each sample, first the one that is judged; more than one where the references disagree."""
    model, found = load_model(folder, dtype), []
    for sample in samples:
        say(f"ours: {sample.kind}, {sample.batch.input_ids.shape[1]:,} tokens")
        given = sample.batch, sample.positions
        if sample.kind == "image" and model.spec.unified:
            runs = ("all", "sliding")  # as transformers' forward has it, and as it has it with a static cache
            found.append({name: trace(_with_runs(model, name), *given) for name in runs})
        elif sample.kind == "audio" and isinstance(model.spec.audio, AudioSpec):
            wider = load_model(folder, dtype, audio_window=WINDOWS[1])  # of which only the audio part is ever read
            encoders = zip(WINDOWS, (model, wider), strict=True)
            found.append({str(window): trace(model, *given, encoder) for window, encoder in encoders})
        else:
            found.append({"": trace(model, *given)})
    return found


def _with_runs(model: Any, vision_runs: str) -> Any:
    model.spec = replace(model.spec, text=replace(model.spec.text, vision_runs=vision_runs))
    return model


def trace(model: Any, batch: Batch, positions: np.ndarray, encoder: Any = None) -> Trace:
    """What each part of ours gives, as `TorchBackend.trace` tells it of transformers.

    Args:
        encoder: the model whose towers and embedders read the media; `model` if None.
    """
    inputs, found, soft = batch.inputs(), {}, {}
    for kind, (values, where) in MEDIA.items():
        if inputs.get(values) is not None:
            soft[f"{kind}_soft_tokens"] = _encode(encoder or model, kind, inputs[values], inputs.get(where), found)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with _recorded(model.decoder, found):
        hidden = model.hidden(**text, **soft)
    found["norm"] = _host(hidden)
    found["logits"] = _host(model.logits(hidden[:, mx.array(positions)]))
    return found


def _encode(model: Any, kind: str, values: np.ndarray, where: np.ndarray | None, found: Trace) -> mx.array:
    """Soft tokens of a medium; writes down what its tower and its embedder give."""
    body, (tower, embedder) = model.model, module_names(kind)
    index = mx.array(soft_token_index(model.spec, kind, values if where is None else where))
    if tower in body:
        features = body.features(kind, values, where, index)
        found[tower] = _host(features)
        if kind == "audio" and fixed_soft_tokens(model.spec, kind):  # Gemma 3n: the last column tells sound from none
            found[tower] = found[tower][found[tower][:, -1] > 0, :-1]
        soft = body.project(kind, features)
    else:
        soft = body.soft_tokens(kind, values, where, index)
    found[embedder] = _host(soft)
    return soft


@contextmanager
def _recorded(decoder: Any, found: Trace) -> Iterator[None]:
    """Within the block the decoder's layers write down what they give, the first one also what it is given."""
    layers = decoder.layers

    def recording(i: int, layer: Any) -> Callable[..., Any]:
        def call(x: mx.array, *args: Any, **kwargs: Any) -> Any:
            if i == 0:
                found["embeddings"] = _host(x)
            out = layer(x, *args, **kwargs)
            found[f"layers.{i}"] = _host(out[0] if isinstance(out, tuple) else out)
            return out

        return call

    decoder.layers = [recording(i, layer) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        decoder.layers = layers


def _host(x: mx.array | tuple[mx.array, mx.array]) -> np.ndarray:
    """A hidden state; Gemma 3n's streams, which come as the active one and the others, as one array."""
    if isinstance(x, tuple):
        x = mx.concatenate([x[0][None], x[1]])
    return np.array(x.astype(mx.float32))


def loss_of(sample: Sample, found: Trace) -> float | None:
    """Mean cross entropy of the answer's tokens, in float64 from the traced logits; None without an answer."""
    labels = sample.batch.labels[0]
    rows = [i for i, at in enumerate(sample.positions) if at + 1 < len(labels) and labels[at + 1] != IGNORE_INDEX]
    if not rows:
        return None
    logits = found["logits"][0, rows].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(rows)), labels[sample.positions[rows] + 1]]
    return float((np.log(np.exp(logits - top).sum(-1)) + top[:, 0] - chosen).mean())


def _theirs(
    backend: Any,
    samples: list[Sample],
    ours: list[Variants],
    say: Callable[[str], None],
    result: Parity,
) -> None:
    """Run transformers three times a sample and judge."""
    dtype = result.facts["dtype"]
    for sample, variants in zip(samples, ours, strict=True):
        mine = next(iter(variants.values()))
        try:
            base, noise = _reference(backend, sample, ROUNDING[dtype], say)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, an operator that the device lacks
            told = f"--parity: transformers fails on {backend.device} ({_first_line(error)}); try --device cpu"
            raise InputError(told) from error
        modality = Modality(sample.kind, sample.source, sample.batch.input_ids.shape[1])
        modality.parts = [judge(name, mine.get(name), value, noise[name], dtype) for name, value in _in_order(base)]
        for who, found in (("ours", mine), ("transformers", base)):
            modality.loss |= _named(who, loss_of(sample, found))
        result.modalities.append(modality)
        if len(variants) > 1:
            table, part = (result.windows, "audio_tower") if sample.kind == "audio" else (result.runs, "norm")
            for name, found in variants.items():
                table[name] = {
                    **_named("loss", loss_of(sample, found)),
                    "difference": _difference(found[part], base[part]),
                }


def _named(name: str, loss: float | None) -> dict[str, float]:
    return {} if loss is None else {name: loss}


def _reference(
    backend: Any, sample: Sample, rounding: float, say: Callable[[str], None]
) -> tuple[Trace, dict[str, float]]:
    """(transformers' trace, how far each of its parts moves by rounding alone)."""
    say(f"transformers: {sample.kind}")
    base = backend.trace(sample.batch, sample.positions)
    noise = dict.fromkeys(base, 0.0)
    for attention, moved in (("sdpa", 0.0), ("eager", rounding)):
        say(f"transformers: {sample.kind}, its own noise ({'inputs moved' if moved else attention})")
        backend.use_attention(attention)
        again = backend.trace(sample.batch, sample.positions, moved)
        noise = {name: max(noise[name], _difference(again[name], base[name])) for name in base}
    return base, noise


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _backend(folder: Path, dtype: str, device: Any) -> Any:
    """transformers' model.

    Raises:
        InputError: it cannot be loaded.
    """
    from gemma_mlx.torch_backend import TorchBackend

    try:
        return TorchBackend(folder, dtype, device)
    except Exception as error:  # a version that does not know the family, memory, a package of its own, …
        raise InputError(f"--parity {folder}: transformers does not load it ({_first_line(error)})") from error


def _in_order(base: Trace) -> list[tuple[str, np.ndarray]]:
    """Towers and embedders first: transformers' hooks tell of embedders at the end."""
    first = [name for name in ("vision_tower", "audio_tower", "embed_vision", "embed_audio") if name in base]
    return [(name, base[name]) for name in [*first, *(name for name in base if name not in first)]]


def _difference(a: np.ndarray | None, b: np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    return float(np.abs(a - b).max()) if a is not None and a.shape == b.shape else math.inf


def judge(name: str, ours: np.ndarray | None, theirs: np.ndarray, noise: float, dtype: str) -> Part:
    """One part beside transformers': within bound if below `FACTOR` times the noise or `LEAST` of the part's size."""
    size = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
    return Part(name, _difference(ours, theirs), noise, size, max(FACTOR[dtype] * noise, LEAST[dtype] * size))


def _compare_inputs(processor: Processor, sample: Sample, modality: Modality) -> None:
    """Token ids and types, pixels, positions and features beside transformers' processor; a note where it has none."""
    from gemma_mlx.torch_backend import processor_inputs

    example = sample.example
    turns = example.turns[:-1] if example.turns[-1].role == "model" else example.turns
    messages = messages_of(turns)
    media = iter(example.media())
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] != "text":
                part[part["type"]] = _loaded(next(media), processor)
    try:
        theirs = processor_inputs(processor.folder, messages)
    except Exception as error:  # no chat template, no processor config, torchvision missing, …
        modality.notes.append(f"preprocessing not compared: {_no_processor(error, processor.folder)}")
        return
    prompt, ours = processor.prompt(example, with_features=False), sample.batch.inputs()
    modality.inputs.append(_input("input_ids", prompt.input_ids[None], theirs.get("input_ids"), 0.0))
    if (types := theirs.get("mm_token_type_ids")) is not None:
        modality.inputs.append(_input("mm_token_type_ids", prompt.token_types[None], types, 0.0))
    for kind, (name, where) in MEDIA.items():
        if ours.get(name) is None:
            continue
        bound = UNIFIED_PIXEL_BOUND if processor.spec.unified else PIXEL_BOUND
        bound = FEATURE_BOUND if kind == "audio" else bound
        mine, reference = (_valid(found, name, where) for found in (ours, theirs))
        modality.inputs.append(_input(name, mine, reference, bound))
        if kind == "image" and ours.get(where) is not None:
            mine, reference = (_valid(found, where, where) for found in (ours, theirs))
            modality.inputs.append(_input(where, mine, reference, 0.0))


def _no_processor(error: Exception, folder: Path) -> str:
    """Why transformers' processor does not work, without the path of the folder: the report may be posted."""
    if util.find_spec("torchvision") is None:
        return "transformers' processor of pictures and videos needs torchvision: pip install torchvision"
    return f"transformers' processor fails ({_first_line(error)})".replace(str(folder), folder.name)


def _loaded(part: Any, processor: Processor) -> Any:
    """A medium as transformers' processor takes it. Decoding and resampling are ours: its own need other packages."""
    if isinstance(part, Image):
        return PilImage.fromarray(load_image(part.path))
    assert isinstance(part, Audio)
    return load_audio(part.path, max_samples=processor.spec.audio.max_samples)


def _valid(found: dict[str, Any], name: str, where: str) -> np.ndarray | None:
    """The values of a medium without their padding."""
    if found.get(name) is None:
        return None
    values, mask = np.asarray(found[name], np.float32), found.get(where)
    if mask is None:
        return values
    mask = np.asarray(mask)
    return values[(mask != -1).all(-1) if mask.ndim == 3 else mask.astype(bool)]


def _input(name: str, ours: np.ndarray | None, theirs: np.ndarray | None, bound: float) -> Part:
    if theirs is None:
        return Part(name, math.inf, 0.0, 0.0, bound)
    values = np.asarray(theirs, np.float64)
    size = float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
    return Part(name, _difference(None if ours is None else np.asarray(ours, np.float64), values), 0.0, size, bound)
