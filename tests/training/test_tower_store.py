"""Soft tokens on disk: whole or missing, within a limit, private, shared by processes, never another tower's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.estimate import Estimate
from gemma_mlx.loop import finetune
from gemma_mlx.models.gemma4.audio import AudioTower
from gemma_mlx.models.load import load_model
from gemma_mlx.tower_cache import TowerCache, tower_identity
from gemma_mlx.tower_store import Disk, Memory, default_folder, open_store


def key(i):
    return i.to_bytes(16, "big")


def value(i, rows=5, dtype=mx.float32):
    return mx.random.normal((rows, 8), key=mx.random.key(i)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_what_is_kept_comes_back_bit_for_bit_in_another_process_s_store(tmp_path, dtype):
    made = []

    def tower(values, where):
        made.append(1)
        return (mx.array(values[0]) * 1.1).astype(dtype)

    values = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)
    first = TowerCache(tower, store=Disk(tmp_path / "c"), identity=b"t")(values, None)
    second = TowerCache(tower, store=Disk(tmp_path / "c"), identity=b"t")
    again = second(values, None)
    assert len(made) == 2 and (second.hits, second.misses) == (2, 0)
    assert again.dtype == dtype and mx.array_equal(again, first)
    TowerCache(tower, store=Disk(tmp_path / "c"), identity=b"another tower")(values, None)
    assert len(made) == 4


def test_only_the_owner_may_read(tmp_path):
    Disk(tmp_path / "c").put(key(1), value(1))
    (file,) = (tmp_path / "c").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and (tmp_path / "c").stat().st_mode & 0o777 == 0o700


def test_a_damaged_file_is_missing_and_written_again(tmp_path):
    store, whole = Disk(tmp_path), value(1)
    store.put(key(1), whole)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 1
    for damage in (b"", data[:10], data[:40], data[:-1], data + b"x", bytes(flipped), b"\n" * len(data)):
        file.write_bytes(damage)
        assert store.get(key(1)) is None
        store.put(key(1), whole)
        assert np.array_equal(store.get(key(1)), np.array(whole))


def test_the_longest_unused_files_go(tmp_path):
    store = Disk(tmp_path)
    store.put(key(0), value(0))
    size = store.nbytes
    store = Disk(tmp_path, limit=int(size * 4.5))
    for i in range(1, 4):
        store.put(key(i), value(i))
        for n in range(i + 1):
            os.utime(tmp_path / key(n).hex(), (n + 1, n + 1))  # in this order, whatever the clock's steps
    assert store.get(key(0)) is not None  # used last now
    store.put(key(4), value(4))
    left = {p.name for p in tmp_path.iterdir()}
    assert key(0).hex() in left and key(4).hex() in left and key(1).hex() not in left
    for i in range(5, 60):
        store.put(key(i), value(i))
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= size * 4.5
        assert store.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    store.put(key(99), value(99, rows=500))  # larger than all there may be
    assert store.get(key(99)) is None
    nothing = Disk(tmp_path, limit=0)
    nothing.put(key(1), value(1))
    assert nothing.get(key(1)) is None and not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_go_and_those_under_way_stay(tmp_path):
    old, new = tmp_path / ".old", tmp_path / ".new"
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (time.time() - 7200,) * 2)
    Disk(tmp_path)
    assert not old.exists() and new.exists()


WRITER = """
import sys
from pathlib import Path
import gemma_mlx.blas
import mlx.core as mx
from gemma_mlx.tower_store import Disk
store = Disk(Path(sys.argv[1]), limit=40_000)
for turn in range(3):
    for i in range(40):
        value = mx.random.normal((40, 8), key=mx.random.key(i))
        found = store.get(i.to_bytes(16, "big"))
        assert found is None or mx.array_equal(mx.array(found), value)
        store.put(i.to_bytes(16, "big"), value)
