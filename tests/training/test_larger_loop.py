"""Gemma 4 31B, 26B-A4B and 12B in the training loop and in generation: small checkpoints of their kinds."""

import csv
import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from bucketed import assert_nothing_changes
from mlx.utils import tree_flatten

from gemma_mlx.data.processor import Processor
from gemma_mlx.demo.blueprint import write_files
from gemma_mlx.generation import generate
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.models.multimodal import Gemma4
from gemma_mlx.spec import read_spec
from gemma_mlx.step import Step

KINDS = ("31B", "26B", "12B")
TEXT = dict(
    num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1,
    head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0, num_kv_shared_layers=0, use_double_wide_mlp=False,
    sliding_window=16, attention_k_eq_v=True, use_bidirectional_attention="vision",
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16, standardize=True,
              use_clipped_linears=False)  # fmt: skip
EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)


def write_checkpoint(folder, kind, text=()):
    write_files(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {**TEXT, **(EXPERTS if kind == "26B" else {}), **dict(text)}
    config["vision_config"] |= VISION
    config["audio_config"] = None
    if kind == "12B":
        config |= dict(model_type="gemma4_unified", vision_config={"mm_embed_dim": 32}, audio_config={})
        for name in ("vocab_size_per_layer_input", "enable_moe_block", "hidden_size_per_layer_input"):
            del config["text_config"][name]
    path.write_text(json.dumps(config))
    path = folder / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["image_processor"]["max_soft_tokens"] = 24  # longer than the window of 16
    processor["video_processor"]["max_soft_tokens"] = 8
    path.write_text(json.dumps(processor))
    mx.random.seed(3)
    model = Gemma4(read_spec(folder))
    rng = np.random.default_rng(3)
    weights = []
    for name, w in tree_flatten(model.parameters()):
        if "q_norm" in name:
            w = w * w.size**-0.5  # attention has scale 1
        elif name.endswith("pos_embedding"):
            w = mx.array(0.3 * rng.standard_normal(w.shape).astype(np.float32))
        weights.append((name, w))
    model.load_weights(weights)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {kind: write_checkpoint(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Pictures, a video of three frames, text, and speech-like noise in rows that only 12B reads."""
    import soundfile
    from PIL import Image

    folder = tmp_path_factory.mktemp("larger-rows")
    rng = np.random.default_rng(0)
    for i, size in enumerate(((30, 60), (50, 50))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    soundfile.write(folder / "a.wav", 0.1 * rng.standard_normal(5000).astype(np.float32), 16_000)
    _write_video(folder / "v.mp4", rng)
    rows = [
        dict(image_path="0.png", question="Which?", answer="alfa"),
        dict(image_path="1.png", question="Which?", answer="bravo"),
        dict(video_path="v.mp4", question="Which?", answer="charlie"),
        dict(prompt="Repeat: delta echo", response="delta echo"),
    ]
    names = ["image_path", "video_path", "audio_path", "question", "answer", "prompt", "response", "text"]
    for name, more in (("vision", []), ("all", [dict(audio_path="a.wav", text="foxtrot golf")])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            out = csv.DictWriter(file, names)
            out.writeheader()
            out.writerows(rows + more)
    return folder


def _write_video(path, rng):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        for _ in range(3):
            picture = rng.integers(0, 255, (48, 96, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_generates(checkpoints, table, tmp_path, monkeypatch, kind):
    """Loss falls on rows of every medium; the adapter is found again; answers come, batch or not."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    data = table / ("all.csv" if kind == "12B" else "vision.csv")
    targets = "all,router.proj" if kind == "26B" else "all"
    run = finetune(
        str(checkpoints[kind]), data=data, out=tmp_path / "run", steps=20, lr=2e-2, rank=4, batch_size=5,
        targets=targets, quiet=True, save_every=0, eval_every=0,
    )  # fmt: skip
    losses = [r["loss"] for r in run.history if "loss" in r]
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3]), losses
    model, processor = load_model(checkpoints[kind]), Processor(checkpoints[kind])
    parts = {"image": "0.png", "video": "v.mp4", **({"audio": "a.wav"} if kind == "12B" else {})}
    asked = [[{"type": k, k: str(table / f)}, {"type": "text", "text": "Which?"}] for k, f in parts.items()]
    questions = [[{"role": "user", "content": content}] for content in (*asked, "Repeat: alfa")]
    together = generate(model, processor, questions, max_tokens=6)
    assert together == generate(model, processor, questions, max_tokens=6, batch_size=1)
    assert all(isinstance(answer, str) for answer in together)


def batch_of(checkpoint, table):
    from gemma_mlx.data.batches import collate
    from gemma_mlx.data.dataset import Dataset

    processor = Processor(checkpoint)
    name = "all.csv" if processor.spec.audio is not None else "vision.csv"
    return collate(list(Dataset(table / name, processor)), processor.pad_id)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_gives_the_gradients_of_the_whole_model(checkpoints, table, kind):
    """Frozen media outside, media inside, and rows over three streams: the gradients of one plain loss."""
    import mlx.nn as nn

    from gemma_mlx.loss import loss_and_count

    batch = batch_of(checkpoints[kind], table)
    for targets in ("decoder", "all"):
        model = load_model(checkpoints[kind])
        apply_lora(model, targets, 3, 6.0)
        for name, w in lora_parameters(model).items():
            if name.endswith("lora_b"):
                owner = model
                for part in name.split(".")[:-1]:
                    owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
                owner.lora_b = mx.random.normal(w.shape, key=mx.random.key(len(name))) * 0.1
        _, plain = nn.value_and_grad(model, lambda m, b=batch: loss_and_count(m, b.inputs(), b.labels)[0])(model)
        plain = dict(tree_flatten(plain))
        for lanes in (1, 3):
            grads, sums = Step(model, compiled=False, lanes=lanes).gradients(
                lora_parameters(model), batch, mx.random.key(0)
            )
            assert sums.labels == batch.label_count and set(grads) == set(plain)
            for name, g in plain.items():
                size = float(mx.linalg.norm(g))
                assert float(mx.linalg.norm(grads[name] - g)) <= 1e-4 * size + 1e-7, (targets, lanes, name)


def test_types_are_passed_only_where_they_matter(checkpoints, table):
    """Batches without pictures keep the causal masks that need no array; those with pictures need their types."""
    from gemma_mlx.layout import lay_out

    spec, batch = read_spec(checkpoints["31B"]), batch_of(checkpoints["31B"], table)
    assert "mm_token_type_ids" in lay_out(batch, spec).arrays
    text = dataclasses.replace(
        batch, input_ids=batch.input_ids[3:], attention_mask=batch.attention_mask[3:], labels=batch.labels[3:],
        mm_token_type_ids=batch.mm_token_type_ids[3:], pixel_values=None, image_position_ids=None,
        pixel_values_videos=None, video_position_ids=None, num_frames_per_video=None,
    )  # fmt: skip
    assert "mm_token_type_ids" not in lay_out(text, spec).arrays
    causal = dataclasses.replace(spec, text=dataclasses.replace(spec.text, use_bidirectional_attention=None))
    assert "mm_token_type_ids" not in lay_out(batch, causal).arrays


@pytest.mark.parametrize("kind", ["26B"])
def test_compiled_equals_plain(checkpoints, table, kind):
    """Types, experts and frames as arguments of a compiled step."""
    from gemma_mlx.step import can_compile

    if not can_compile():
        pytest.skip("MLX needs a C++ compiler to compile on a CPU")
    batch = batch_of(checkpoints[kind], table)
    found = {}
    for compiled in (False, True):
        model = load_model(checkpoints[kind])
        apply_lora(model, "decoder", 2, 4.0, seed=1)
        found[compiled], _ = Step(model, compiled=compiled).gradients(lora_parameters(model), batch, mx.random.key(0))
    for name, plain in found[False].items():
        size = float(mx.linalg.norm(plain))
        assert float(mx.linalg.norm(found[True][name] - plain)) <= 1e-4 * size + 1e-7, name


@pytest.mark.parametrize("kind,targets", [("31B", "decoder"), ("26B", "all"), ("12B", "all")])
def test_padding_to_buckets_changes_nothing(checkpoints, table, monkeypatch, kind, targets):
    """Batches without a kind of medium get some without content; types even where there is no picture."""
    data = table / ("all.csv" if kind == "12B" else "vision.csv")
    assert_nothing_changes(checkpoints[kind], data, targets, monkeypatch)


def test_muted_media(checkpoints, table):
    """Raw samples fall silent as zeros, frames of videos turn grey, padding stays zero."""
    from gemma_mlx.evaluation import muted

    batch = batch_of(checkpoints["12B"], table)
    quiet = muted(batch)
    assert batch.input_features.any() and not quiet.input_features.any()
    valid = (batch.video_position_ids >= 0).all(-1)
    assert np.ptp(quiet.pixel_values_videos[valid]) == 0 and quiet.pixel_values_videos[valid].all()
    assert not quiet.pixel_values_videos[~valid].any()
