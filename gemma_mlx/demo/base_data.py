"""What the demo's base learns from: features kept on disk, augmentation of features, and batches of torch tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemma_mlx.demo import pictures, speech

FLOOR = 1e-3  # transformers' mel_floor
SPEECH_PROMPTS = (
    "Transcribe the following speech segment in its original language.", "Transcribe this audio.",
    "Transcribe the audio.", "Transcribe the speech.", "Transcribe the following speech segment into English text.",
    "Write down what you hear.", "What is said?", "Transcribe this recording.",
    "Transcribe the following speech segment in English into English text.", "Transcribe the audio clip.")
DEFAULT_PROMPT = ("Transcribe the following speech segment in its original language. "
                  "Write only the transcription, without line breaks.")  # gemma_mlx.data.examples.Prompts.transcribe
PICTURE_PROMPTS = {
    "letter": ("Which letter is this?", "What letter is shown?", "Which letter is shown in the picture?"),
    "shape": ("Which shape is this?", "What shape is shown?", "Which shape is shown in the picture?")}
ANY_PROMPTS = ("What is this?", "What is shown in the picture?", "What is in this image?")
COPY_PROMPTS = ("Repeat:", "Copy exactly:", "Repeat the following text:", "Write this down:")


@dataclass
class SpeechSet:
    texts: list[str]
    features: list[np.ndarray]  # (frames, 128) float16, valid frames only


def log_mel(wave: np.ndarray, extractor) -> np.ndarray:
    """(samples,) -> valid frames (n, 128) by transformers' Gemma4AudioFeatureExtractor."""
    made = extractor([wave], pad_to_multiple_of=None, return_tensors="np")
    return made["input_features"][0][made["input_features_mask"][0].astype(bool)].astype(np.float16)


def speech_set(path: Path, n: int, voices: list[str], seed: int) -> SpeechSet:
    """Everyday words in `voices`; made once, then read back from the cache file `path`."""
    from transformers import Gemma4AudioFeatureExtractor

    clips = speech.draw_clips(n, {w: w for w in speech.EVERYDAY}, voices, seed)
    if not path.exists():
        extractor = Gemma4AudioFeatureExtractor()
        made = [log_mel(w, extractor) for w in speech.synthesise_all(clips, threads=1)]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, lengths=[len(m) for m in made], features=np.concatenate(made))
    with np.load(path) as kept:
        parts = np.split(kept["features"], np.cumsum(kept["lengths"])[:-1])
    return SpeechSet([c.text for c in clips], parts)


