"""Stacks of matrices of which each row of the input goes through one: the weights of experts, as floats or packed.

In transformers' layout a stack is an array [n, out, in] of its module, such as ``experts.down_proj``. MLX conversions
hold it as a module, ``experts.down_proj.weight`` with ``.scales`` and ``.biases``, and have gate and up as two stacks.
"""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.layers import BufferModule
from gemma_mlx.ops.device import on_gpu

GATE_UP, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"


def _inner_dtype(x: mx.array) -> mx.Dtype:
    """What to multiply in: MLX's gather_mm has only float32 on a CPU, and gather_qmm's gradient adds up in x's."""
    return x.dtype if on_gpu() else mx.float32


def through(weight: mx.array, x: mx.array, which: mx.array, is_sorted: bool) -> mx.array:
    """x [rows, 1, in], row i through matrix `which[i]` of `weight` [n, out, in] -> [rows, 1, out] in the dtype of x."""
    inner = _inner_dtype(x)
    weight = weight.astype(inner).swapaxes(-1, -2)
    return mx.gather_mm(x.astype(inner), weight, rhs_indices=which, sorted_indices=is_sorted).astype(x.dtype)


class Stack(nn.Module):
    """A stack in floating point as a module of its own: `weight` [n, out, in]."""

    def __init__(self, weight: mx.array):
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array, which: mx.array, is_sorted: bool) -> mx.array:
        """`through` this stack."""
        return through(self.weight, x, which, is_sorted)

    def to_quantized(self, group_size: int, bits: int) -> PackedStack:
        packed = PackedStack(self.weight.shape, group_size, bits)
        packed.weight, packed.scales, packed.biases = mx.quantize(self.weight, group_size, bits)
        return packed


class PackedStack(BufferModule):
    """A stack in MLX's affine packing: `weight` uint32 [n, out, in · bits / 32], `scales`, `biases` [n, out, groups].

    None of them trains.
    """

    def __init__(self, shape: Collection[int], group_size: int, bits: int):
        super().__init__()
        self.group_size, self.bits = group_size, bits
        *rows, inner = shape
        self.add_buffer("weight", mx.zeros((*rows, inner * bits // 32), mx.uint32))
        for name in ("scales", "biases"):
            self.add_buffer(name, mx.zeros((*rows, inner // group_size)))

    def __call__(self, x: mx.array, which: mx.array, is_sorted: bool) -> mx.array:
        """As `through`, with the packed weights."""
        out = mx.gather_qmm(
            x.astype(_inner_dtype(x)), self.weight, self.scales, self.biases, rhs_indices=which, transpose=True,
            group_size=self.group_size, bits=self.bits, sorted_indices=is_sorted,
        )  # fmt: skip
        return out.astype(x.dtype)

    def to_float(self, dtype: mx.Dtype) -> Stack:
        return Stack(mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits).astype(dtype))


class ExpertStacks(nn.Module):
    """Holds gated MLPs as stacks: arrays `gate_up_proj` [n, 2 · width, hidden], gate rows first, and `down_proj`
    [n, hidden, width].

    A packed one is a module in the array's place. `gate_proj` and `up_proj` may stand in for `gate_up_proj`; they are
    modules. The model's tree is so what a file holds, and nothing is copied to bring the halves together.
    """

    def through(self, name: str, x: mx.array, which: mx.array, is_sorted: bool) -> mx.array:
        """x through the stack of that name, array or module."""
        stack = self[name]
        if isinstance(stack, mx.array):
            return through(stack, x, which, is_sorted)
        return stack(x, which, is_sorted)

    def gate_and_up(self, x: mx.array, which: mx.array, is_sorted: bool) -> tuple[mx.array, mx.array]:
        """Both [rows, 1, width], for x [rows, 1, hidden]."""
        if GATE_UP in self:
            gate, up = mx.split(self.through(GATE_UP, x, which, is_sorted), 2, axis=-1)
            return gate, up
        return self.through(GATE, x, which, is_sorted), self.through(UP, x, which, is_sorted)

    def expect(self, stored: Collection[str], path: str) -> None:
        """Take the form in which a file holds the stacks.

        Args:
            stored: module paths of the file's tensors.
            path: of this module.
        """
        held = {name for name in (GATE_UP, GATE, UP, DOWN) if f"{path}.{name}.weight" in stored}
        if held & {GATE, UP}:
            n, rows, inner = self.pop(GATE_UP).shape
            self.gate_proj, self.up_proj = (Stack(mx.zeros((n, rows // 2, inner))) for _ in range(2))
        for name in (GATE_UP, DOWN):
            if name in held and name in self:
                self[name] = Stack(self[name])

    def settle(self) -> None:
        """Bring what is floating point into transformers' layout: arrays, gate and up in one."""
        if isinstance(self.get(GATE), Stack) and isinstance(self.get(UP), Stack):
            self.gate_up_proj = mx.concatenate([self.pop(GATE).weight, self.pop(UP).weight], axis=1)
        for name in (GATE_UP, DOWN):
            if isinstance(self.get(name), Stack):
                self[name] = self[name].weight


def settle(model: nn.Module) -> None:
    """`ExpertStacks.settle` for all of a model's."""
    for module in model.modules():
        if isinstance(module, ExpertStacks):
            module.settle()


def float_stacks(model: nn.Module) -> list[str]:
    """Paths of the stacks that are arrays."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ExpertStacks)
        for name in (GATE_UP, DOWN)
        if isinstance(module.get(name), mx.array)
    ]
