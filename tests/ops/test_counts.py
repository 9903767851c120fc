"""What kernels move, against plain MLX and against the least possible: counted from launches, and by the emulator."""

from functools import cache

import mlx.core as mx
import pytest
from metal.emulator import Emulator

from gemma_mlx.kernel_counts import Count, launches_of, of_launch, plain, with_kernels
from gemma_mlx.ops import dispatch
from gemma_mlx.ops.head_curve import Curve
from gemma_mlx.ops.head_pulls import head_pulls
from gemma_mlx.ops.head_scores import head_scores
from gemma_mlx.ops.registry import ops

OPS = {op.name: op for op in ops()}
TILED = ("flash_attention", "flash_matrix")
"""Read keys again for every block of queries, by the formula of their file, which their own tests measure."""
CACHED = 1 << 16
"""Inputs of so many bytes at most (weights, tables, numbers of rows) count once: they stay in a GPU's cache."""


@cache
def counts(name: str) -> tuple[Count, Count]:
    """(plain, with kernels), forward and all gradients, at the checkpoints' size in bfloat16."""
    op = OPS[name]
    return sum(plain(op, "real", mx.bfloat16), Count()), sum(with_kernels(op, "real", mx.bfloat16), Count())


@pytest.mark.parametrize("name", OPS)
def test_kernels_beat_plain_mlx(name):
    before, after = counts(name)
    assert after.launches <= before.launches
    assert after.moved < before.moved


def test_audio_attention():
    """Between the projections and `post`: one launch forward, two for all gradients, and a quarter of the bytes."""
    before, after = counts("banded_attention")
    forward, gradients = with_kernels(OPS["banded_attention"], "real", mx.bfloat16)
    assert before.launches >= 20 and forward.launches == 1 and gradients.launches <= 2
    assert 4 * after.moved <= before.moved


def test_norms_and_turning():
    before, after = counts("qk_norm_rope")
    assert 2 * after.moved <= before.moved


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name not in TILED])
def test_streaming_kernels_ask_for_little_more_than_they_must(name):
    """Each threadgroup's bytes, once, within 1.3 times inputs and outputs once; of 24 groups, for all."""
    forward, gradients = launches_of(OPS[name], "real", mx.bfloat16)
    for launch in (*forward, *gradients):
        emulator = Emulator(sample=24)
        emulator.run(launch)
        (record,) = emulator.records
        assert asked(record, launch) <= 1.3 * of_launch(launch).moved, launch.kernel.name


def asked(record, launch) -> float:
    """Bytes of all threadgroups, from those that ran."""
    share = record.groups[1] / record.groups[0]
    inputs = {name: a.nbytes for name, a in zip(launch.kernel.inputs, launch.inputs, strict=True)}
    total = 0.0
    for name, (_, distinct, stored) in record.traffic.items():
        if name in inputs:
            total += min(distinct * share, inputs[name] if inputs[name] <= CACHED else float("inf"))
        elif name in launch.kernel.outputs:
            total += stored * share
    return total


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("cap", "reads"), [(30.0, 1), (None, 2)])
def test_a_chunk_of_the_head(cap, reads, dtype):
    """n · v · (reads · b + g): scores once, twice where exponents are measured from the highest; gradients once."""
    n, v = 5, 1031
    scores, column = mx.random.normal((n, v)).astype(dtype), mx.zeros((n, 1))
    wanted, start = mx.full((n, 1), 7, mx.int32), mx.zeros((1, 1), mx.int32)
    with dispatch.using(Emulator()) as emulator:
        head_scores(scores, wanted, start, column, wanted, column, column, Curve(cap), dtype)
        head_pulls(scores, wanted, column, column, column, Curve(cap), dtype)
    softmax, pulls = (record.traffic for record in emulator.records)
    rows = n * dtype.size  # the target's own score is read once more
    assert softmax["scores"][0] == reads * scores.nbytes + rows and softmax["pulls"][2] == scores.nbytes
    assert pulls["scores"][0] == scores.nbytes and pulls["pulls"][2] == scores.nbytes
