"""Threads with an MLX stream each: order, errors, and a clean end of the process."""

import subprocess
import sys

import mlx.core as mx
import pytest

from gemma_mlx.lanes import shared

PROGRAM = """
import gemma_mlx
import mlx.core as mx
from gemma_mlx.lanes import shared

def product(i):
    a = mx.full((64, 64), float(i))
    b = a @ a
    mx.eval(b)
    return b

print(sum(b[0, 0].item() for b in shared({lanes}).map(product, range(8))))
"""


def test_results_keep_their_order_and_shapes():
    mx.eval(ones := mx.ones((3, 3)))

    def scaled(a, b):
        made = ones * (a * b)
        mx.eval(made)
        return made

    found = shared(3).map(scaled, range(20), range(20))
    assert [made.sum().item() for made in found] == [9.0 * i * i for i in range(20)]


def test_an_error_is_raised_and_the_lanes_go_on():
    with pytest.raises(ZeroDivisionError):
        shared(2).map(lambda x: 1 / x, [1, 0, 2])
    assert shared(2).map(lambda x: 1 / x, [1, 2]) == [1.0, 0.5]


@pytest.mark.parametrize("lanes", [2, 3])
def test_the_process_ends_cleanly(lanes):
    """MLX aborts a process, now and then, whose threads end with streams of their own still open."""
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(lanes=lanes)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert float(done.stdout) == 64.0 * sum(i * i for i in range(8))
