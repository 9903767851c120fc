"""A folder of clips, pictures and rows of which everything is known, and the command as a function."""

import numpy as np
import pytest
import soundfile
from PIL import Image
from prepared_rows import CLIPS


@pytest.fixture
def run(capsys):
    """`prepare …` -> (exit code, stdout, stderr)."""
    from gemma_mlx.__main__ import verbs
    from gemma_mlx.cli.door import enter

    def command(*arguments, verb="prepare"):
        capsys.readouterr()
        code = enter(verbs, [verb, *map(str, arguments)], name="gemma-mlx")
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def folder(tmp_path):
    """Four clips of 16 bits, a copy of one under another name, two pictures, a 31-second clip, a damaged clip."""
    here = tmp_path / "data"
    here.mkdir()
    r = np.random.default_rng(1)
    for name, (samples, rate) in CLIPS.items():
        wave = r.integers(-20_000, 20_000, samples).astype(np.int16)
        soundfile.write(here / name, wave, rate, "PCM_16")
    (here / "again.wav").write_bytes((here / "a.wav").read_bytes())
    soundfile.write(here / "stereo.wav", r.integers(-9_000, 9_000, (16_000, 2)).astype(np.int16), 16_000, "PCM_16")
    soundfile.write(here / "long.wav", np.zeros(31 * 16_000, np.int16), 16_000, "PCM_16")
    damaged = (here / "b.wav").read_bytes()
    (here / "damaged.wav").write_bytes(damaged[: len(damaged) // 2])
    for name, size in {"p.png": (60, 40), "q.png": (33, 77)}.items():
        pixels = r.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / name)
    return here
