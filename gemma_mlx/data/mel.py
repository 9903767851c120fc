"""Triangular filters, each over its own few bins of a spectrum."""

from __future__ import annotations

import numpy as np


class Bands:
    """A product with a matrix of mel filters, most of which is zeros.

    No matrix product: a BLAS would wake threads of its own for it, which wait for the cores that training keeps busy.

    Args:
        filters: [bins, bands]; the weights of a band lie side by side, and a band may have none.
    """

    def __init__(self, filters: np.ndarray):
        self._bins = np.concatenate([np.flatnonzero(band) for band in filters.T])
        self._weights = np.concatenate([band[np.flatnonzero(band)] for band in filters.T])
        counts = np.count_nonzero(filters, axis=0)
        self._filled, self._bands = np.flatnonzero(counts), len(counts)
        self._starts = (np.cumsum(counts) - counts)[self._filled]

    def __call__(self, spectrum: np.ndarray) -> np.ndarray:
        """[frames, bins] -> [frames, bands], in the type of ``spectrum @ filters``."""
        weighted = np.take(spectrum, self._bins, axis=1) * self._weights
        out = np.zeros((len(spectrum), self._bands), weighted.dtype)
        out[:, self._filled] = np.add.reduceat(weighted, self._starts, axis=1)
        return out
