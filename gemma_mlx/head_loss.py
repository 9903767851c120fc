"""Linear head, softcap and cross entropy of given targets, without the logits.

The logits [n, V] exist only in chunks: block after block of the vocabulary, and of the positions within. A running
log-sum-exp (Milakov and Gimelshein 2018, arXiv:1805.02867) gathers them. Chunks are chained with ``mx.depends``: MLX
is lazy and would otherwise be free to hold many at once.

A frozen head needs no second pass for the gradient of the hidden states, a linear map of the probabilities: the
forward adds up e^z · dz/dx · W beside e^z and divides at the end, and the backward only scales. A head that trains
needs the probabilities themselves for its own gradient, so its backward computes the chunks again.

What happens to a chunk between its two products is `gemma_mlx.ops.head_scores`, and `head_pulls` in the backward of a
head that trains: one pass each where their kernels run. `gemma_mlx.ops.head_curve` has the softcap.

The target stands apart from the other entries of its row. Then 1 − p of a target that is nearly certain is a sum of
small numbers and no difference of two near one, in bfloat16 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.ops.custom import custom_function
from gemma_mlx.ops.device import on_gpu
from gemma_mlx.ops.head_curve import Curve, power
from gemma_mlx.ops.head_pulls import head_pulls
from gemma_mlx.ops.head_scores import head_scores

CHUNK = {"cpu": (512, 1 << 20), "gpu": (1024, 1 << 23)}
"""Device -> most positions, and most logits, of a chunk; some five float32 arrays of that many logits live at once."""

_LN2 = math.log(2.0)

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Head:
    """An output head: ``arrays`` (weight [V, H]; or packed weight, scales, biases), and how they are read.

    ``cap`` is the softcap of the logits or None. ``packing`` holds group_size, bits and mode of a quantized weight.
    ``trains``: a gradient of the weight is wanted; a frozen one's comes out as zeros.
    """

    arrays: Arrays
    cap: float | None = None
    packing: tuple[int, int, str] | None = None
    trains: bool = False

    @property
    def vocabulary(self) -> int:
        """Rows of the weight."""
        return self.arrays[0].shape[0]


def read_head(module: nn.Module, cap: float | None) -> Head | None:
    """The head that a (quantized) embedding or bias-free linear is; None for another module or one it cannot train."""
    trains = bool(module.trainable_parameters())
    if isinstance(module, nn.QuantizedEmbedding | nn.QuantizedLinear):
        arrays = tuple(module[name] for name in ("weight", "scales", "biases") if module.get(name) is not None)
        return None if trains or "bias" in module else Head(arrays, cap, (module.group_size, module.bits, module.mode))
    if isinstance(module, nn.Embedding | nn.Linear) and "bias" not in module:
        return Head((module.weight,), cap, None, trains)
    return None


def pays(head: Head, positions: int) -> bool:
    """Whether to go without the logits.

    With a frozen head always: measured faster from 32 positions × 512 ids on. A head that trains pays with one more
    product and one more copy of its gradient, so there only where the logits take half of the weight's bytes.
    """
    return not head.trains or 4 * positions * head.vocabulary >= head.arrays[0].nbytes // 2


def target_scores(
    hidden: mx.array, targets: mx.array, head: Head, gradient: bool = True, chunk: tuple[int, int] | None = None
) -> tuple[mx.array, mx.array]:
    """(log-probability of each target, whether it is the argmax), both float32 [n], the second 1 or 0.

    The argmax is the first among equals, before the cap: a cap keeps the order, but in float32 it makes equals.

    Args:
        hidden: [n, H], states after the final norm.
        targets: int [n], token ids.
        gradient: False where nobody differentiates: a frozen head's hidden gradient is then not prepared.
        chunk: most positions and most logits of a chunk; by default as ``CHUNK`` says.
    """
    scan = _Scan(head, hidden, chunk or CHUNK["gpu" if on_gpu() else "cpu"])
    if not gradient:
        return scan.forward(hidden, targets, head.arrays)[:2]
    return (_training if head.trains else _frozen)(scan)(hidden, targets, *head.arrays)[:2]


def _frozen(scan: _Scan) -> Callable[..., Any]:
    """The third output is d log-probability / d hidden."""

    def scores(hidden: mx.array, targets: mx.array, *arrays: mx.array) -> Arrays:
        log_probs, correct, sums = scan.forward(hidden, targets, arrays, gradient=True)
        return log_probs, correct, scan.hidden_gradient(log_probs, targets, sums, arrays)

    def scores_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        hidden, *rest = primals
        return (cotangents[0][:, None] * outputs[2]).astype(hidden.dtype), *map(mx.zeros_like, rest)

    return custom_function(scores, scores_vjp, "loss")


def _training(scan: _Scan) -> Callable[..., Any]:
    """The backward goes over the chunks again."""

    def scores(hidden: mx.array, targets: mx.array, *arrays: mx.array) -> Arrays:
        log_probs, correct, sums = scan.forward(hidden, targets, arrays)
        return log_probs, correct, scan.curve.reference(sums["top"])[:, 0], scan.mass(sums)[:, 0]

    def scores_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        hidden, targets, weight = primals
        d_hidden, d_weight = scan.backward(hidden, targets, weight, (outputs[0], *outputs[2:]), cotangents[0])
        return d_hidden, mx.zeros_like(targets), d_weight

    return custom_function(scores, scores_vjp, "loss")


class _Rows:
    """Rows of the head, as the products take them.

    On a CPU both products run in float32: MLX multiplies bfloat16 and packed matrices there at a twentieth of the
    speed, and a block's conversion serves all positions.
    """

    def __init__(self, head: Head, arrays: Sequence[mx.array], rows: slice | mx.array, wide: bool):
        self.arrays, self.packing = [a[rows] for a in arrays], head.packing
        if wide:
            self.arrays, self.packing = [self._float().astype(mx.float32)], None

    def _float(self) -> mx.array:
        if self.packing is None:
            return self.arrays[0]
        group_size, bits, mode = self.packing
        return mx.dequantize(*self.arrays, group_size=group_size, bits=bits, mode=mode)

    def scores(self, x: mx.array) -> mx.array:
        """x · Wᵀ."""
        return self._times(x, True)

    def back(self, g: mx.array) -> mx.array:
        """g · W, float32."""
        return self._times(g, False).astype(mx.float32)

    def _times(self, x: mx.array, transpose: bool) -> mx.array:
        if self.packing is None:
            return x @ (self.arrays[0].T if transpose else self.arrays[0])
        group_size, bits, mode = self.packing
        return mx.quantized_matmul(x, *self.arrays, transpose=transpose, group_size=group_size, bits=bits, mode=mode)


RUNNING = ("top", "index", "target", "others")
Sums = dict[str, mx.array]
"""Running values of some positions, [n, 1] each: ``RUNNING``, as `head_scores` describes them; with a gradient also
``moved`` [n, H], the others' sum with each one's slope and row."""


class _Scan:
    """How the chunks of one head and number of positions are gone through."""

    def __init__(self, head: Head, hidden: mx.array, chunk: tuple[int, int]):
        count = hidden.shape[0]
        self.head, self.count = head, count
        self.on_gpu = on_gpu()
        self.dtype = mx.result_type(hidden, head.arrays[-1])  # of the plain form's products
        self.wide = not self.on_gpu or self.dtype == mx.float16  # whose range the exponentials exceed
        self.positions = max(1, min(count, chunk[0]))
        rows = chunk[1] // self.positions
        if self.wide and (head.packing or head.arrays[0].dtype != mx.float32):
            rows = min(rows, 4 * chunk[1] // hidden.shape[1])  # converted, they take memory as the logits do
        self.rows = min(head.vocabulary, max(64, rows // 64 * 64))
        self.curve = Curve(head.cap, prescaled=self.wide)
        self.steepest = 4.0 if head.cap else 1.0

    # --- the chunks

    def split(self, x: mx.array) -> list[mx.array]:
        """Blocks of positions."""
        return [x[i : i + self.positions] for i in range(0, self.count, self.positions)]

    def prepared(self, hidden: mx.array) -> list[mx.array]:
        """Hidden states in the products' dtype; scaled to scores already where that rounds nothing to 8 bits."""
        return self.split(hidden.astype(mx.float32) * self.curve.unit if self.wide else hidden.astype(self.dtype))

    @property
    def rounded(self) -> mx.Dtype:
        """What gradients of scores are rounded to: the products' dtype."""
        return mx.float32 if self.wide else self.dtype

    def blocks(
        self, arrays: Sequence[mx.array], done: list[mx.array]
    ) -> Iterator[tuple[mx.array, int, _Rows]]:
        """(first row int32 [1, 1], number of rows, rows), each read after what ``done`` then holds.

        The first row is an array's entry: as a number it would make ``mx.compile`` build kernels for every block.
        """
        starts = mx.arange(0, self.head.vocabulary, self.rows)[:, None]
        for i in range(starts.shape[0]):
            start = i * self.rows
            size = min(self.rows, self.head.vocabulary - start)
            after = mx.depends(list(arrays), done) if done else arrays
            yield starts[i : i + 1], size, _Rows(self.head, after, slice(start, start + size), self.wide)

    def forward(
        self, hidden: mx.array, targets: mx.array, arrays: Sequence[mx.array], gradient: bool = False
    ) -> tuple[mx.array, mx.array, Sums]:
        """(log-probabilities [n], correct [n], sums of all positions)."""
        xs, wanted = self.prepared(hidden), self.split(targets[:, None])
        sums = [_nothing(len(x), x.shape[1] if gradient else 0) for x in xs]
        done: list[mx.array] = []
        for start, _, rows in self.blocks(arrays, done):
            for i, x in enumerate(xs):
                sums[i] = self._added(sums[i], rows.scores(_after(x, done)), wanted[i] - start, start, rows)
                done[:] = sums[i].values()
        total = {name: mx.concatenate([s[name] for s in sums]) for name in sums[0]}
        gap = mx.log(total["others"]) + self._lead(total)
        log_probs = -mx.logaddexp(gap, mx.zeros_like(gap))[:, 0]
        return log_probs, (total["index"][:, 0] == targets).astype(mx.float32), total

    def _added(self, sums: Sums, products: mx.array, wanted: mx.array, start: mx.array, rows: _Rows) -> Sums:
        """Sums with one chunk of products added, of which ``rows`` are the rows from ``start`` on."""
        gradient = self.rounded if "moved" in sums else None
        made = head_scores(products, wanted, start, *(sums[name] for name in RUNNING), self.curve, gradient)
        new = dict(zip(RUNNING, made, strict=False))
        if gradient is not None:
            keep, pulls = made[len(RUNNING) :]
            moved = sums["moved"] if self.curve.fixed else sums["moved"] * keep
            new["moved"] = moved + rows.back(pulls)
        return new

    def _lead(self, sums: Sums) -> mx.array:
        """How far the reference lies above the target, as a natural logarithm."""
        if self.head.cap is None:
            return (sums["top"] - sums["target"]) * _LN2
        target = self.curve.reach * (_LN2 / 2) * (mx.tanh(sums["target"] * (_LN2 / 2)) - 1.0)
        return self.curve.reference(sums["top"]) * _LN2 - target

    def mass(self, sums: Sums) -> mx.array:
        """Sum of all exponentials, in units of the reference."""
        return sums["others"] + power(self.curve(sums["target"])[0] - self.curve.reference(sums["top"]))

    # --- gradients

    def hidden_gradient(
        self, log_probs: mx.array, targets: mx.array, sums: Sums, arrays: Sequence[mx.array]
    ) -> mx.array:
        """d log-probability / d hidden, float32 [n, H]."""
        own = _Rows(self.head, arrays, targets, wide=True).arrays[0]
        pull = -mx.expm1(log_probs)[:, None] * own
        if self.head.cap is not None:  # s − s² loses a slope near zero at the lower end
            pull = pull * mx.sigmoid(sums["target"] * _LN2) * mx.sigmoid(sums["target"] * -_LN2)
        return (pull - sums["moved"] / self.mass(sums)) * self.steepest

    def backward(
        self, hidden: mx.array, targets: mx.array, weight: mx.array, saved: Sequence[mx.array], cotangent: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Gradients of hidden [n, H] and weight [V, H]. ``saved``: log-probabilities, references and masses [n]."""
        xs, wanted = self.prepared(hidden), self.split(targets[:, None])
        plain = self.split(hidden.astype(mx.float32 if self.wide else self.dtype))
        log_probs, reference, mass = (value[:, None] for value in saved)
        own, references = self.split(mx.expm1(log_probs) * mass), self.split(reference)
        factors = self.split(-self.steepest * cotangent[:, None] / mass)
        d_hidden, d_weight, done = [mx.zeros(x.shape) for x in xs], [], []
        for start, size, rows in self.blocks((weight,), done):
            d_rows = mx.zeros((size, weight.shape[1]))
            for i, x in enumerate(xs):
                row = (wanted[i] - start, references[i], own[i], factors[i])
                g = head_pulls(rows.scores(_after(x, done)), *row, self.curve, self.rounded)
                d_hidden[i] = d_hidden[i] + rows.back(g)
                d_rows = d_rows + (g.T @ plain[i]).astype(mx.float32)
                done[:] = [d_hidden[i], d_rows]
            d_weight.append(d_rows.astype(weight.dtype))
            done[:] = [d_hidden[-1], d_weight[-1]]
        return mx.concatenate(d_hidden).astype(hidden.dtype), mx.concatenate(d_weight)


def _after(x: mx.array, done: list[mx.array]) -> mx.array:
    """``x``, computed with once ``done`` is."""
    return mx.depends([x], done)[0] if done else x


def _nothing(count: int, width: int) -> Sums:
    """The sums before the first chunk; ``width`` of ``moved``, 0 for none."""
    column = mx.zeros((count, 1))
    sums = {"top": column - math.inf, "index": column.astype(mx.int32), "target": column, "others": column}
    return sums | {"moved": mx.zeros((count, width))} if width else sums
