"""Make the demo's data: NATO words in unheard voices, handwritten digits as questions, everyday words as a control.

    python -m gemma_mlx.demo.make_data --out gemma_mlx/demo/data

Needs espeak-ng (1.51 made the committed files) and scikit-learn. The same seed gives the same rows; the same espeak-ng
gives the same samples. What the base was trained on is not here: `train_base` makes it again.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from gemma_mlx.demo import pictures, speech

QUESTION = "Which digit is this?"
COLUMNS = ("audio_path", "image_path", "question", "answer", "text")
SEED = 2026

SPEECH_SETS = {  # name: (clips, words, voices)
    "train": (240, speech.NATO, "tune"),
    "valid": (40, speech.NATO, "base_test"),
    "test_nato": (210, speech.NATO, "tune_test"),
    "test_everyday": (120, {w: w for w in speech.EVERYDAY}, "base_test"),
}
DIGIT_SETS = {  # name: (pictures of each digit, from row, to row of scikit-learn's 1797); other rows, other writers
    "train": (112, 0, 1200),
    "valid": (4, 1200, 1300),
    "test_digits": (22, 1300, 1797),
}
GREYS = 3  # training pictures of each digit that are plain grey: nothing to see, so any digit is as good an answer


def speech_rows(out: Path, name: str, seed: int) -> list[dict[str, str]]:
    """Write one set's clips as FLAC -> its CSV rows."""
    count, words, voices = SPEECH_SETS[name]
    clips = speech.draw_clips(count, words, speech.VOICES[voices], seed)
    folder = out / "speech" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (clip, wave) in enumerate(zip(clips, speech.synthesise_all(clips), strict=True)):
        path = folder / f"{i:03d}_{clip.voice}.flac"
        speech.write_flac(path, wave)
        rows.append({"audio_path": path.relative_to(out).as_posix(), "text": clip.text})
    return rows


def digit_rows(out: Path, name: str, seed: int) -> list[dict[str, str]]:
    """Write one set's pictures as PNG, equally many of every digit -> its CSV rows."""
    each, first, last = DIGIT_SETS[name]
    images, values = pictures.digits()
    rng = np.random.default_rng(seed)
    chosen = [first + rng.permutation(np.flatnonzero(values[first:last] == d))[:each] for d in range(10)]
    folder = out / "digits" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in rng.permutation(np.concatenate(chosen)):
        path = folder / f"{i:04d}.png"
        pictures.write_png(path, images[i])
        rows.append({"image_path": path.relative_to(out).as_posix(), "question": QUESTION, "answer": str(values[i])})
    return rows + (grey_rows(out, seed) if name == "train" else [])


def grey_rows(out: Path, seed: int) -> list[dict[str, str]]:
    """Plain pictures that are asked about all the same, every digit equally often: what to say is still a digit."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for i in range(10 * GREYS):
        path = out / "digits" / "train" / f"grey_{i:02d}.png"
        pictures.write_png(path, np.full((8, 8), rng.integers(17)))
        rows.append({"image_path": path.relative_to(out).as_posix(), "question": QUESTION, "answer": str(i % 10)})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """Columns that no row fills are left out."""
    columns = [c for c in COLUMNS if any(row.get(c) for row in rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make(out: Path, seed: int = SEED) -> dict[str, int]:
    """Write all media and CSV files under `out` -> number of rows in each CSV."""
    out.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[dict[str, str]]] = {}
    for i, name in enumerate(SPEECH_SETS):
        sets[name] = speech_rows(out, name, seed + i)
    for i, name in enumerate(DIGIT_SETS):
        sets[name] = sets.get(name, []) + digit_rows(out, name, seed + 100 + i)
    for i, (name, rows) in enumerate(sets.items()):
        order = np.random.default_rng(seed + 200 + i).permutation(len(rows))
        write_csv(out / f"{name}.csv", [rows[j] for j in order])
    return {name: len(rows) for name, rows in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    for name, count in make(options.out, options.seed).items():
        print(f"{name}.csv: {count} rows")


if __name__ == "__main__":
    main()
