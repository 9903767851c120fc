"""What Gemma 3n's towers read: log-mel frames of a clip, a square picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np

from gemma_mlx.data.features import check_wave
from gemma_mlx.data.mel import Bands, spectra
from gemma_mlx.errors import InputError
from gemma_mlx.spec import MAX_AUDIO_SAMPLES

MEL_BINS = 128
_FRAME, _HOP, _FFT, _MULTIPLE = 512, 160, 1024, 128
_PREEMPHASIS, _FLOOR = np.float32(0.97), 1e-5
_LOW, _HIGH, _RATE = 125.0, 7600.0, 16_000


@cache
def _window() -> np.ndarray:
    """Periodic Hann window, float32 [512]."""
    k = np.arange(_FRAME, dtype=np.float32)
    return (0.5 * (1 - np.cos(2 * np.pi * k / _FRAME))).astype(np.float32)


@cache
def _bands() -> Bands:
    return Bands(mel_filters())


def mel_filters() -> np.ndarray:
    """Triangular filters on the HTK mel scale, 125–7600 Hz, peak 1, float32 [513, 128]."""
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (_LOW, _HIGH))
    edges = 700.0 * (10.0 ** (np.linspace(low, high, MEL_BINS + 2) / 2595.0) - 1.0)
    bins = np.arange(_FFT // 2 + 1)[:, None] * (_RATE / _FFT)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip as the audio tower reads it.

    Attributes:
        features: float32 [frames, 128], one frame for each 160 samples begun.
        samples: how many samples the clip has, up to 30 s of them.
        soft_tokens: of every clip.
    """

    features: np.ndarray
    samples: int
    soft_tokens: int = 188

    def __len__(self) -> int:
        return len(self.features)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.features.nbytes


def log_mel(wave: np.ndarray, soft_tokens: int = 188) -> Clip:
    """Log-mel frames of a clip, as transformers' ``Gemma3nAudioFeatureExtractor`` gives them.

    Magnitudes of 32 ms frames every 10 ms, each with HTK's pre-emphasis, 128 mel bands, log(max(x, 1e-5)). What lies
    beyond the last sample counts as silence; which frames a batch takes of it is up to `stack_clips`.

    Args:
        wave: float32 [samples], mono, 16 kHz, nominally in [−1, 1]. Samples beyond 30 s are ignored.
        soft_tokens: of every clip.

    Raises:
        InputError: another shape or type, or fewer than 513 samples.
    """
    check_wave(wave)
    wave = wave[:MAX_AUDIO_SAMPLES]
    if len(wave) <= _FRAME:
        raise InputError(f"audio too short: {len(wave)} samples, at least {_FRAME + 1} are needed")
    frames = -(-len(wave) // _HOP)
    padded = np.pad(wave, (0, max(0, (frames - 1) * _HOP + _FRAME + 1 - len(wave))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _FRAME + 1)[::_HOP][:frames]
    first = windows[:, :1] * (1 - _PREEMPHASIS)
    rest = windows[:, 1:-1] - _PREEMPHASIS * windows[:, :-2]
    emphasised = np.concatenate([first, rest], axis=1)
    features = np.empty((frames, MEL_BINS), np.float32)
    for start, magnitude in spectra(emphasised, _window(), _FFT):
        bands = _bands()(magnitude).astype(np.float64)
        features[start : start + magnitude.shape[1]] = np.log(np.maximum(bands, _FLOOR)).T
    return Clip(features, len(wave), soft_tokens)


def frame_count(samples: int) -> int:
    """Frames of a batch whose longest clip has so many samples: that clip padded to a multiple of 128 samples."""
    padded = -(-samples // _MULTIPLE) * _MULTIPLE
    return (padded - _FRAME - 1) // _HOP + 1


def stack_clips(clips: Sequence[Clip], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [M, F, 128], mask bool [M, F]) of clips padded with silence to the longest.

    Silence holds the log floor: the tower's convolutions look ahead into it.

    Args:
        clips: at least one.
        multiple: F is rounded up to a multiple of it, as if a longer clip were there.
    """
    frames = -(-frame_count(max(clip.samples for clip in clips)) // multiple) * multiple
    features = np.full((len(clips), frames, MEL_BINS), np.log(_FLOOR), np.float32)
    mask = np.zeros((len(clips), frames), bool)
    for i, clip in enumerate(clips):
        own = min(frames, len(clip))
        features[i, :own], mask[i, :own] = clip.features[:own], True
    return features, mask


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the vision tower reads it, in 8 bits until the tower computes with it.

    Attributes:
        pixels: uint8 [3, side, side].
        soft_tokens: how many vectors the tower makes of it.
    """

    pixels: np.ndarray
    soft_tokens: int = 256

    def digest(self) -> bytes:
        """A hash of what the tower reads."""
        return blake2b(self.pixels, digest_size=16).digest()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.pixels.nbytes


def square_picture(image: np.ndarray, side: int = 768, soft_tokens: int = 256) -> Picture:
    """A picture squashed to side × side, antialiased bilinear on 8 bits (Pillow), as Gemma 3n's processor does it.

    Args:
        image: uint8 [height, width, 3], RGB.
        side: of the result, in pixels.
        soft_tokens: of every picture.

    Raises:
        InputError: not such an array, or a side of zero.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image of shape {image.shape} and type {image.dtype}; expected uint8 [height, width, 3]")
    if not image.shape[0] or not image.shape[1]:
        raise InputError(f"zero-size image: {image.shape[1]}x{image.shape[0]} pixels; both sides must be at least 1")
    if image.shape[:2] != (side, side):
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    return Picture(np.ascontiguousarray(image.transpose(2, 0, 1)), soft_tokens)
