"""Braces against written-out names and against bash."""

import subprocess

import pytest

from gemma_mlx.data.remote.patterns import MAX_NAMES, expanded
from gemma_mlx.errors import InputError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", "a"),
        ("{1..3}", "1 2 3"),
        ("x{008..011}y", "x008y x009y x010y x011y"),
        ("{3..1}", "3 2 1"),
        ("{a,b}{0..1}", "a0 a1 b0 b1"),
        ("{a,b{1..2}c,}z", "az b1cz b2cz z"),
        ("{a{b,c}}", "{ab} {ac}"),
        ("{one}", "{one}"),
        ("a}b", "a}b"),
    ],
)
def test_braces(pattern, names):
    assert expanded(pattern) == names.split(" ")


def test_braces_are_as_the_shell_s():
    for pattern in ["s-{000..012}.tar", "{a,b}/{x,y{1..2}}", "{5..3}", "{{a,b},c}{,d}", "p{q}r", "{09..11}"]:
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
        assert expanded(pattern) == shell.stdout.split()


@pytest.mark.parametrize(
    "pattern", [f"{{0..{MAX_NAMES}}}", "{a,b}" * 30, "{" * 60, "{a", "{a..d}", "{1..99999999999999}"]
)
def test_braces_that_are_refused(pattern):
    with pytest.raises(InputError):
        expanded(pattern)