"""


def test_two_processes_share_a_folder(tmp_path):
    """Each reads what the other writes and removes, never a part; 40 arrays of 1,280 bytes in room for 31."""
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    files = list(tmp_path.iterdir())
    assert len(files) > 10 and sum(f.stat().st_size for f in files) <= 40_000 * (1 + 1 / 16)
    assert all(not f.name.startswith(".") for f in files)


def test_a_full_disk_costs_only_what_would_be_kept(tmp_path, monkeypatch):
    store = Disk(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    store.put(key(1), value(1))
    assert store.get(key(1)) is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"tower_cache_dir .*file.*cannot be written.*tower_cache memory"):
        open_store("disk", folder=tmp_path / "file" / "c")


def test_where_it_lies_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path("/home/me/.cache/gemma_mlx/soft_tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert default_folder() == Path("/home/me/.cache/gemma_mlx/soft_tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gemma_mlx/soft_tokens"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == Path("/home/me/Library/Caches/gemma_mlx/soft_tokens")
    assert isinstance(open_store("off"), Memory) and open_store("off").limit == 0
    assert open_store("memory", 2.5).limit == 2_500_000_000 and Disk(tmp_path / "d").limit == 20_000_000_000


def test_identity_follows_weights_window_and_dtype(checkpoint_folder):
    model = load_model(checkpoint_folder)
    audio, vision = tower_identity(model, "audio"), tower_identity(model, "image")
    assert audio != vision == tower_identity(model, "video")
    assert audio == tower_identity(load_model(checkpoint_folder), "audio")
    others = [load_model(checkpoint_folder, audio_window=13), load_model(checkpoint_folder, "bfloat16")]
    changed = load_model(checkpoint_folder)
    clip = changed.model.audio_tower.layers[0].self_attn.q_proj
    clip.linear.weight = clip.linear.weight.at[0, 0].add(1e-3)
    bounds = load_model(checkpoint_folder)
    clip = bounds.model.audio_tower.layers[0].self_attn.q_proj
    clip.input_max = clip.input_max + 1e-3
    found = [tower_identity(m, "audio") for m in (*others, changed, bounds)]
    assert len({audio, *found}) == 5
    assert tower_identity(others[0], "image") != tower_identity(others[1], "image") != vision


def test_every_setting_gives_the_same_run_and_a_second_one_finds_everything(
    checkpoint_folder, rows, tmp_path, monkeypatch
):
    """Four clips and three pictures, eight steps of five rows: bit-equal adapters and metrics."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    monkeypatch.setattr("gemma_mlx.fit.estimate_run", lambda *_: Estimate({}))  # asks towers for their shapes
    calls = []
    original = AudioTower.__call__
    monkeypatch.setattr(AudioTower, "__call__", lambda self, *a: calls.append(1) or original(self, *a))
    found, options = {}, dict(data=rows / "media.csv", batch_size=5, steps=8, rank=2, quiet=True, image_tokens=70)
    folder = tmp_path / "cache"
    settings = {
        "memory": {}, "off": {"tower_cache": "off"}, "little": {"tower_cache_gb": 1e-9},
        "disk": {"tower_cache": "disk", "tower_cache_dir": folder},
        "disk again": {"tower_cache": "disk", "tower_cache_dir": folder},
    }  # fmt: skip
    for name, setting in settings.items():
        calls.clear()
        run = finetune(str(checkpoint_folder), out=tmp_path / name, **options, **setting)
        losses = [record["loss"] for record in run.history]
        found[name] = (losses, (run.adapter / "adapters.safetensors").read_bytes())
        counted = run.report["tower_cache"]
        assert counted["hits"] + counted["misses"] == 7 * 4
        assert counted["misses"] == {"off": 28, "little": 28, "disk again": 0}.get(name, 7)
        assert len(calls) == {"off": 16, "little": 16, "disk again": 0}.get(name, 4)
        assert (counted["bytes"] > 0) == (name not in ("off", "little"))
    assert all(other == found["memory"] for other in found.values())
    trained = finetune(str(checkpoint_folder), out=tmp_path / "trained", targets="all", **options, **settings["disk"])
    assert trained.report["tower_cache"]["hits"] == trained.report["tower_cache"]["misses"] == 0