def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tempo, vocal-tract length, gain, hiss and masked bands, all on the log-mel frames (n, 128) float32."""
    x = frames.astype(np.float32)
    length = max(round(len(x) * rng.uniform(0.87, 1.18)), 8)
    x = _interpolate(x, np.linspace(0, len(x) - 1, length))
    warp = rng.uniform(0.88, 1.13)
    x = _interpolate(x.T, np.clip(np.arange(128) * warp, 0, 127)).T
    mel = np.maximum(np.exp(x) - FLOOR, 0) * np.exp(rng.uniform(-1.6, 0.7))
    tilt = np.exp(rng.normal(0, 0.25) * np.linspace(-1, 1, 128))
    hiss = np.exp(rng.uniform(np.log(1e-4), np.log(0.15))) * np.linspace(0.3, 1.6, 128)
    noise = hiss * rng.rayleigh(0.8, mel.shape).astype(np.float32) * (rng.random() < 0.7)
    x = np.log(mel * tilt + noise + FLOOR).astype(np.float32)
    for _ in range(int(rng.integers(0, 3))):
        start, width = int(rng.integers(0, 120)), int(rng.integers(1, 12))
        x[:, start:start + width] = np.log(FLOOR)
    return x


def _interpolate(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(x) - 1)
    part = (at - low)[:, None].astype(x.dtype)
    return x[low] * (1 - part) + x[high] * part


class Writer:
    """Turns one question and answer into token ids and labels, as the chat template would."""

    def __init__(self, tokenizer):
        self.ids = {t: i for t, i in tokenizer.get_vocab().items()}
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.start = self.encode("<bos><|turn>user\n")
        self.middle = self.encode("<turn|>\n<|turn>model\n")

    def slots(self, kind: str, count: int) -> list[int]:
        return [self.ids[f"<|{kind}>"], *[self.ids[f"<|{kind}|>"]] * count, self.ids[f"<{kind}|>"]]

    def row(self, parts: list[str | list[int]], answer: str) -> tuple[list[int], list[int]]:
        """Parts are text or ready ids -> (ids, labels with -100 outside answer and <turn|>)."""
        prompt = list(self.start)
        for part in parts:
            prompt += self.encode(part) if isinstance(part, str) else part
        prompt += self.middle
        answer_ids = [*self.encode(answer), self.ids["<turn|>"]]
        return prompt + answer_ids, [-100] * len(prompt) + answer_ids


def pad_rows(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in rows)
    out = {"input_ids": torch.zeros(len(rows), length, dtype=torch.long),
           "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
           "labels": torch.full((len(rows), length), -100)}
    for i, (ids, labels) in enumerate(rows):
        out["input_ids"][i, :len(ids)] = torch.tensor(ids)
        out["attention_mask"][i, :len(ids)] = 1
        out["labels"][i, :len(ids)] = torch.tensor(labels)
    return out


def either_way(rng: np.random.Generator, media: list[int], prompt: str) -> list:
    return [media, prompt] if rng.random() < 0.5 else [prompt, media]


def speech_batch(writer: Writer, texts: list[str], frames: list[np.ndarray], rng) -> dict[str, torch.Tensor]:
    """Padded features, rows, and for CTC the transcripts' ids."""
    longest = max(len(f) for f in frames)
    features = torch.zeros(len(frames), longest, 128)
    mask = torch.zeros(len(frames), longest, dtype=torch.bool)
    rows = []
    for i, (text, frame) in enumerate(zip(texts, frames, strict=True)):
        features[i, :len(frame)] = torch.from_numpy(np.asarray(frame, np.float32))
        mask[i, :len(frame)] = True
        prompt = SPEECH_PROMPTS[int(rng.integers(len(SPEECH_PROMPTS)))]
        prompt = DEFAULT_PROMPT if rng.random() < 0.4 else prompt
        rows.append(writer.row(either_way(rng, writer.slots("audio", -(-len(frame) // 4)), prompt), text))
    return {**pad_rows(rows), "input_features": features, "input_features_mask": mask,
            "transcripts": [torch.tensor(writer.encode(t)) for t in texts]}


def patches(blocks: np.ndarray) -> np.ndarray:
    """(8, 8) cells -> (576, 768) patches of the 384x384 picture that budget 70 makes of a square one."""
    from PIL import Image

    grey = np.asarray(Image.fromarray(pictures.enlarge(blocks)).resize((384, 384), Image.Resampling.BICUBIC))
    cut = (grey.astype(np.float32) / 255).reshape(24, 16, 24, 16).transpose(0, 2, 1, 3).reshape(576, 256, 1)
    return np.repeat(cut, 3, axis=2).reshape(576, 768)


def picture_positions(count: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1)], -1).expand(count, -1, -1)


def picture_batch(writer: Writer, count: int, rng: np.random.Generator, blanks: float = 0.0) -> dict[str, torch.Tensor]:
    """Fresh letters and shapes with a question each; none shows a digit.

    A share `blanks` of the pictures is one even grey: then only the question says what kind of answer is wanted.
    """
    rows, pixels = [], []
    for _ in range(count):
        kind = "letter" if rng.random() < 0.8 else "shape"
        subjects = pictures.LETTERS if kind == "letter" else pictures.SHAPES
        subject = subjects[int(rng.integers(len(subjects)))]
        prompts = PICTURE_PROMPTS[kind] + ANY_PROMPTS[:1 + int(rng.integers(3))]
        rows.append(writer.row(either_way(rng, writer.slots("image", 64), prompts[int(rng.integers(len(prompts)))]),
                               subject))
        cells = pictures.draw(subject, rng)
        if blanks and rng.random() < blanks:
            cells = np.full_like(cells, rng.integers(17))
        pixels.append(patches(cells))
    return {**pad_rows(rows), "pixel_values": torch.from_numpy(np.stack(pixels)),
            "image_position_ids": picture_positions(count)}


def copy_batch(writer: Writer, count: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Text to repeat: random letters, digits and everyday words, so that every character has been written once."""
    symbols = [c for c in map(chr, range(33, 127)) if c.isalnum()] * 4 + list("!\"#$%&'()*+,-./:;<=>?@[]^_{|}~ ")
    rows = []
    for _ in range(count):
        if rng.random() < 0.3:
            text = " ".join(rng.choice(speech.EVERYDAY, int(rng.integers(1, 4))))
        else:
            text = "".join(rng.choice(symbols, int(rng.integers(1, 9)))).strip() or "7"
        prompt = COPY_PROMPTS[int(rng.integers(len(COPY_PROMPTS)))]
        rows.append(writer.row([f"{prompt} {text}"], text))
    return pad_rows(rows)
