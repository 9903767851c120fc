"""What tests of a model in use share: the tiny checkpoint loaded, and rows that can be asked."""

import csv

import pytest

import gemma_mlx


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    """(model, processor) in float32, a module's own."""
    return gemma_mlx.load(checkpoint_folder, dtype="float32")


@pytest.fixture(scope="session")
def scored(rows):
    """media.csv without its rows of mere text, which have nothing to be asked."""
    source = list(csv.DictReader((rows / "media.csv").open()))
    path = rows / "scored.csv"
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, source[0])
        out.writeheader()
        out.writerows(r for r in source if r["audio_path"] or r["image_path"])
    return path
