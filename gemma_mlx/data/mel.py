"""Triangular filters, each over its own few bins of a spectrum."""

from __future__ import annotations

import numpy as np

_TOGETHER = 256
"""Frames at a time: what they take stays in a core's cache."""


class Bands:
    """A product with a matrix of mel filters, most of which is zeros.

    No matrix product: a BLAS would wake threads of its own for it, which wait for the cores that training keeps busy.
    Step i adds every band's i-th bin, for many frames at once.

    Args:
        filters: [bins, bands]; the weights of a band lie side by side, and a band may have none.
    """

    def __init__(self, filters: np.ndarray):
        counts = np.count_nonzero(filters, axis=0)
        self._order = np.argsort(-counts, kind="stable")  # the widest first, so that each step takes the first few
        self._bands = len(counts)
        first = np.argmax(filters != 0, axis=0)
        self._steps = []
        for i in range(int(counts.max())):
            bands = self._order[: int((counts > i).sum())]
            bins = first[bands] + i
            self._steps.append((bins, filters[bins, bands][:, None]))

    def __call__(self, spectrum: np.ndarray) -> np.ndarray:
        """[frames, bins] -> [frames, bands], in the type of ``spectrum @ filters``."""
        out = np.empty((len(spectrum), self._bands), np.result_type(spectrum, self._steps[0][1]))
        for start in range(0, len(spectrum), _TOGETHER):
            part = np.ascontiguousarray(spectrum[start : start + _TOGETHER].T)
            total = np.zeros((self._bands, part.shape[1]), out.dtype)
            for bins, weights in self._steps:
                total[: len(bins)] += part[bins] * weights
            out[start : start + part.shape[1], self._order] = total.T
        return out
