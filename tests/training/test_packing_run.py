"""Whole runs over packed rows and over batches of similar length."""

import random
import signal
import time

import numpy as np
import pytest
from test_resume import adapter, options, start, trace, wait_for_step, words

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.errors import InputError
from gemma_mlx.loop import finetune

FAST = dict(quiet=True, rank=2, lr=5e-3, image_tokens=70, save_every=0, eval_every=0)
KINDS = {"packed": {"packing": True, "pack_tokens": 64}, "grouped": {"group_by_length": True}}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


@pytest.mark.parametrize("data,n,tokens", [("train.csv", 18, 64), ("media.csv", 10, None)])
def test_all_rows_in_one_batch_take_the_same_way(checkpoint_folder, rows, tmp_path, data, n, tokens):
    """Whether each has a row of the batch or shares one: losses of AdamW's steps within 1e-4, sums of float32 apart."""
    runs = {
        name: finetune(
            str(checkpoint_folder), data=rows / data, out=tmp_path / name, steps=6, batch_size=n, **FAST, **more
        )
        for name, more in {"plain": {}, "packed": {"packing": True, "pack_tokens": tokens}}.items()
    }
    plain, packed = ([line["loss"] for line in runs[name].history] for name in ("plain", "packed"))
    assert plain[-1] < plain[0] - 0.1
    assert np.abs(np.array(plain) - packed).max() < 1e-4
    for field in ("tokens", "label_tokens"):
        assert runs["plain"].report[field] == runs["packed"].report[field]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_sees_every_row_once_with_less_padding(checkpoint_folder, rows, tmp_path, kind):
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run", epochs=2, batch_size=3, **FAST,
        **KINDS[kind],
    )  # fmt: skip
    plain = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "plain", epochs=2, batch_size=3, **FAST
    )
    samples = list(Dataset(rows / "train.csv", run.processor))
    assert run.report["tokens"] == plain.report["tokens"] == 2 * sum(map(len, samples))
    assert run.report["label_tokens"] == 2 * sum((s.labels[1:] != IGNORE_INDEX).sum() for s in samples)
    assert (run.report["steps"] < plain.report["steps"]) == (kind == "packed")
    waste = [np.mean([line["padding"] for line in r.history]) for r in (run, plain)]
    assert 0 < waste[0] < 0.7 * waste[1] < 1


@pytest.mark.parametrize("kind", ["packed", pytest.param("grouped", marks=pytest.mark.slow)])
def test_killed_and_resumed_bit_for_bit(checkpoint_folder, rows, tmp_path, kind):
    given = options(checkpoint_folder, rows, tmp_path / "whole") | {"batch_size": 2, "steps": 12}
    flags = {"packed": ["--packing", "--pack-tokens", "64"], "grouped": ["--group-by-length"]}[kind]
    process = start([*words(given), *flags])
    assert process.wait(120) == 0, process.stderr.read()
    process = start([*words(given | {"out": tmp_path / "run"}), *flags])
    wait_for_step(tmp_path / "run", 6, process)
    time.sleep(random.Random(3).random() * 0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    process = start(["--resume", "--out", str(tmp_path / "run")])
    assert process.wait(120) == 0, process.stderr.read()
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    for other in ({"packing": kind != "packed"}, {"group_by_length": kind == "packed"}):
        with pytest.raises(InputError, match="started with"):
            finetune(given["model"], resume=True, out=tmp_path / "run", quiet=True, **other)
