"""Rows a second of one core, from file to batch: ours beside `datasets` with transformers' Gemma 4 processor.

    python benchmarks/data.py [--rows 48] [--batch 8] [--pairs 5] [--kinds flac,wav,mp3,ogg,jpeg,mixed] [--json FILE]

Each kind of row is made once, as a CSV with files (ours) and as a Parquet file of the same bytes in the layout of
`datasets`, which reads it with its `Audio` and `Image` features (theirs). Then both make batches of all rows in turn,
`--pairs` times after one to warm up, each on one thread; processor time is counted, and the ratio is the median of the
pairs'. Before that every batch of one is compared with that of the other: same ids, same features.

Ours: `Dataset` (nothing kept), `Processor` and `Batches` without workers: decode, features, template with labels on the
answer alone, padding, digests of pictures. Theirs: decode, mean of channels, soxr, `apply_chat_template`, the
processor's call (tokenizer, feature extractor, image processor, padding, torch tensors), labels on all that is no
padding and no medium's slot. `datasets` 5 decodes sound with torchcodec alone; where that is not installed, its bytes
are decoded by soundfile and resampled by soxr at the same quality as ours, inside `with_transform`.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from gemma_mlx.batch import Batch, unit_range
from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE
from gemma_mlx.data.processor import Processor

TESTS = Path(__file__).resolve().parents[1] / "tests"
KINDS = {
    "flac": "FLAC 16 kHz, 4-15 s",
    "wav": "WAV 16 kHz, 4-15 s",
    "mp3": "MP3 44.1 kHz stereo, 4-15 s",
    "ogg": "Ogg Vorbis 44.1 kHz stereo, 4-15 s",
    "jpeg": "JPEG photos, 1024 x 768",
    "mixed": "FLAC, JPEG and text in turn",
}
WORDS = "the quick brown fox jumps over the lazy dog and says hello to everybody in the room while the sun goes down"


def clip(rng: np.random.Generator, rate: int, channels: int) -> np.ndarray:
    """Coloured noise in syllables, [samples, channels]: about as hard to compress as speech."""
    samples = int(rng.uniform(4, 15) * rate)
    noise = rng.standard_normal((samples + 16, channels)).cumsum(0)
    wave = noise[16:] - noise[:-16]
    t = np.arange(samples)[:, None] / rate
    wave *= 0.02 * np.clip(np.sin(2 * np.pi * 3 * t) + 0.4, 0, None)
    wave += 0.001 * rng.standard_normal(wave.shape)  # no silence is digital
    return np.clip(wave, -0.99, 0.99).astype(np.float32)


def photo(rng: np.random.Generator) -> bytes:
    """Soft colours with some grain, as JPEG."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (1024, 768), Image.Resampling.BICUBIC
    )
    grain = np.asarray(coarse).astype(np.int16) + rng.normal(0, 6, (768, 1024, 1)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def sound(rng: np.random.Generator, kind: str) -> bytes:
    """A clip as a file of that kind."""
    rate, channels = (16_000, 1) if kind in ("flac", "wav") else (44_100, 2)
    out = io.BytesIO()
    soundfile.write(out, clip(rng, rate, channels), rate, format=kind.upper())
    return out.getvalue()


def make_rows(kind: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """{"text", "audio" or "image": bytes or None}; the files and a CSV of the same lie in the folder."""
    rng = np.random.default_rng(sum(kind.encode()))
    rows, lines = [], ["audio_path,image_path,text"]
    for i in range(count):
        own = ("flac", "jpeg", "text")[i % 3] if kind == "mixed" else kind
        words = WORDS.split()
        text = " ".join(rng.choice(words, rng.integers(8, 30)))
        data = photo(rng) if own == "jpeg" else None if own == "text" else sound(rng, own)
        if data:
            (folder / f"{i}.{own}").write_bytes(data)
        row = {"audio": None, "image": None, "text": text}
        row["image" if own == "jpeg" else "audio"] = data
        rows.append(row)
        name = f"{i}.{own}" if data else ""
        lines.append(f"{'' if own == 'jpeg' else name},{name if own == 'jpeg' else ''},{text}")
    if kind == "mixed":  # completions have no turns: give text rows a question
        lines[0] += ",question"
        lines[1:] = [
            line + ("," if row["audio"] or row["image"] else ",Go on.")
            for line, row in zip(lines[1:], rows, strict=True)
        ]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return rows


class Ours:
    """`Batches` over a CSV."""

    def __init__(self, folder: Path, checkpoint: Path, batch: int):
        self.rows = Dataset(folder / "train.csv", Processor(checkpoint), cache_bytes=0)
        self.batch = batch

    def epoch(self) -> list[Batch]:
        pad = self.rows.processor.pad_id
        return list(Batches(self.rows, self.batch, pad, shuffle=False, epochs=1, workers=0))


class Theirs:
    """`datasets` over Parquet, then transformers' processor."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path, checkpoint: Path, batch: int):
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq
        from small_checkpoint import reference_processor

        datasets.disable_progress_bars()
        cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        packed = {
            name: pa.array([row[name] and {"bytes": row[name], "path": None} for row in rows], cell)
            for name in ("audio", "image")
        }
        pq.write_table(pa.table({**packed, "text": [row["text"] for row in rows]}), folder / "train.parquet")
        self.codec = datasets.config.TORCHCODEC_AVAILABLE
        audio = datasets.Audio(sampling_rate=16_000, decode=self.codec)
        features = datasets.Features({"audio": audio, "image": datasets.Image(), "text": datasets.Value("string")})
        read = datasets.Dataset.from_parquet(str(folder / "train.parquet"), features=features, cache_dir=str(folder))
        self.rows = read if self.codec else read.with_transform(self._decoded)
        self.processor, self.batch = reference_processor(checkpoint), batch
        ids = ("<pad>", "<|audio|>", "<|image|>")
        self.unlearnt = [self.processor.tokenizer.convert_tokens_to_ids(token) for token in ids]

    def _decoded(self, columns: dict[str, list]) -> dict[str, list]:
        import datasets

        image = datasets.Image()
        pictures = [x and (x if hasattr(x, "size") else image.decode_example(x)) for x in columns["image"]]
        return {**columns, "audio": [x and self._wave(x["bytes"]) for x in columns["audio"]], "image": pictures}

    @staticmethod
    def _wave(data: bytes) -> np.ndarray:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        mono = wave.mean(axis=1)
        return mono if rate == 16_000 else soxr.resample(mono, rate, 16_000)

    def epoch(self) -> list[dict]:
        return [self._batch(self.rows[i : i + self.batch]) for i in range(0, len(self.rows), self.batch)]

    def _batch(self, columns: dict[str, list]) -> dict:
        conversations, waves, pictures = [], [], []
        for wave, picture, text in zip(columns["audio"], columns["image"], columns["text"], strict=True):
            if wave is not None:
                waves.append(wave if isinstance(wave, np.ndarray) else wave.get_all_samples().data.mean(0).numpy())
                said = [{"type": "text", "text": TRANSCRIBE}, {"type": "audio"}]
            elif picture is not None:
                pictures.append([picture])
                said = [{"type": "image"}, {"type": "text", "text": DESCRIBE}]
            else:
                said = "Go on."
            answer = {"role": "assistant", "content": text}
            conversations.append([{"role": "user", "content": said}, answer])
        texts = self.processor.apply_chat_template(conversations, tokenize=False)
        media = {**({"audio": waves} if waves else {}), **({"images": _spread(pictures, columns)} if pictures else {})}
        batch = self.processor(text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **media)
        labels = batch["input_ids"].clone()
        for token in self.unlearnt:
            labels[labels == token] = -100
        return {**batch, "labels": labels}


def _spread(pictures: list[list], columns: dict[str, list]) -> list[list]:
    """Pictures of every row of a batch, [] where it has none."""
    left = iter(pictures)
    return [next(left) if image is not None else [] for image in columns["image"]]


def compare(ours: list[Batch], theirs: list[dict]) -> dict[str, float]:
    """The largest differences of features; raises where ids differ."""
    worst = {"mel": 0.0, "pixels": 0.0}
    for mine, other in zip(ours, theirs, strict=True):
        other = {name: np.asarray(value) for name, value in other.items()}
        assert np.array_equal(mine.input_ids, other["input_ids"]), "ids differ"
        assert np.array_equal(mine.attention_mask, other["attention_mask"]), "masks differ"
        if mine.input_features is not None:
            frames = mine.input_features.shape[1]
            mask = other["input_features_mask"]
            assert np.array_equal(mine.input_features_mask, mask[:, :frames]) and not mask[:, frames:].any()
            gap = np.abs(mine.input_features - other["input_features"][:, :frames])[mine.input_features_mask]
            worst["mel"] = max(worst["mel"], float(gap.max()))
        if mine.pixel_values is not None:
            n = mine.pixel_values.shape[1]
            gap = np.abs(unit_range(mine.pixel_values) - other["pixel_values"][:, :n]).max()
            worst["pixels"] = max(worst["pixels"], float(gap))
    assert worst["mel"] <= 1e-5 and worst["pixels"] <= 1e-6, worst
    return worst


def seconds(call: Callable[[], Any]) -> float:
    """Of processor time: what other programs do meanwhile does not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(kind: str, options: argparse.Namespace, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Medians, the pairs' ratios, and the differences of one kind."""
    folder.mkdir()
    rows = make_rows(kind, options.rows, folder)
    ours = Ours(folder, checkpoint, options.batch)
    theirs = Theirs(rows, folder, checkpoint, options.batch)
    worst = compare(ours.epoch(), theirs.epoch())  # and warms up
    pairs = []
    for i in range(options.pairs):
        sides = [ours.epoch, theirs.epoch]
        times = [seconds(side) for side in (sides if i % 2 == 0 else sides[::-1])]
        pairs.append(times if i % 2 == 0 else times[::-1])
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [theirs_s / ours_s for ours_s, theirs_s in pairs]
    return {
        "kind": kind, "rows": options.rows, "batch": options.batch, "torchcodec": theirs.codec,
        "ours_rows_per_s": options.rows / a, "theirs_rows_per_s": options.rows / b,
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
        "pairs": pairs, "worst": worst,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "data")]
    import torch
    import torchvision_operators

    torchvision_operators.declare()
    import transformers
    from small_checkpoint import make_folder

    torch.set_num_threads(1)
    import datasets

    print(
        f"{platform.machine()}, one thread; transformers {transformers.__version__}, datasets {datasets.__version__}, "
        f"torch {torch.__version__}; {options.rows} rows, batches of {options.batch}, {options.pairs} pairs\n\n"
        "| rows | ours rows/s | theirs rows/s | ratio (range) | features differ by |\n" + "| --- " * 5 + "|"
    )
    found = []
    with tempfile.TemporaryDirectory() as place:
        checkpoint = make_folder(Path(place) / "checkpoint")
        for kind in options.kinds.split(","):
            one = measure(kind, options, Path(place) / kind, checkpoint)
            found.append(one)
            print(
                f"| {KINDS[kind]} | {one['ours_rows_per_s']:.1f} | {one['theirs_rows_per_s']:.1f} | {one['ratio']:.2f} "
                f"({one['ratio_low']:.2f}-{one['ratio_high']:.2f}) | {max(one['worst'].values()):.1e} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
