"""Models without weights: the modules, shapes and dtypes of a loaded model or of a published checkpoint."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.families import build, float_dtype
from gemma_mlx.models.load import DTYPES, StoredTensor
from gemma_mlx.models.quantize import Packed, empty_quantized, put_empty, put_module, quantized_paths
from gemma_mlx.models.stacks import DOWN, GATE, GATE_UP, UP, Stack
from gemma_mlx.models.tables import DISK_BYTES, TABLE, ShapeTable, tables_on_disk
from gemma_mlx.spec import ModelSpec

_STORED = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


def skeleton(spec: ModelSpec, dtype: str = "bfloat16", quantize: int | None = None) -> Any:
    """A frozen model of a spec as `load_model` would give it; its weights are never made.

    Args:
        quantize: bits of the decoder's matrices, or None.
    """
    model = build(spec)
    model.set_dtype(DTYPES[dtype])
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == TABLE and module.weight.nbytes >= DISK_BYTES:
            put_module(model, path, _table(path, module.weight.shape, module.weight.dtype))
    if quantize is not None:
        empty_quantized(model, quantize)
    model.freeze()
    return model


def skeleton_of(model: Any, quantize: int | None = None) -> Any:
    """A frozen model like a loaded one, without adapters; that one is left as it is.

    Raises:
        InputError: ``quantize`` for a model that is quantized already.
    """
    dtype = float_dtype(model)
    made = build(model.spec)
    made.set_dtype(dtype)
    modules = dict(made.named_modules())
    for path, table in tables_on_disk(model).items():
        put_module(made, path, _table(path, table.shape, dtype))
    for path, form in quantized_paths(model).items():
        _put_packed(made, path, modules, form)
    if quantize is not None:
        empty_quantized(made, quantize)
    made.freeze()
    return made


def _put_packed(model: nn.Module, path: str, modules: dict[str, nn.Module], form: Packed) -> None:
    owner, _, name = path.rpartition(".")
    if name in (GATE_UP, GATE, UP, DOWN) and path not in modules:
        stacks = modules[owner]
        if name in (GATE, UP) and GATE_UP in stacks:
            n, rows, inner = stacks.pop(GATE_UP).shape
            stacks[GATE], stacks[UP] = (Stack(mx.zeros((n, rows // 2, inner))) for _ in range(2))
        stack = stacks[name]
        put_empty(model, path, stack if isinstance(stack, Stack) else Stack(stack), form)
    elif path in modules:
        put_empty(model, path, modules[path], form)


def _table(path: str, shape: tuple[int, ...], dtype: mx.Dtype) -> ShapeTable:
    return ShapeTable({"weight": StoredTensor(path, tuple(shape), "", _STORED[dtype], 0)}, dtype)
