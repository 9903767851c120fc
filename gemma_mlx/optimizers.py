"""The optimizers by name, and an update of weights that are kept in bfloat16 alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gemma_mlx.optim import Weights, adamw_init, adamw_scalars, adamw_update
from gemma_mlx.optim_8bit import adamw_8bit_init, adamw_8bit_update
from gemma_mlx.optim_factored import adafactor_init, adafactor_scalars, adafactor_update

State = dict[str, Weights]
"""Kind ("m", "v", …) -> tensor name -> array. Kinds have no dot in them."""


LARGE = 1 << 20
"""Values of a tensor that others wait for; smaller ones are updated side by side."""


@dataclass(frozen=True)
class Optimizer:
    """Three functions of their arguments alone.

    ``init(weights)``: the state before the first step. ``scalars(step, lr, weight_decay)``: float32 [n], what step
    number ``step`` (from 1) needs. ``update(weights, state, grads, scalars)``: new float32 weights and state.
    """

    init: Callable[[Weights], State]
    scalars: Callable[[int, float, float], mx.array]
    update: Callable[[Weights, State, Weights, mx.array], tuple[Weights, State]]


OPTIMIZERS = {
    "adamw": Optimizer(adamw_init, adamw_scalars, adamw_update),
    "adamw8bit": Optimizer(adamw_8bit_init, adamw_scalars, adamw_8bit_update),
    "adafactor": Optimizer(adafactor_init, adafactor_scalars, adafactor_update),
}


def update(
    optimizer: Optimizer, weights: Weights, state: State, grads: Weights, scalars: mx.array, key: mx.array | None = None
) -> tuple[Weights, State]:
    """One step in float32 arithmetic. Weights in bfloat16 stay so, rounded at random by ``key``, which they need.

    Large tensors wait for each other: of what is computed on the way, one tensor's is held at a time.
    """
    new_weights: Weights = {}
    new_state: State = {kind: {} for kind in state}
    keys = iter(mx.random.split(key, len(weights)) if any(w.dtype == mx.bfloat16 for w in weights.values()) else ())
    before: list[mx.array] = []
    for name, w in weights.items():
        kinds = [kind for kind, group in state.items() if name in group]
        arrays = [w, grads[name], *(state[kind][name] for kind in kinds)]
        w, g, *held = mx.depends(arrays, before) if before else arrays
        part = {kind: {} for kind in state} | {kind: {name: a} for kind, a in zip(kinds, held, strict=True)}
        found, part = optimizer.update({name: w.astype(mx.float32)}, part, {name: g.astype(mx.float32)}, scalars)
        new_weights[name] = round_at_random(found[name], next(keys)) if w.dtype == mx.bfloat16 else found[name]
        for kind in kinds:
            new_state[kind][name] = part[kind][name]
        if w.size >= LARGE:
            before = [new_weights[name], *(part[kind][name] for kind in kinds)]
    return new_weights, new_state


def round_at_random(x: mx.array, key: mx.array) -> mx.array:
    """float32 -> bfloat16: one of the two neighbours, so that the mean over keys is ``x`` (stochastic rounding).

    The nearer neighbour is the likelier, and a step smaller than half the distance between neighbours counts on
    average, where rounding to the nearest would lose it every time. bfloat16 is the upper half of float32: a uniform
    16-bit number added to the lower half carries into it with just the probability that is wanted.
    """
    words = mx.random.split(key, -(-x.size // 4))  # MLX's one source of raw bits: 64 each
    noise = words.view(mx.uint16).reshape(-1)[: x.size].reshape(x.shape)
    return ((x.view(mx.uint32) + noise) >> 16).astype(mx.uint16).view(mx.bfloat16)


def rounding_key(seed: int, step: int) -> mx.array:
    """The random key of one step's rounding: follows from its place alone, and is no dropout key."""
    place = np.random.SeedSequence([seed, step], spawn_key=(1,))
    return mx.random.key(int(place.generate_state(1, np.uint64)[0]))
