"""Gemma 3n's data against transformers: log-mel frames, pictures, token ids; then training and answers from files."""

import csv
import json

import numpy as np
import pytest
import soundfile
import tiny_gemma3n as tiny3n
from bucketed import assert_nothing_changes
from PIL import Image as PilImage
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gemma_mlx.batch import unit_range
from gemma_mlx.data.batches import collate
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn
from gemma_mlx.data.features_gemma3n import frame_count, log_mel, square_picture, stack_clips
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.generation import generate
from gemma_mlx.loop import finetune

pytest.importorskip("timm")
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MEDIA = {
    tiny3n.BOI: "<start_of_image>", tiny3n.EOI: "<end_of_image>", tiny3n.IMG: "<image_soft_token>",
    tiny3n.BOA: "<start_of_audio>", tiny3n.EOA: "<end_of_audio>", tiny3n.AUD: "<audio_soft_token>",
}  # fmt: skip


def extractor():
    from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor

    return Gemma3nAudioFeatureExtractor()


def test_golden_values():
    """Three tones and their frames, in numbers that transformers gave."""
    t = np.arange(20_837) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * (300 + 900 * t) * t)
    wave = (wave + 0.05 * np.sin(2 * np.pi * 3100 * t)).astype(np.float32)
    features = stack_clips([log_mel(wave)])[0][0]
    assert features.shape == (128, 128)
    assert abs(features.mean() + 6.13652) < 1e-4 and abs(features.std() - 3.748583) < 1e-4
    assert abs(features.max() - 4.183311) < 1e-5 and abs(features[50, 64] + 7.3287783) < 1e-3
    assert np.abs(features[10, :4] - [-2.3039434, -3.4406202, -0.4581867, 0.72206944]).max() < 1e-4


@pytest.mark.parametrize("lengths", [(5_003,), (20_001, 5_003), (513, 700, 16_000), (480_000, 16_001)])
def test_log_mel(lengths):
    """Clips of any lengths in one batch, shorter ones padded: frames and masks of the reference."""
    rng = np.random.default_rng(0)
    waves = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths]
    expected = extractor()(waves)
    features, mask = stack_clips([log_mel(w) for w in waves])
    assert features.dtype == np.float32 and features.shape[1] == frame_count(max(lengths))
    for i in range(len(waves)):
        assert np.array_equal(mask[i], expected["input_features_mask"][i])
        assert np.abs(features[i] - expected["input_features"][i]).max() <= 1e-4


def test_long_and_short_clips():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(480_500).astype(np.float32)
    assert stack_clips([log_mel(wave)])[0].shape == (1, 2997, 128) and frame_count(16_000) == 97
    with pytest.raises(InputError, match="at least 513"):
        log_mel(wave[:512])


@pytest.mark.parametrize("shape", [(150, 70), (768, 768), (900, 1000)])
def test_pictures(shape):
    """Against transformers' Siglip processor, which Gemma 3n's checkpoints name, with their settings."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = SiglipImageProcessorPil(size={"height": 768, "width": 768}, resample=2, do_normalize=False)
    expected = theirs(PilImage.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    picture = square_picture(pixels)
    assert picture.pixels.shape == (3, 768, 768) and picture.soft_tokens == 256
    assert np.abs(unit_range(picture.pixels) - expected).max() <= 1e-6


def make_tokenizer():
    """Byte-fallback BPE whose special tokens have the tiny checkpoint's ids; runs of line breaks are one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁[^▁\n]*|[^▁\n]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    corpus = ["what is in this picture? a small red house"]
    corpus += ["\n\n\n\n\n\nuser\nmodel\n\n\n say what you hear", "hello\n\n"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(corpus * 3, trainer)
    data = json.loads(tokenizer.to_str())
    for i in range(len(data["model"]["vocab"]), tiny3n.VOCAB):
        data["model"]["vocab"][MEDIA.get(i, f"<unused{i}>")] = i
    data["added_tokens"] += [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, text in sorted(MEDIA.items())
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data3n")
    tiny3n.make(folder, seed=0)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 256, "width": 256}}))
    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", (0.1 * rng.standard_normal(9_000)).astype(np.float32), 16_000, "FLOAT")
    PilImage.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "b.png")
    return folder


