"""Files that data tests read: made once, small."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_checkpoint import EMPTY_THOUGHT, make_folder, reference_processor

from gemma_mlx.data.processor import Processor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "it")


@pytest.fixture(scope="session")
def thinking_checkpoint(tmp_path_factory):
    """Like the larger models: the generation prompt goes beyond the header that history has."""
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "thinking", EMPTY_THOUGHT)


@pytest.fixture(scope="session")
def processor(checkpoint):
    return Processor(checkpoint, image_tokens=70)


@pytest.fixture(scope="session")
def reference(checkpoint):
    return reference_processor(checkpoint)


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder with pictures of two shapes and clips of two lengths."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(7)
    for name, (height, width) in {"tall.png": (150, 70), "wide.png": (61, 200)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    for name, samples in {"short.wav": 5_003, "long.wav": 20_001}.items():
        soundfile.write(folder / name, (0.1 * rng.standard_normal(samples)).astype(np.float32), 16_000, "FLOAT")
    return folder


@pytest.fixture
def table(media, tmp_path):
    """Writes a CSV into a folder that holds the media as hard links."""

    def write(content: str, name: str = "train.csv", encoding: str = "utf-8"):
        for file in media.iterdir():
            if not (tmp_path / file.name).exists():
                os.link(file, tmp_path / file.name)
        path = tmp_path / name
        path.write_bytes(content.encode(encoding))
        return path

    return write
