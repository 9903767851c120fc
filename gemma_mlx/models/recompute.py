"""Gradient checkpointing of a decoder layer (Chen et al. 2016, arXiv:1604.06174) whose memory is free when it is done.

Left to itself, a lazy backward computes every layer again as soon as it may, and runs down to the first layer for that
layer's weights, keeping from every other what the gradients of its weights still need. So here a layer begins when the
gradients of its outputs are there, and is done with its weights before it hands on the gradient of its inputs.
``mx.checkpoint`` has neither order: with adapters on all linears its peak is several times higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from gemma_mlx.ops.custom import custom_function, vjp

Arrays = list[mx.array]


def recomputed(layer: nn.Module) -> Callable[..., Any]:
    """A function like `layer` that keeps its inputs and outputs alone and computes the rest again for the gradient.

    Trainable weights and all arrays and tuples of arrays that it is given (so a provider's keys and values) become
    explicit inputs, so that gradients reach them; its other arguments are closed over (index arrays must come inside
    those: they have no gradient). A layer is computed again when the forward has long ended: what it reads beside its
    arguments, dropout keys and the training mode, is noted now and put back for it.
    """
    keys, training = _dropout_keys(layer), layer.training

    def call(*arguments: Any, **named: Any) -> Any:
        given = {**dict(enumerate(arguments)), **named}
        inputs = {name: value for name, value in given.items() if isinstance(value, mx.array | tuple)}
        weights = layer.trainable_parameters()
        count, form = len(_leaves(weights)), []

        def run(*arrays: mx.array) -> Arrays:
            now = {**given, **_filled(inputs, arrays[count:])}
            with _state(layer, _filled(weights, arrays[:count]), keys, training):
                out = layer(*(now[i] for i in range(len(arguments))), **{name: now[name] for name in named})
            form[:] = [tree_map(lambda _: None, out)]
            return _leaves(out)

        made = _checkpointed(run, count)(*_leaves(weights), *_leaves(inputs))
        return _filled(form[0], made)

    return call


def _checkpointed(run: Callable[..., Arrays], weights: int) -> Callable[..., Arrays]:
    """`run` with a backward that computes it again; the first so many of its inputs are weights."""

    def backward(inputs: Arrays, cotangents: Arrays, _outputs: Arrays) -> Arrays:
        inputs = mx.depends(list(inputs), list(cotangents))
        _, gradients = vjp(run, inputs, list(cotangents))
        first, then = gradients[:weights], gradients[weights:]
        return [*first, *mx.depends(then, first)] if first else then

    return custom_function(run, backward)


def _leaves(tree: Any) -> Arrays:
    return [leaf for _, leaf in tree_flatten(tree)]


def _filled(tree: Any, leaves: Any) -> Any:
    """A tree of the same form with other leaves, in `_leaves`' order."""
    rest = iter(leaves)
    return tree_map(lambda _: next(rest), tree)


def _dropout_keys(layer: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(module, its key) of every module of a layer that draws dropout masks."""
    return [(m, m._dropout_key) for m in layer.modules() if hasattr(m, "_dropout_key")]


@contextmanager
def _state(layer: nn.Module, weights: Any, keys: list[tuple[nn.Module, Any]], training: bool) -> Iterator[None]:
    """Within the block the layer has these weights, dropout keys and mode; after it what it had."""
    held = layer.trainable_parameters(), _dropout_keys(layer), layer.training
    try:
        _put(layer, weights, keys, training)
        yield
    finally:
        _put(layer, *held)


def _put(layer: nn.Module, weights: Any, keys: list[tuple[nn.Module, Any]], training: bool) -> None:
    layer.update(weights)
    layer.train(training)
    for module, key in keys:
        module._dropout_key = key