def conversation(folder, *parts, answer="a small house"):
    kinds = {"image": Image(folder / "b.png"), "audio": Audio(folder / "a.wav")}
    user = Turn("user", tuple(kinds.get(part) or Text(part) for part in parts))
    system = Turn("system", (Text("say what you hear"),))
    return Example((system, user, Turn("model", (Text(answer),))), where="train.csv:2")


@pytest.mark.parametrize(
    "parts",
    [("hello",), ("image", "what is this?"), ("what\n\n", "audio", "hear"), ("audio", "image", "hello"), ("image",)],
)
def test_ids_equal_the_processor_of_transformers(folder, parts):
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma3n.processing_gemma3n import Gemma3nProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = ("boi", "eoi", "image", "boa", "eoa", "audio")
    ids = (tiny3n.BOI, tiny3n.EOI, tiny3n.IMG, tiny3n.BOA, tiny3n.EOA, tiny3n.AUD)
    extra = {f"{n}_token": MEDIA[i] for n, i in zip(names, ids, strict=True)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=extra)
    pictures = SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2, do_normalize=False)
    reference = Gemma3nProcessor(extractor(), pictures, tokenizer, audio_seq_length=tiny3n.N_AUD)
    processor = Processor(folder)
    example = conversation(folder, *parts)
    sample = processor.sample(example)
    slots = {"image": MEDIA[tiny3n.IMG], "audio": MEDIA[tiny3n.AUD]}
    said = "".join(slots.get(part, part.strip()) for part in parts)
    text = (
        f"<bos><start_of_turn>user\nsay what you hear\n\n{said}<end_of_turn>\n<start_of_turn>model\na small house"
        "<end_of_turn>\n"
    )
    media = {"images": [PilImage.open(folder / "b.png")] if "image" in parts else None}
    media["audio"] = [soundfile.read(folder / "a.wav", dtype="float32")[0]] if "audio" in parts else None
    expected = reference(text=[text], **{k: v for k, v in media.items() if v}, add_special_tokens=False)
    assert sample.input_ids.tolist() == list(expected["input_ids"][0])
    assert processor.decode(sample.labels[sample.labels >= 0], False) == "a small house<end_of_turn>"
    assert processor.sample(example, with_features=False).input_ids.tolist() == sample.input_ids.tolist()
    inputs = collate([sample], 0).inputs()
    for name in ("pixel_values", "input_features", "input_features_mask"):
        found = inputs.get(name)
        assert (found is None) == (expected.get(name) is None)
        assert found is None or np.abs(found.astype("f") - np.asarray(expected[name], "f")).max() <= 1e-4


@pytest.fixture(scope="module")
def train_csv(folder):
    """Text, a clip and a picture."""
    with (folder / "train.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["audio_path", "image_path", "prompt", "text"])
        table.writerow(["a.wav", "", "say what you hear", "a small red house"])
        table.writerow(["", "b.png", "what is in this picture?", "hello house"])
        table.writerow(["", "", "hello", "say hello"])
    return folder / "train.csv"


@pytest.mark.parametrize("targets", ["decoder", "audio"])
def test_padding_to_buckets_changes_nothing(folder, train_csv, monkeypatch, targets):
    """Towers that train see as many media as there are, since each of them fills its slots whatever is in it."""
    assert_nothing_changes(folder, train_csv, targets, monkeypatch, size=1, one_shape=targets == "decoder")


def test_training_and_answers(folder, train_csv, tmp_path, monkeypatch):
    """A few steps over text, a clip and a picture: the loss falls; then answers from the trained model."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    run = finetune(
        str(folder), data=train_csv, out=tmp_path / "run", steps=8, lr=2e-2, rank=4, batch_size=3,
        targets="decoder,embedders", quiet=True, save_every=0,
    )  # fmt: skip
    losses = [record["loss"] for record in run.history]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0], losses
    assert not run.model.training
    media = ({"type": "audio", "audio": str(folder / "a.wav")}, {"type": "image", "image": str(folder / "b.png")})
    asked = [[{"role": "user", "content": [part, {"type": "text", "text": "say"}]}] for part in media] + ["hello"]
    answers = generate(run.model, run.processor, asked, max_tokens=4)
    assert len(answers) == 3 and all(isinstance(a, str) for a in answers)
