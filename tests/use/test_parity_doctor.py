"""`doctor --parity`: its figures against transformers' own, and whether it names the part that is wrong."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile
import tiny
import tiny_gemma3 as gemma3
import torch
from PIL import Image

import gemma_mlx
from gemma_mlx import parity
from gemma_mlx.__main__ import verbs
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.cli import door
from gemma_mlx.data.examples import Example, Text, Turn
from gemma_mlx.data.processor import Processor
from gemma_mlx.demo.blueprint import write_files
from gemma_mlx.models.load import load_model
from gemma_mlx.parity_samples import DATA, Sample, make_samples
from gemma_mlx.torch_backend import TorchBackend

CHECKPOINT = Path(gemma_mlx.__file__).parent / "demo" / "checkpoint"
MODELING = "transformers.models.gemma4.modeling_gemma4"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def doctor(capsys, *arguments):
    """(exit code, stdout, stderr without the lines that tell of progress)"""
    capsys.readouterr()
    code = door.enter(verbs, ["doctor", *map(str, arguments)], "gemma-mlx")
    out, err = capsys.readouterr()
    return code, out, "".join(line for line in err.splitlines(True) if line.startswith("error"))


def report(capsys, tmp_path, *arguments, folder=CHECKPOINT):
    """(exit code, stdout, what was written)"""
    path = tmp_path / "parity.json"
    options = ("--device", "cpu", "--dtype", "float32")
    code, out, err = doctor(capsys, "--model", folder, "--parity", *options, "--out", path, *arguments)
    assert err == ""
    return code, out, json.loads(path.read_text())


def by_kind(found):
    return {modality["kind"]: modality for modality in found["modalities"]}


def names(parts):
    return [part["name"] for part in parts]


def test_the_whole_command(capsys, tmp_path):
    code, out, found = report(capsys, tmp_path)
    assert code == 0 and found["within"] is True
    kinds = by_kind(found)
    assert list(kinds) == ["text", "image", "audio"]
    decoder = ["embeddings", *(f"layers.{i}" for i in range(5)), "norm", "logits"]
    assert names(kinds["text"]["parts"]) == decoder
    assert names(kinds["image"]["parts"]) == ["vision_tower", "embed_vision", *decoder]
    assert names(kinds["audio"]["parts"]) == ["audio_tower", "embed_audio", *decoder]
    assert names(kinds["image"]["inputs"]) == ["input_ids", "mm_token_type_ids", "pixel_values", "image_position_ids"]
    assert names(kinds["audio"]["inputs"]) == ["input_ids", "mm_token_type_ids", "input_features"]
    for part in (part for modality in kinds.values() for part in modality["inputs"]):
        assert part["difference"] <= {"pixel_values": 1e-6, "input_features": 1e-5}.get(part["name"], 0), part
    assert kinds["text"]["tokens"] > 64 + 32  # beyond the window of the sliding layers
    for modality in kinds.values():
        assert modality["beyond"] == [] and modality["notes"] == []
        for part in modality["parts"]:
            assert part["difference"] <= 5e-5 * part["size"] and part["noise"] <= 5e-5 * part["size"], part
            assert part["noise"] > 0 and part["bound"] >= 10 * part["noise"]
        assert sum(part["difference"] for part in modality["parts"]) > 0  # two implementations, not one twice
    for words in ("text (built-in", "picture (built-in", "clip (built-in", "within bound", "audio tower", "noise"):
        assert words in out, words
    assert "BEYOND" not in out and "transformers computes 12 keys" in out


def test_losses_are_those_of_transformers_with_either_window(capsys, tmp_path, monkeypatch):
    """13 keys in transformers: its own mask function with a window one longer."""
    _, out, found = report(capsys, tmp_path)
    samples = {s.kind: s for s in make_samples(Processor(CHECKPOINT))}
    backend = TorchBackend(CHECKPOINT, device="cpu")
    for kind, modality in by_kind(found).items():
        expected = backend.run(samples[kind].batch).loss
        assert modality["loss"]["transformers"] == pytest.approx(expected, abs=2e-6)
        assert modality["loss"]["ours"] == pytest.approx(expected, abs=1e-5)
    windows = found["windows"]
    assert windows["12"]["loss"] == by_kind(found)["audio"]["loss"]["ours"]
    assert windows["12"]["difference"] < 1e-4 < 1e-2 < windows["13"]["difference"]
    original = sys.modules[MODELING].sliding_window_mask_function
    monkeypatch.setattr(f"{MODELING}.sliding_window_mask_function", lambda w: original((w[0] + 1, w[1])))
    expected = backend.run(samples["audio"].batch).loss
    assert abs(expected - windows["12"]["loss"]) > 1e-3
    assert windows["13"]["loss"] == pytest.approx(expected, abs=1e-5)
    lower = min(windows, key=lambda window: windows[window]["loss"])
    assert f": lower with {lower}, by {abs(windows['12']['loss'] - windows['13']['loss']):.4f}" in out


def test_a_transformers_that_computes_13_keys(capsys, tmp_path, monkeypatch):
    original = sys.modules[MODELING].sliding_window_mask_function
    monkeypatch.setattr(f"{MODELING}.sliding_window_mask_function", lambda w: original((w[0] + 1, w[1])))
    code, out, found = report(capsys, tmp_path)
    assert code == 1 and by_kind(found)["audio"]["beyond"] == ["audio_tower"]
    assert "transformers computes 13 keys" in out


def damaged(monkeypatch, name, size=0.5):
    """Every model that ours loads has one weight moved."""

    def load(*args, **kwargs):
        model = load_model(*args, **kwargs)
        path, _, leaf = name.rpartition(".")
        module = dict(model.named_modules())[path]
        change = np.zeros(module[leaf].shape, np.float32)
        change.flat[3] = size
        module[leaf] = module[leaf] + mx.array(change)
        return model

    monkeypatch.setattr(parity, "load_model", load)


DECODER = "model.language_model"
DAMAGE = {
    f"{DECODER}.layers.3.mlp.down_proj.weight": ("layers.3", "decoder layer 3", {"text", "image", "audio"}),
    f"{DECODER}.layers.0.self_attn.q_norm.weight": ("layers.0", "decoder layer 0", {"text", "image", "audio"}),
    f"{DECODER}.per_layer_model_projection.weight": ("layers.0", "decoder layer 0", {"text", "image", "audio"}),
    f"{DECODER}.norm.weight": ("norm", "hidden states", {"text", "image", "audio"}),
    "model.vision_tower.encoder.layers.1.self_attn.v_proj.linear.weight": ("vision_tower", "vision tower", {"image"}),
    "model.audio_tower.layers.2.feed_forward1.ffw_layer_1.linear.weight": ("audio_tower", "audio tower", {"audio"}),
    "model.audio_tower.output_proj.bias": ("audio_tower", "audio tower", {"audio"}),
    "model.embed_vision.embedding_projection.weight": ("embed_vision", "vision embedder", {"image"}),
    "model.embed_audio.embedding_projection.weight": ("embed_audio", "audio embedder", {"audio"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_wrong_weight_is_found_where_it_is(name, capsys, tmp_path, monkeypatch):
    part, words, wrong = DAMAGE[name]
    damaged(monkeypatch, name)
    code, out, found = report(capsys, tmp_path)
    assert code == 1 and found["within"] is False
    for kind, modality in by_kind(found).items():
        assert modality["beyond"] == ([part] if kind in wrong else []), kind
    assert out.count(f"BEYOND the bound, first in: {words}") == len(wrong)


def test_wrong_preprocessing_is_told_apart_from_a_wrong_model(capsys, tmp_path, monkeypatch):
    """Both models read our arrays: what is wrong with those shows in the inputs alone."""
    right, pixels = Processor._features, Processor._patches
    monkeypatch.setattr(Processor, "_features", lambda *args: right(*args) + np.float32(1e-3))

    def darker(*args):
        patches = pixels(*args)
        return type(patches)(patches.pixels // 2, patches.positions, patches.soft_tokens)

    monkeypatch.setattr(Processor, "_patches", darker)
    code, out, found = report(capsys, tmp_path)
    kinds = by_kind(found)
    assert code == 1 and kinds["text"]["beyond"] == []
    assert kinds["image"]["beyond"] == ["pixel_values"] and kinds["audio"]["beyond"] == ["input_features"]
    assert "BEYOND the bound, first in: pixels" in out


def test_own_media(capsys, tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", (0.1 * rng.standard_normal(70_001)).astype(np.float32), 22_050)
    Image.fromarray(rng.integers(0, 256, (61, 200, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    own = ("--audio", tmp_path / "a.wav", "--text", "alfa bravo", "--image", tmp_path / "b.png")
    code, out, found = report(capsys, tmp_path, *own)
    kinds = by_kind(found)
    assert code == 0 and kinds["audio"]["source"] == "a.wav" and kinds["image"]["source"] == "b.png"
    assert kinds["image"]["loss"] == {} and kinds["audio"]["loss"]["ours"] > 0
    assert "clip (a.wav" in out and str(tmp_path) not in json.dumps(found)


def test_bfloat16_and_the_choice_of_dtype(capsys, monkeypatch):
    monkeypatch.setattr(parity, "_memory", lambda: 10_000_000)
    found = parity.compare(CHECKPOINT, device="cpu")
    assert found.facts["dtype"] == "bfloat16" and "float32 does not fit" in found.facts["dtype_why"]
    assert found.within
    by = {part.name: part for part in found.modalities[0].parts}
    assert 1e-3 < by["logits"].noise < 2 and by["logits"].difference > 1e-3
    monkeypatch.setattr(parity, "_memory", lambda: 100_000_000)
    weights = sum(np.prod(w.shape) for w in TorchBackend(CHECKPOINT, device="cpu").model.parameters())
    assert parity._dtype(None, weights)[0] == "float32"
    assert parity._dtype("bfloat16", weights) == ("bfloat16", "asked for")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Gemma 3, with the demo's tokenizer and template, which has as many words."""
    folder = tmp_path_factory.mktemp("text")
    gemma3.make(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, folder / name)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "processor_class": "Gemma3Processor"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def test_a_text_only_checkpoint(text_folder, capsys, tmp_path, monkeypatch):
    code, out, found = report(capsys, tmp_path, folder=text_folder)
    (text,) = found["modalities"]
    assert code == 0 and text["kind"] == "text" and names(text["inputs"]) == ["input_ids"]
    assert found["windows"] == {} and "audio window" not in out
    expected = TorchBackend(text_folder, device="cpu").run(make_samples(Processor(text_folder))[0].batch).loss
    assert text["loss"]["ours"] == pytest.approx(expected, abs=1e-5)
    damaged(monkeypatch, "model.layers.5.self_attn.o_proj.weight")
    code, _, found = report(capsys, tmp_path, folder=text_folder)
    assert code == 1 and found["modalities"][0]["beyond"] == ["layers.5"]
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, np.float32), 16_000)
    given = ("--audio", tmp_path / "a.wav", "--text", "nothing")
    code, _, err = doctor(capsys, "--model", text_folder, "--parity", *given)
    assert code == 2 and "this checkpoint has no audio tower" in err


