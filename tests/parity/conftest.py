"""Checkpoints made once a session, and a table of differences and floors after the run."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
import tiny
import torch
from parity_pairs import PATTERNS, Pair, make_adapted, make_pair

from gemma_mlx.models import blocks

TABLE: list[tuple[str, str, float, float]] = []
"""(what, case, floor of the reference or NaN where none was measured, difference of ours)."""


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes of pytest-xdist
        session.config.workeroutput["parity"] = TABLE


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TABLE.extend(tuple(row) for row in getattr(node, "workeroutput", {}).get("parity", []))


def pytest_terminal_summary(terminalreporter):
    if not TABLE:
        return
    terminalreporter.section("parity: largest difference from transformers (floor: transformers against itself)")
    for what in sorted({row[0] for row in TABLE}):
        rows = [row for row in TABLE if row[0] == what]
        _, case, floor, ours = max(rows, key=lambda row: row[3])
        highest = max(row[2] for row in rows)
        floors = "" if math.isnan(floor) else f", floor there {floor:.1e}; highest floor of {len(rows)} {highest:.1e}"
        terminalreporter.write_line(f"{what}: {ours:.1e} at {case!r}{floors}")


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Attention in several blocks of queries already in these short rows."""
    device = mx.default_device().type.name
    whole, blocks.BLOCK[device] = blocks.BLOCK[device], 16
    yield
    blocks.BLOCK[device] = whole


@pytest.fixture
def record():
    """record(what, case, difference): print in the summary."""
    return lambda what, case, difference: TABLE.append((what, case, math.nan, float(difference)))


@pytest.fixture
def judge():
    """judge(what, case, floor, difference, bound, least): compare, and print in the summary.

    A difference above ten times the floor is a defect even within the bound; floors below `least` count as `least`.
    """

    def check(what: str, case: str, floor: float, difference: float, bound: float, least: float) -> None:
        TABLE.append((what, case, float(floor), float(difference)))
        assert floor < bound, f"{case}: the reference's own noise {floor:.1e} hides a difference of {bound:.0e}"
        assert difference <= bound
        assert difference <= 10 * max(floor, least), f"{case}: {difference:.1e} is no noise (floor {floor:.1e})"

    return check


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Pattern -> checkpoint folder."""
    torch.set_num_threads(1)
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in PATTERNS}
    for name, folder in folders.items():
        tiny.make(folder, **PATTERNS[name])
    return folders


@pytest.fixture(scope="session", params=PATTERNS)
def pair(request, folders) -> Pair:
    return make_pair(request.param, folders[request.param])


@pytest.fixture(scope="session", params=PATTERNS)
def adapted(request, folders) -> Pair:
    """With the same random adapters on every linear of both."""
    return make_adapted(request.param, folders[request.param])
