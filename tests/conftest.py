"""One random seed for everything, no hub; a tiny checkpoint with a tokenizer, and rows of text, sound and pictures."""

import csv
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: their threads would wait for each other's cores
    os.environ |= {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torchvision_operators

import gemma_mlx  # noqa: F401  (OpenBLAS before mlx.core, which other imports pull in)

torchvision_operators.declare()


@pytest.fixture(autouse=True)
def _seeds():
    import mlx.core as mx

    np.random.seed(0)
    mx.random.seed(0)


def _shrunk(config):
    config["text_config"] |= dict(
        hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=48, num_attention_heads=2, head_dim=16,
        global_head_dim=32, sliding_window=16,
    )  # fmt: skip
    config["vision_config"] |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)
    config["audio_config"] |= dict(hidden_size=32, num_hidden_layers=1, output_proj_dims=24)
    config["audio_config"]["subsampling_conv_channels"] = [128, 8]
    return config


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """Random weights, finite clip bounds and layer scalars off one."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from gemma_mlx.demo.blueprint import write_files
    from gemma_mlx.models.load import save_model
    from gemma_mlx.models.multimodal import Gemma4
    from gemma_mlx.spec import read_spec

    folder = tmp_path_factory.mktemp("tiny-gemma4")
    write_files(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(_shrunk(json.loads(path.read_text()))))
    mx.random.seed(7)
    model = Gemma4(read_spec(folder))
    r = np.random.default_rng(7)
    weights = []
    for name, w in tree_flatten(model.parameters()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("_min") or leaf.endswith("_max"):
            w = mx.array((-1.0 if leaf.endswith("_min") else 1.0) * (2.5 + r.random()))
        elif leaf == "layer_scalar":
            w = mx.array(r.uniform(0.7, 1.3, w.shape).astype(np.float32))
        elif "q_norm" in name:
            w = w * w.size**-0.5  # attention has scale 1
        weights.append((name, w))
    model.load_weights(weights)
    save_model(model, folder)
    return folder


WORDS = ["alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Folder with train.csv and valid.csv (text rows), media.csv (speech-like noise, pictures, text; 10 rows)."""
    import soundfile
    from PIL import Image

    folder = tmp_path_factory.mktemp("rows")
    r = np.random.default_rng(0)
    for name, n in (("train", 18), ("valid", 5)):
        with (folder / f"{name}.csv").open("w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["prompt", "response"])
            for _ in range(n):
                picked = r.choice(WORDS, r.integers(1, 4))
                out.writerow([f"Repeat: {' '.join(picked)}", " ".join(picked)])
    with (folder / "media.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, ["audio_path", "image_path", "question", "answer", "text"])
        out.writeheader()
        for i in range(10):
            row = {"text": WORDS[i % 9]}
            if i % 3 == 0:
                samples = 0.1 * r.standard_normal(int(r.integers(3000, 9000)))
                soundfile.write(folder / f"{i}.wav", samples.astype(np.float32), 16000)
                row = {"audio_path": f"{i}.wav", "text": WORDS[i % 9]}
            if i % 3 == 1:
                pixels = r.integers(0, 255, (40, 40 + 20 * (i % 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                row = {"image_path": f"{i}.png", "question": "Which digit?", "answer": str(i)}
            out.writerow(row)
    return folder
