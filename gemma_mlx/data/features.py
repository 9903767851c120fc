"""What the towers read: log-mel frames of a clip, patches of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np

from gemma_mlx.data.mel import Bands, spectra
from gemma_mlx.errors import InputError
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, audio_frames, image_size

MEL_BINS = 128
_FRAME, _HOP, _FFT = 320, 160, 512
_FLOOR = 1e-3
SILENCE = np.float32(np.log(_FLOOR))
"""What every band of a silent frame holds."""


@cache
def _window() -> np.ndarray:
    """Periodic Hann window, float32 [320]."""
    k = np.arange(_FRAME)
    return (0.5 - 0.5 * np.cos(2 * np.pi * k / _FRAME)).astype(np.float32)


@cache
def _bands() -> Bands:
    return Bands(mel_filters())


def mel_filters() -> np.ndarray:
    """Triangular filters on the HTK mel scale, 0–8000 Hz, peak 1, float64 [257, 128]. The first one is empty."""
    top = 2595.0 * np.log10(1.0 + 8000.0 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, top, MEL_BINS + 2) / 2595.0) - 1.0)
    bins = np.linspace(0.0, 8000.0, _FFT // 2 + 1)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))


def check_wave(wave: np.ndarray) -> None:
    """Raise InputError unless it is one float32 axis."""
    if wave.ndim != 1 or wave.dtype != np.float32:
        raise InputError(
            f"wrong sample format: audio of shape {wave.shape} and type {wave.dtype}; expected one float32 axis, "
            "16 kHz mono in [-1, 1]"
        )


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Log-mel frames of a clip, as transformers' ``Gemma4AudioFeatureExtractor`` gives them.

    Magnitudes of 20 ms frames every 10 ms, 128 HTK mel bands, log(x + 0.001). Only valid frames are returned: frame i
    is valid if sample 160·(i + 1) exists. Further frames of a batch are zeros.

    Args:
        wave: float32 [samples], mono, 16 kHz, nominally in [−1, 1]. Samples beyond 30 s are ignored.

    Returns:
        float32 [frames, 128], frames = (samples − 1) // 160.

    Raises:
        InputError: another shape or type, or fewer than 161 samples.
    """
    check_wave(wave)
    frames = audio_frames(len(wave))
    if not frames:
        raise InputError(f"empty audio: {len(wave)} samples, at least 161 are needed")
    padded = np.concatenate([np.zeros(_HOP, np.float32), wave[:MAX_AUDIO_SAMPLES]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP][:frames]
    out = np.empty((frames, MEL_BINS), np.float32)
    for start, magnitude in spectra(windows, _window(), _FFT):
        # float32 into the FFT and float64 after it: the reference's order, whose rounding shows in quiet bands.
        bands = _bands()(magnitude)
        bands += _FLOOR
        out[start : start + magnitude.shape[1]] = np.log(bands, out=bands).T
    return out


def raw_frames(wave: np.ndarray, samples: int = 640) -> np.ndarray:
    """A clip cut into frames of raw samples, the last one filled up with zeros, float32 [frames, samples].

    What Gemma 4 12B reads (transformers' ``Gemma4UnifiedAudioFeatureExtractor``); `wave` as for `log_mel`.
    """
    return np.pad(wave, (0, -len(wave) % samples)).reshape(-1, samples).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Patches:
    """A picture as the vision tower reads it, in 8 bits until the tower computes with it.

    Attributes:
        pixels: uint8 [patches, 3·patch²], patches row by row, each (row, column, channel).
        positions: int32 [patches, 2], (x, y) of each patch.
        soft_tokens: how many vectors the tower makes of it.
    """

    pixels: np.ndarray
    positions: np.ndarray
    soft_tokens: int

    def digest(self) -> bytes:
        """A hash of what the tower reads."""
        content = blake2b(self.positions, digest_size=16)
        content.update(self.pixels)
        return content.digest()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.pixels.nbytes + self.positions.nbytes


def image_patches(image: np.ndarray, budget: int = 280, patch: int = 16, pool: int = 3) -> Patches:
    """Patches of a picture resized to at most `budget` soft tokens, as transformers' ``Gemma4ImageProcessor`` cuts it.

    The aspect ratio is kept up to whole cells of patch·pool pixels; antialiased bicubic on 8 bits (Pillow).

    Args:
        image: uint8 [height, width, 3], RGB.
        budget: the most soft tokens the picture may take.
        patch: pixels on a patch's side.
        pool: patches on a soft token's side.

    Raises:
        InputError: not such an array, a side of zero, or a size that leaves no whole cell.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image of shape {image.shape} and type {image.dtype}; expected uint8 [height, width, 3]")
    height, width = image.shape[:2]
    if not height or not width:
        raise InputError(f"zero-size image: {width}x{height} pixels; both sides must be at least 1")
    new_height, new_width = image_size(height, width, budget, patch, pool)
    if (new_height, new_width) != (height, width):
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    rows, columns = new_height // patch, new_width // patch
    pixels = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return Patches(np.ascontiguousarray(pixels), np.stack([x, y], axis=-1), rows * columns // pool**2)
