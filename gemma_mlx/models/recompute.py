"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def recomputed(layer: nn.Module) -> Callable[..., Any]:
    """A function like `layer` that keeps its inputs and outputs alone and computes again for the gradient.

    Trainable weights and all arrays and tuples of arrays given to it (so a provider's keys and values) become
    explicit inputs, so that gradients reach them; other arguments are closed over. The backward runs after the forward
    has ended, so what the layer reads beside its arguments (dropout keys, the training mode) is noted now and put back
    for the recomputation.
    """
    keys, training = _dropout_keys(layer), layer.training

    def call(*arguments: Any, **named: Any) -> Any:
        given = {**{str(i): value for i, value in enumerate(arguments)}, **named}
        explicit = {name: value for name, value in given.items() if isinstance(value, mx.array | tuple)}

        def function(weights: dict[str, Any], explicit: dict[str, Any]) -> Any:
            now = {**given, **explicit}
            with _state(layer, weights, keys, training):
                return layer(*(now.pop(str(i)) for i in range(len(arguments))), **now)

        return mx.checkpoint(function)(layer.trainable_parameters(), explicit)

    return call


def _dropout_keys(layer: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(module, its key) of every module of a layer that draws dropout masks."""
    return [(m, m._dropout_key) for m in layer.modules() if hasattr(m, "_dropout_key")]


@contextmanager
def _state(layer: nn.Module, weights: dict[str, Any], keys: list[tuple[nn.Module, Any]], training: bool) -> Iterator:
    """Within the block the layer has these weights, dropout keys and mode; after it what it had."""
    held = layer.trainable_parameters(), _dropout_keys(layer), layer.training
    try:
        _put(layer, weights, keys, training)
        yield
    finally:
        _put(layer, *held)


def _put(layer: nn.Module, weights: dict[str, Any], keys: list[tuple[nn.Module, Any]], training: bool) -> None:
    layer.update(weights)
    layer.train(training)
    for module, key in keys:
        module._dropout_key = key
