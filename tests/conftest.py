"""One random seed for everything; no test reaches a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

import gemma_mlx  # noqa: F401  (OpenBLAS before mlx.core, which other imports pull in)


@pytest.fixture(autouse=True)
def _seeds():
    import mlx.core as mx

    np.random.seed(0)
    mx.random.seed(0)
