"""Towers for llama.cpp: the mmproj file's tensors, and the demo's clips and pictures heard and seen there."""

import base64
import csv
import json
import shutil
from pathlib import Path

import adapter_pairs as pairs
import llama
import mlx.core as mx
import numpy as np
import pytest

import gemma_mlx as gm
import gemma_mlx.demo as demo
from gemma_mlx.exporting import gguf, gguf_lora
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.lora import module_at
from gemma_mlx.merging import merged_rows

HOME = Path(demo.__file__).parent
HEAR = "Transcribe the following speech segment in its original language."
SEE = "What is shown in the picture?"


@pytest.fixture(scope="module")
def demo_base(tmp_path_factory):
    """The demo's base as (model's file, towers' file)."""
    folder = tmp_path_factory.mktemp("demo")
    gguf.write(Source(HOME / "checkpoint", "demo"), folder, ExportOptions(quiet=True, gguf_type="f32"))
    return folder / "demo-f32.gguf", folder / "mmproj-demo-f32.gguf"


def data(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


@pytest.mark.slow
def test_clips_are_heard_as_here(demo_base, tmp_path):
    """Twelve clips of everyday words through llama.cpp's own features and towers: the same transcripts, which are
    right."""
    import soundfile

    model, processor = gm.load(str(HOME / "checkpoint"), dtype="float32")
    server, right = llama.Server(demo_base[0], mmproj=demo_base[1]), 0
    with (HOME / "data" / "test_everyday.csv").open() as f:
        rows = list(csv.DictReader(f))[:12]
    for row in rows:
        clip, copy = HOME / "data" / row["audio_path"], tmp_path / "clip.wav"
        samples, rate = soundfile.read(clip, dtype="int16")
        soundfile.write(copy, samples, rate)
        parts = [{"type": "text", "text": HEAR}, {"type": "audio", "audio": str(copy)}]
        ours = gm.generate(model, processor, [[{"role": "user", "content": parts}]], max_tokens=24)[0]
        parts[1] = {"type": "input_audio", "input_audio": {"data": data(copy), "format": "wav"}}
        answer = server.chat([{"role": "user", "content": parts}], 24)
        theirs = answer["choices"][0]["message"]["content"]
        print(f"{row['text']!r}: here {ours!r}, llama.cpp {theirs!r}, {answer['usage']['prompt_tokens']} tokens")
        assert theirs == ours
        right += theirs == row["text"]
    assert right >= 11


@pytest.mark.slow
def test_pictures_are_seen_as_here_where_slots_see_each_other(demo_base, tmp_path):
    """llama.cpp lets the slots of a picture see each other, whatever the checkpoint says; so must the model here."""
    from PIL import Image

    from gemma_mlx.data.processor import Processor
    from gemma_mlx.models.load import load_model

    base = tmp_path / "base"
    shutil.copytree(HOME / "checkpoint", base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["use_bidirectional_attention"] = "vision"
    (base / "config.json").write_text(json.dumps(config))
    model = load_model(base, "float32", vision_runs="all")
    processor = Processor(base, model.spec)
    server = llama.Server(demo_base[0], mmproj=demo_base[1], image_tokens=(64, 70))
    with (HOME / "data" / "test_digits.csv").open() as f:
        rows = list(csv.DictReader(f))[:8]
    answers = set()
    for row in rows:
        picture = tmp_path / "picture.png"
        Image.open(HOME / "data" / row["image_path"]).convert("RGB").resize((384, 384)).save(picture)
        parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": SEE}]
        ours = gm.generate(model, processor, [[{"role": "user", "content": parts}]], max_tokens=8)[0]
        parts[0] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data(picture)}"}}
        theirs = server.chat([{"role": "user", "content": parts}], 8)["choices"][0]["message"]["content"]
        print(f"{row['answer']}: here {ours!r}, llama.cpp {theirs!r}")
        assert theirs == ours
        answers.add(ours)
    assert len(answers) > 2  # they say different things of different pictures


@pytest.mark.slow
def test_towers_with_an_adapter_in_the_mmproj(tmp_path):
    """Merged tower linears, their clips and every plain matrix as the file has them: equal to ours."""
    base = tmp_path / "base"
    shutil.copytree(HOME / "checkpoint", base)
    model, adapter = pairs.adapted("E2B", base, tmp_path / "adapter", "all")
    (tmp_path / "out").mkdir()
    lines = gguf.write(
        Source(base, "demo", adapter=adapter), tmp_path / "out", ExportOptions(quiet=True, gguf_type="f32")
    )
    assert any("see each other" in line for line in lines)
    reader = gguf_lora.import_gguf().GGUFReader(tmp_path / "out" / "mmproj-demo-adapter-f32.gguf")
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    names = {
        "a.blk.{}.attn_q.weight": "model.audio_tower.layers.{}.self_attn.q_proj.linear",
        "a.blk.{}.ffn_up.weight": "model.audio_tower.layers.{}.feed_forward1.ffw_layer_1.linear",
        "v.blk.{}.attn_v.weight": "model.vision_tower.encoder.layers.{}.self_attn.v_proj.linear",
        "v.blk.{}.ffn_down.weight": "model.vision_tower.encoder.layers.{}.mlp.down_proj.linear",
    }
    for name, path in names.items():
        for i in (0, 1):
            layer = module_at(model, path.format(i))
            ours, base_weight = np.array(merged_rows(layer)), np.array(layer.linear.weight.astype(mx.float32))
            assert np.abs(tensors[name.format(i)] - ours).max() <= 1e-6 * np.abs(ours).max()
            assert np.abs(ours - base_weight).max() > 0.01
            own = np.array(module_at(model, path.format(i).removesuffix(".linear")).input_max.astype(mx.float32))
            assert tensors[name.format(i).replace("weight", "input_max")].item() == own.item()
