"""Exports that appear whole or not at all, and manifests that find what changed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.exporting import hf, manifest, tensors
from gemma_mlx.exporting.manifest import verify
from gemma_mlx.exporting.run import export

DEMO = Path(__file__).parents[2] / "gemma_mlx" / "demo" / "checkpoint"


@pytest.fixture
def out(tmp_path):
    return export(model=DEMO, out=tmp_path / "out", quiet=True)


def test_every_file_is_listed_with_its_digest(out):
    content = json.loads((out / "manifest.json").read_text())
    names = {p.name for p in out.iterdir()} - {"manifest.json"}
    assert set(content["files"]) == names and {"README.md", "model.safetensors", "tokenizer.json"} <= names
    for name, entry in content["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert content["export"] == "hf" and content["base"]["name"] == "checkpoint" and content["adapter"] is None
    assert str(DEMO.parent) not in json.dumps(content)
    assert verify(out) == []


def test_damage_is_named(out):
    def flip(name, at):
        data = bytearray((out / name).read_bytes())
        data[at] ^= 1
        (out / name).write_bytes(bytes(data))

    flip("model.safetensors", -1), flip("config.json", 0)
    (out / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes()[:-1])
    (out / "processor_config.json").unlink()
    (out / "sub").mkdir()
    (out / "sub" / "more.bin").write_bytes(b"x")
    told = verify(out)
    assert sorted(line.split(":")[0] for line in told) == [
        "config.json", "model.safetensors", "processor_config.json", "sub/more.bin", "tokenizer.json",
    ]  # fmt: skip
    kinds = {line.split(":")[0]: line for line in told}
    assert "bytes changed" in kinds["model.safetensors"] and "missing" in kinds["processor_config.json"]
    assert "extra" in kinds["sub/more.bin"] and "bytes instead of" in kinds["tokenizer.json"]


@pytest.mark.parametrize(
    "text, told",
    [(None, "no export here"), ("{", "not a manifest"), ('{"files": 3}', "not a manifest"), ("[]", "not a manifest"),
     ('{"format": 9, "files": {}}', "format 9; this version reads 1")],
)  # fmt: skip
def test_manifests_that_are_none(tmp_path, text, told):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=told):
        verify(tmp_path)


def test_the_bases_fingerprint_follows_its_headers(tmp_path, out):
    (tmp_path / "again").mkdir()
    for path in DEMO.iterdir():
        (tmp_path / "again" / path.name).write_bytes(path.read_bytes())
    same = manifest.base_fingerprint(DEMO)
    assert manifest.base_fingerprint(tmp_path / "again") == same
    (tmp_path / "again" / "config.json").write_text("{}")
    assert manifest.base_fingerprint(tmp_path / "again") != same


def test_a_full_folder_is_refused_and_replaced_only_after_success(out, monkeypatch):
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="is not empty; give another folder, or --overwrite"):
        export(model=DEMO, out=out, quiet=True)
    (out / "mine.txt").write_text("x")

    def fails(*_):
        raise InputError("as it happens")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_base_files", fails)
        with pytest.raises(InputError, match="as it happens"):
            export(model=DEMO, out=out, overwrite=True, quiet=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before | {"mine.txt": b"x"}
    export(model=DEMO, out=out, overwrite=True, quiet=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "no JSON"], ids=["none", "a checkpoint's", "a list", "torn"])
def test_overwrite_deletes_nothing_but_an_earlier_export(manifest, tmp_path):
    (tmp_path / "checkpoint").write_text("weeks of training")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"is no earlier export.* --overwrite leaves it alone"):
        export(model=DEMO, out=tmp_path, overwrite=True, quiet=True)
    assert (tmp_path / "checkpoint").read_text() == "weeks of training"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_nothing_is_left_of_an_export_that_stops(tmp_path, monkeypatch, error):
    def stops(*_):
        raise error

    monkeypatch.setattr(hf, "write_base_files", stops)
    expected = InputError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        export(model=DEMO, out=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_beforehand(tmp_path, monkeypatch):
    free = type("", (), {"free": 5_000_000})
    monkeypatch.setattr(tensors.shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"0.01 GB are needed, the disk has 0.01 GB free"):
        export(model=DEMO, out=tmp_path / "out", quiet=True)
    free.free = 7_000_000  # enough for the base's dtype, not for float32
    with pytest.raises(InputError, match=r"0.01 GB are needed"):
        export(model=DEMO, out=tmp_path / "out", dtype="float32", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path, number):
    code = f"""
import sys, time
from gemma_mlx.exporting import hf
from gemma_mlx.__main__ import verbs
from gemma_mlx.cli.door import enter
def slow(*_):
    print("here", flush=True)
    time.sleep(60)
hf.write_base_files = slow
sys.exit(enter(verbs, ["export", "--model", {str(DEMO)!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        assert any(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    deadline = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
    assert os.path.isdir(DEMO)


@pytest.mark.parametrize(
    "what, told",
    [
        (dict(format="onnx"), "--format onnx: expected one of hf, peft, mlx, gguf"),
        (dict(bits=5), "--bits 5: 4, 6 or 8"),
        (dict(bits=4, format="peft"), "for --format hf alone"),
        (dict(dtype="int8"), "dtype 'int8': expected one of float32, bfloat16, float16"),
        (dict(colour="red"), "colour: unknown option"),
        (dict(shard_bytes=0), "at least 1"),
        (dict(out=None), "name the folder"),
        (dict(out="none/such"), "no such folder"),
        (dict(out="a_file"), "is no folder"),
    ],
)
def test_refused_options(what, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(InputError) as caught:
        export(**{"model": DEMO, "out": tmp_path / "out", "quiet": True, **what})
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a_file"]
