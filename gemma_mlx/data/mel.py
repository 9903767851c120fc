"""Spectra of short frames, and triangular filters, each over its own few bins of a spectrum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_GROUP = 8
"""Bands of one product."""
_TOGETHER = 192
"""Frames at a time: what they take stays in a core's cache, and is never new memory, which costs more than the FFT."""


def spectra(frames: np.ndarray, window: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Magnitudes of windowed frames, bins first, for a stretch of frames at a time.

    Args:
        frames: float32 [frames, samples], samples at most `n`; may be a view of overlapping stretches.
        window: float32 [samples].
        n: length of the transform; frames are filled up with zeros behind.

    Yields:
        (the first frame of the stretch, magnitudes [n / 2 + 1, frames of the stretch]).
    """
    # Filled up here: rfft(…, n) does it row by row, in almost the transform's own time.
    filled = np.zeros((min(_TOGETHER, len(frames)), n), frames.dtype)
    for start in range(0, len(frames), _TOGETHER):
        some = frames[start : start + _TOGETHER]
        np.multiply(some, window, out=filled[: len(some), : some.shape[1]])
        yield start, np.ascontiguousarray(np.abs(np.fft.rfft(filled[: len(some)])).T)


class Bands:
    """A product with a matrix of mel filters, most of which is zeros.

    A few bands at a time, over the bins that they have: products so small that a BLAS wakes no threads for them, which
    would wait for the cores that training keeps busy (OpenBLAS stays alone up to 262,144 multiplications).

    Args:
        filters: [bins, bands]; the weights of a band lie side by side, and a band may have none.
    """

    def __init__(self, filters: np.ndarray):
        self._bands = filters.shape[1]
        self._groups = []
        for start in range(0, self._bands, _GROUP):
            some = filters[:, start : start + _GROUP]
            used = np.flatnonzero(some.any(axis=1))
            bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
            self._groups.append((slice(start, start + _GROUP), bins, np.ascontiguousarray(some[bins].T)))

    def __call__(self, spectrum: np.ndarray) -> np.ndarray:
        """[bins, frames] -> [bands, frames], in the type of ``filters.T @ spectrum``."""
        kind = np.result_type(spectrum, self._groups[0][2])
        spectrum = spectrum.astype(kind, copy=False)
        out = np.empty((self._bands, spectrum.shape[1]), kind)
        for bands, bins, weights in self._groups:
            np.matmul(weights, spectrum[bins], out=out[bands])
        return out
