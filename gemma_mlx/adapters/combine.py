"""Several adapters, each counting so much, as one: exact, by laying their ranks beside each other.

ΔW = Σ wᵢ · sᵢ · (Aᵢ · Bᵢ)ᵀ is the product of [A₁ | A₂ | …] and the wᵢ · sᵢ · Bᵢ below each other: rank r₁ + r₂ + …,
no approximation. ``shrink`` brings such a sum to a given rank by its largest singular values. Weights that were trained
in full add up as their distances from the base.

DoRA rescales whole rows of W + ΔW, which is no sum: a layer with DoRA combines with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from gemma_mlx.adapters.adapter import Adapter, LowRank
from gemma_mlx.errors import InputError


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight for each adapter; 1 where none are given.

    Raises:
        InputError: another number of weights, or one that is not finite.
    """
    if not weights:
        return [1.0] * count
    if len(weights) != count:
        raise InputError(f"adapter_weight: {len(weights)} weights for {count} adapters; give one for each, in order")
    if not all(np.isfinite(weights)):
        raise InputError(f"adapter_weight: {list(weights)}: numbers are needed")
    return [float(w) for w in weights]


def combine(adapters: Sequence[Adapter], weights: Sequence[float], base: Mapping[str, mx.array]) -> Adapter:
    """Σ wᵢ · adapterᵢ; a single adapter of weight 1 is handed on as it is.

    Args:
        adapters: under one model's paths (`gemma_mlx.adapters.fitting.fit`).
        weights: one for each.
        base: the model's own tensors; those that are trained in full are needed.

    Raises:
        InputError: a layer with DoRA that others change too or that does not count once; a layer that one adapter has
            and another trains in full.
    """
    if len(adapters) == 1 and weights[0] == 1.0:
        return adapters[0]
    layers: dict[str, LowRank] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        parts = [(a, a.layers[path], w) for a, w in zip(adapters, weights, strict=True) if path in a.layers]
        layers[path] = _summed(path, parts)
    full: dict[str, mx.array] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.full):
        own = base[name].astype(mx.float32)
        given = [(a.full[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.full]
        full[name] = own + sum(w * (tensor.astype(mx.float32) - own) for tensor, w in given)
    modules = tuple(dict.fromkeys(path for adapter in adapters for path in adapter.modules))
    if both := next((path for path in modules if path in layers), None):
        raise InputError(f"{both}: one adapter has low-rank weights there, another trained it in full; use one of them")
    return replace(adapters[0], layers=layers, modules=modules, full=full, dropout=0.0, rslora=False)


def _summed(path: str, parts: Sequence[tuple[Adapter, LowRank, float]]) -> LowRank:
    _, first, weight = parts[0]
    if len(parts) == 1 and weight == 1.0:
        return first
    if dora := next((a for a, layer, _ in parts if layer.m is not None), None):
        raise InputError(
            f"{dora.where.parent}: {path} has DoRA, which is no sum and cannot be weighted or added to others; "
            "merge that adapter into the base first (export --format hf)"
        )
    a = mx.concatenate([layer.a.astype(mx.float32) for _, layer, _ in parts], axis=1)
    b = mx.concatenate([(w * layer.scale) * layer.b.astype(mx.float32) for _, layer, w in parts], axis=0)
    return LowRank(a, b, 1.0)


def shrink(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """(the adapter with at most `rank` columns a layer, the largest relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ of a layer).

    Truncated singular values: no other matrix of this rank is nearer in the Frobenius norm. The error is what the left
    out singular values say. DoRA's layers stay as they are. Computed in float64.
    """
    worst, layers = 0.0, {}
    for path, layer in adapter.layers.items():
        if layer.m is not None or layer.rank <= rank:
            layers[path] = layer
            continue
        a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (layer.a, layer.b))
        # The product is never formed: QR of both sides leaves a rank × rank matrix to decompose.
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, s, vt = np.linalg.svd(ra @ rb.T)
        total = float(np.sqrt((s**2).sum()))
        error = float(np.sqrt((s[rank:] ** 2).sum())) / total if total else 0.0
        worst, root = max(worst, error), np.sqrt(s[:rank])
        left, right = (qa @ u[:, :rank]) * root, root[:, None] * (qb @ vt[:rank].T).T
        layers[path] = LowRank(mx.array(left.astype(np.float32)), mx.array(right.astype(np.float32)), layer.scale)
    return replace(adapter, layers=layers, rslora=False), worst


def of_rank(adapter: Adapter, rank: int | None) -> tuple[Adapter, list[str]]:
    """(the adapter by `shrink`, what that costs in words); as it is for None."""
    if rank is None:
        return adapter, []
    small, error = shrink(adapter, rank)
    count = sum(small.layers[path] is not layer for path, layer in adapter.layers.items())
    return small, [f"{count} layers brought to rank {rank}; largest relative error of a layer: {error:.1e}"]
