"""Checkpoints: exact, whole or absent, and damage is found."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx import checkpoint
from gemma_mlx.checkpoint import Snapshot, checkpoints, load, newest, save
from gemma_mlx.errors import InputError


def snapshot(step):
    r = np.random.default_rng(step)
    weights = {
        f"layers.{i}.lora_{x}": mx.array(r.standard_normal((3, 4)).astype(np.float32)) for i in (0, 1) for x in "ab"
    }
    moments = {k: {n: mx.array(r.random(w.shape).astype(np.float32)) for n, w in weights.items()} for k in "mv"}
    return Snapshot(step, weights, moments, {"data": {"epoch": 1, "position": step}, "best": 0.1 + 1e-17, "none": None})


def equal(a, b):
    assert a.step == b.step and a.state == b.state
    for x, y in ((a.weights, b.weights), *((a.moments[k], b.moments[k]) for k in "mv")):
        assert x.keys() == y.keys() and all(mx.array_equal(x[n], y[n]) for n in x)


def test_round_trip_is_exact_and_old_ones_go(tmp_path):
    for step in (5, 10, 1000000, 15):
        save(tmp_path, snapshot(step), keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000015", "step-1000000"]
    equal(load(checkpoints(tmp_path)[0]), snapshot(15))
    found, warnings = newest(tmp_path)
    equal(found, snapshot(1000000))
    assert not warnings and {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000015", "step-1000000"}


def test_nothing_there(tmp_path):
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_falls_back_to_the_one_before_with_one_line(tmp_path, name, damage):
    save(tmp_path, snapshot(5))
    path = save(tmp_path, snapshot(10)) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    found, warnings = newest(tmp_path)
    equal(found, snapshot(5))
    assert len(warnings) == 1 and "step-000010" in warnings[0] and "\n" not in warnings[0]
    shutil.rmtree(checkpoints(tmp_path)[0])
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        newest(tmp_path)


@pytest.mark.parametrize("point", ["save_safetensors", "flush", "file_digest", "rename"])
def test_a_write_that_fails_anywhere_leaves_the_old_state(tmp_path, monkeypatch, point):
    save(tmp_path, snapshot(5))

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if point == "save_safetensors":
            patch.setattr(checkpoint.mx, point, fail)
        elif point == "rename":
            patch.setattr(checkpoint.Path, "rename", fail)
        else:
            patch.setattr(checkpoint, point, fail)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, snapshot(10))
    equal(newest(tmp_path)[0], snapshot(5))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_leftovers_of_a_killed_write_are_ignored_and_removed(tmp_path):
    save(tmp_path, snapshot(5))
    part = tmp_path / "checkpoints" / ".part-xyz"
    part.mkdir()
    (part / "state.json").write_text(json.dumps({"step": 99}))
    equal(newest(tmp_path)[0], snapshot(5))
    save(tmp_path, snapshot(6))
    assert not part.exists()
