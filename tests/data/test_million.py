"""A million rows: the first batch is there at once, and memory stays flat."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_million_rows(tmp_path, checkpoint, media, kind):
    """First batch in less than 2 s of computing; at most 300 MB over the start, and no more after 1,500 batches than
    after 300; the place in an epoch is a few integers. Figures: docs/data-speed.md."""
    os.link(media / "short.wav", tmp_path / "clip.wav")
    call = [sys.executable, HERE / "million.py", tmp_path, checkpoint, kind]
    for _ in range(2):
        out = subprocess.run(call, capture_output=True, text=True, timeout=280)
        assert out.returncode == 0, out.stderr[-2000:]
    found = json.loads(out.stdout)
    print(found)
    assert found["rows"] == 1_000_000 and found["read"] == 4 * 1501
    assert found["first_batch_cpu_s"] < 2
    assert found["over_start_mb"] <= 300
    assert found["along_mb"][-1] - found["along_mb"][1] < 20
    assert found["state_bytes"] < 100
