"""AdamW with moments of 8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861).

A moment is kept as one byte per value, an index into a map of 256 numbers in [−1, 1], and one float32 per block of 256
values, the block's largest magnitude. A step unpacks them, is AdamW's in float32, and packs the results. Maps, blocks
and the size below which moments stay float32 are those of bitsandbytes.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from gemma_mlx.optim import Weights, adamw_update

BLOCK = 256
SMALLEST = 4096
"""Tensors of fewer values keep float32 moments: norms and biases are sensitive, and nothing is saved there."""
SIGNED = {"m": True, "v": False}


def dynamic_map(signed: bool) -> np.ndarray:
    """float32 [256], ascending: 0, 1, and the middles of equal parts of the decades [10⁻⁷, 10⁻⁶] … [0.1, 1].

    Decade i of 7 has 2ⁱ parts for either sign, or 2ⁱ⁺¹ where all are positive: precise where large, wide in range.
    """
    values = [np.zeros(1), np.ones(1)]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values)).astype(np.float32)


class DynamicMap:
    """Packing into one of the two maps. Nearest values are found by table: each of the 65,536 cells that float32
    numbers with equal upper 16 bits form has at most one border between two values of a map."""

    def __init__(self, signed: bool):
        values = dynamic_map(signed)
        borders = np.append((values[:-1] + values[1:]) / 2, np.float32(np.inf))
        upper = np.arange(1 << 16, dtype=np.uint32) << 16
        least = np.where(upper >> 31, upper | 0xFFFF, upper).astype(np.uint32).view(np.float32)  # of each cell
        first = np.minimum(np.searchsorted(borders, least), 255)  # NaN goes last
        self.signed, self.values, self.borders = signed, mx.array(values), mx.array(borders)
        self.first = mx.array(first.astype(np.uint8))

    def pack(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """float32 of any shape -> (uint8 of that shape, float32 [blocks]: the largest magnitude of each block)."""
        flat = mx.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        largest = mx.max(mx.abs(flat), axis=1)
        share = flat * (1.0 / mx.maximum(largest, 1e-38))[:, None]
        first = self.first[share.view(mx.uint32) >> 16]
        index = first + (share > self.borders[first])
        if not self.signed:  # a second moment of 0 would let the next step divide by epsilon
            index = mx.maximum(index, share > 0)
        return index.astype(mx.uint8).reshape(-1)[: x.size].reshape(x.shape), largest

    def unpack(self, index: mx.array, largest: mx.array) -> mx.array:
        """The reverse, float32."""
        flat = mx.pad(self.values[index].reshape(-1), (0, -index.size % BLOCK)).reshape(-1, BLOCK)
        return (flat * largest[:, None]).reshape(-1)[: index.size].reshape(index.shape)


_MAPS = {kind: DynamicMap(signed) for kind, signed in SIGNED.items()}


def _scale(kind: str) -> str:
    return f"{kind}_largest"


def adamw_8bit_init(weights: Weights) -> dict[str, Weights]:
    """Zero moments: ``m`` and ``v``, uint8 with ``m_largest`` and ``v_largest`` float32 [blocks], or float32."""
    large = {name for name, w in weights.items() if w.size >= SMALLEST}
    state: dict[str, Weights] = {}
    for kind in SIGNED:
        state[kind] = {k: mx.zeros(w.shape, mx.uint8 if k in large else mx.float32) for k, w in weights.items()}
        state[_scale(kind)] = {k: mx.zeros(-(-weights[k].size // BLOCK)) for k in weights if k in large}
    return state


def adamw_8bit_update(
    weights: Weights, state: dict[str, Weights], grads: Weights, scalars: mx.array
) -> tuple[Weights, dict[str, Weights]]:
    """``gemma_mlx.optim.adamw_update`` on unpacked moments; what it leaves is packed again."""
    new_weights: Weights = {}
    new_state: dict[str, Weights] = {kind: {} for kind in state}
    for name, w in weights.items():
        packed = name in state[_scale("m")]
        moments = {
            kind: {name: part.unpack(state[kind][name], state[_scale(kind)][name]) if packed else state[kind][name]}
            for kind, part in _MAPS.items()
        }
        changed, moments = adamw_update({name: w}, moments, {name: grads[name]}, scalars)
        new_weights |= changed
        for kind, part in _MAPS.items():
            value = moments[kind][name]
            if packed:
                value, new_state[_scale(kind)][name] = part.pack(value)
            new_state[kind][name] = value
    return new_weights, new_state