def as_sample(kind, batch):
    """A sample of arrays as the tiny checkpoints' helpers make them."""
    ids = batch["input_ids"].astype(np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[:, -9:] = ids[:, -9:]
    types = batch.get("mm_token_type_ids", np.zeros_like(ids)).astype(np.int32)
    media = {n: a for n, a in batch.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "image_position_ids" in media:
        media["image_position_ids"] = media["image_position_ids"].astype(np.int32)
    row = Batch(ids, batch["attention_mask"].astype(np.int32), types, labels, **media)
    example = Example((Turn("user", (Text("hello"),)),))
    return Sample(kind, example, row, np.arange(ids.shape[1] - 20, ids.shape[1], dtype=np.int32), "random")


def unified_inputs(kind):
    """As `tiny.inputs`, of merged patches and raw samples."""
    if kind == "text":
        return tiny.inputs("text", n_text=40)
    slots = 12 if kind == "image" else 21
    token, opening, closing = (tiny.IMG, tiny.BOI, tiny.EOI) if kind == "image" else (tiny.AUD, tiny.BOA, tiny.EOA)
    rng = np.random.default_rng(0)
    ids = np.array([[2, 5, 6, opening, *[token] * slots, closing, *rng.integers(3, 490, 30)]])
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch["mm_token_type_ids"] = np.where(ids == tiny.IMG, 1, np.where(ids == tiny.AUD, 3, 0))
    if kind == "image":
        batch["pixel_values"], batch["image_position_ids"], _ = tiny.image_inputs(((4, 3),), 12, patch=12)
    else:
        batch["input_features"], batch["input_features_mask"], _ = tiny.audio_inputs((slots,), 40)
    return batch


def gemma3n_inputs(kind):
    import tiny_gemma3n as tiny3n

    return tiny3n.inputs(kind, n_text=40, lens=(80,))


def make_gemma3n(folder):
    pytest.importorskip("timm")
    import tiny_gemma3n as tiny3n

    tiny3n.make(folder, seed=0)


FAMILIES = {
    "31B": (lambda f: tiny.make(f, seed=0, **tiny.larger()), tiny.inputs, "text image", 12),
    "26B": (lambda f: tiny.make(f, seed=0, **tiny.larger(tiny.EXPERTS)), tiny.inputs, "text image", 12),
    "12B": (lambda f: tiny.make_unified(f, seed=0), unified_inputs, "text image audio", 12),
    "3n": (make_gemma3n, gemma3n_inputs, "text image audio", 10),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, monkeypatch):
    """Random checkpoints without tokenizers, so that samples are arrays and preprocessing is not compared."""
    make, inputs, kinds, layers = FAMILIES[family]
    make(tmp_path)
    samples = [as_sample(kind, inputs(kind)) for kind in kinds.split()]
    monkeypatch.setattr(parity, "make_samples", lambda *args: samples)
    found = parity.compare(tmp_path, "float32", "cpu")
    assert found.windows == {}
    backend = TorchBackend(tmp_path, device="cpu")
    for sample, modality in zip(samples, found.modalities, strict=True):
        assert modality.beyond == [], [part for part in modality.parts if not part.within]
        own = {"text": [], "image": ["vision_tower", "embed_vision"], "audio": ["audio_tower", "embed_audio"]}
        expected = own[sample.kind][1:] if family == "12B" else own[sample.kind]
        expected = [*expected, "embeddings", *(f"layers.{i}" for i in range(layers)), "norm", "logits"]
        assert [part.name for part in modality.parts] == expected
        assert all(part.size > 0.01 for part in modality.parts)
        assert "preprocessing not compared" in modality.notes[0]
        assert modality.loss["ours"] == pytest.approx(modality.loss["transformers"], abs=1e-4)
        assert modality.loss["transformers"] == pytest.approx(backend.run(sample.batch).loss, abs=1e-5)
    assert set(found.runs) == ({"sliding", "all"} if family == "12B" else set())
    if found.runs:
        assert found.runs["all"]["loss"] == found.modalities[1].loss["ours"] != found.runs["sliding"]["loss"]
        assert found.runs["all"]["difference"] < 1e-4 < 1e-2 < found.runs["sliding"]["difference"]


@pytest.fixture
def unified_folder(tmp_path, monkeypatch):
    """In the manner of 12B, with tokenizer and processor; pictures and clips of real sizes."""
    write_files(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ids = {name: value for name, value in config.items() if name.endswith(("_token_id", "_token_index"))}
    monkeypatch.setitem(tiny.UNIFIED_VISION, "patch_size", 16)
    monkeypatch.setitem(tiny.UNIFIED_AUDIO, "audio_embed_dim", 640)
    tiny.make_unified(tmp_path, 0, **ids)
    names = json.loads((tmp_path / "processor_config.json").read_text()) | {"processor_class": "Gemma4UnifiedProcessor"}
    names["feature_extractor"] = {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"}
    for kind in ("Image", "Video"):
        names[f"{kind.lower()}_processor"][f"{kind.lower()}_processor_type"] = f"Gemma4Unified{kind}Processor"
    (tmp_path / "processor_config.json").write_text(json.dumps(names))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("Gemma4Processor", "Gemma4UnifiedProcessor"))
    return tmp_path


def test_without_towers_whole(unified_folder, capsys, tmp_path):
    code, out, found = report(capsys, tmp_path, folder=unified_folder)
    kinds = by_kind(found)
    assert code == 0 and list(kinds) == ["text", "image", "audio"]
    for part in (part for modality in kinds.values() for part in modality["inputs"]):
        assert part["difference"] <= {"pixel_values": 4.5 / 255}.get(part["name"], 0), part
    assert names(kinds["audio"]["inputs"]) == ["input_ids", "mm_token_type_ids", "input_features"]
    assert names(kinds["image"]["parts"])[:2] == ["embed_vision", "embeddings"]
    assert "a picture that sees itself whole: transformers computes all layers" in out and "audio window" not in out


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra(module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = doctor(capsys, "--model", CHECKPOINT, "--parity")
    assert code == 2 and err.count("\n") == 1
    assert err == f'error: --parity needs {module}, which is not installed: pip install "gemma-mlx[torch]"\n'


def test_bad_requests(capsys, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound at all")
    (tmp_path / "b.png").write_bytes(b"no picture")
    model = ("--model", CHECKPOINT)
    clip = DATA / "speech" / "test_nato" / "074_Hugo.flac"
    for words, arguments in {
        "does not exist": (*model, "--parity", "--audio", tmp_path / "none.wav", "--text", "a"),
        "a.wav": (*model, "--parity", "--audio", tmp_path / "a.wav", "--text", "a"),
        "b.png": (*model, "--parity", "--image", tmp_path / "b.png"),
        "--audio and --text belong together": (*model, "--parity", "--audio", clip),
        "--audio and --text belong together:": (*model, "--parity", "--text", "whiskey"),
        "--audio goes with --parity": (*model, "--audio", clip),
        "--parity needs --model": ("--parity",),
        "torch has no such device here": (*model, "--parity", "--device", "nonsense"),
        "no such folder": (*model, "--parity", "--out", tmp_path / "none" / "parity.json"),
    }.items():
        code, _, err = doctor(capsys, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1, (words, err)


def test_checkpoints_that_transformers_cannot_read(text_folder, capsys, tmp_path):
    from mlx.utils import tree_flatten

    packed = shutil.copytree(text_folder, tmp_path / "packed")
    saved = dict(tree_flatten(load_model(packed, quantize=4).parameters()))
    mx.eval(saved)
    mx.save_safetensors(str(packed / "model.safetensors"), saved)
    code, _, err = doctor(capsys, "--model", packed, "--parity")
    assert code == 2 and "packed by MLX" in err and err.count("\n") == 1
    bare = tmp_path / "bare"
    gemma3.make(bare)
    code, _, err = doctor(capsys, "--model", bare, "--parity")
    assert code == 2 and "tokenizer" in err and err.count("\n") == 1
