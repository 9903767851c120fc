"""Spectra of short frames, and triangular filters, each over its own few bins of a spectrum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

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

    No matrix product: a BLAS would wake threads of its own for it, which wait for the cores that training keeps busy.
    Step i adds every band's i-th bin, for all frames at once.

    Args:
        filters: [bins, bands]; the weights of a band lie side by side, and a band may have none.
    """

    def __init__(self, filters: np.ndarray):
        counts = np.count_nonzero(filters, axis=0)
        order = np.argsort(-counts, kind="stable")  # the widest first, so that each step takes the first few
        self._places = np.argsort(order)
        first = np.argmax(filters != 0, axis=0)
        self._steps = []
        for i in range(int(counts.max())):
            bands = order[: int((counts > i).sum())]
            self._steps.append((first[bands] + i, filters[first[bands] + i, bands][:, None]))

    def __call__(self, spectrum: np.ndarray) -> np.ndarray:
        """[bins, frames] -> [bands, frames], in the type of ``filters.T @ spectrum``."""
        kind = np.result_type(spectrum, self._steps[0][1])
        spectrum = spectrum.astype(kind, copy=False)
        total = np.zeros((len(self._places), spectrum.shape[1]), kind)
        for bins, weights in self._steps:
            part = spectrum[bins]
            part *= weights
            total[: len(bins)] += part
        return total[self._places]
