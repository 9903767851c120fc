"""Killed at twenty random moments over three epochs, by one and by two processes: the rows of a run never stopped."""

import csv
import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS, BATCH, EPOCHS = 45, 4, 3


def texts(n=ROWS):
    return [(f"r{i}", f"the fox {i} is", f"quick {i * i}") for i in range(n)]


def csv_file(folder, n=ROWS):
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt", "response"), *texts(n)])
    return str(path)


def parquet_file(folder):
    """Row groups of seven rows with bytes in them, so that rows come by stretches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, prompts, responses = zip(*texts(), strict=True)
    filler = [os.urandom(30 << 10) for _ in ids]
    table = pa.table({"id": ids, "prompt": prompts, "response": responses, "unread": filler})
    pq.write_table(table, folder / "train.parquet", row_group_size=7)
    return str(folder / "train.parquet")


def mixture(folder):
    """Each row of both parts exactly once an epoch, though the weights are not those of a plain list."""
    csv_file(folder)
    (folder / "mix.yaml").write_text("- {data: train.csv, weight: 1.0000001}\n")
    return str(folder / "mix.yaml")


def tar_shards(folder):
    """Six shards, to be streamed: more than are shuffled together."""
    rows = texts()
    for shard in range(6):
        with tarfile.open(folder / f"s{shard}.tar", "w") as tar:
            for row_id, prompt, response in rows[shard::6]:
                data = json.dumps({"id": row_id, "prompt": prompt, "response": response}).encode()
                member = tarfile.TarInfo(f"{row_id}.json")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return "s{0..5}.tar"


def run(tmp_path, checkpoint, source, processes, kills, name):
    spec = {
        "source": source, "checkpoint": str(checkpoint), "cache": str(tmp_path / "cache"), "seed": 7,
        "ledger": str(tmp_path / name), "processes": processes, "kills": kills, "epochs": EPOCHS, "batch_size": BATCH,
        "lines": EPOCHS * -(-ROWS // BATCH), "pause": 0.004 * (kills > 0),
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, HERE / "killed.py", json.dumps(spec)], capture_output=True, text=True, timeout=280
    )
    assert out.returncode == 0, out.stderr[-2000:]
    ledgers = [Path(f"{spec['ledger']}.{k}").read_text().splitlines() for k in range(processes)]
    return json.loads(out.stdout)["kills"], [[json.loads(line) for line in ledger] for ledger in ledgers]


def epochs_of(lines):
    """Row ids by epoch: a line belongs to the epoch in which its batch began."""
    found, epoch = {}, 0
    for line in lines:
        found.setdefault(epoch, []).extend(line["rows"])
        epoch = line["state"]["epoch"]
    return [found[i] for i in range(EPOCHS)]


@pytest.mark.parametrize(
    ("make", "times"),
    [(csv_file, 20), (parquet_file, 5), (mixture, 5), (tar_shards, 5)],
    ids=["csv", "parquet", "mixture", "tar"],
)
def test_killed_many_times(tmp_path, checkpoint, make, times):
    sys.path.insert(0, str(HERE / "remote"))
    from servers import FileServer

    folder = tmp_path / "data"
    folder.mkdir()
    source = make(folder)
    with FileServer(folder) as server:
        source = f"{server.url}/{source}" if make is tar_shards else source
        _, (whole,) = run(tmp_path, checkpoint, source, 1, 0, "whole")
        kills, (one,) = run(tmp_path, checkpoint, source, 1, times, "one")
        kills_of_two, two = run(tmp_path, checkpoint, source, 2, times, "two")
    assert kills == kills_of_two == times
    ids = sorted(row_id for row_id, _, _ in texts())
    assert all(sorted(epoch) == ids for epoch in epochs_of(whole))
    assert len({tuple(epoch) for epoch in epochs_of(whole)}) == EPOCHS
    assert one == whole
    # Two processes share every batch: together they have its rows, each in its turn, and their states are the same.
    assert all([a["state"] for a in mine] == [b["state"] for b in whole] for mine in two)
    for batch, first, second in zip(whole, *two, strict=True):
        assert first["rows"] == batch["rows"][::2] and second["rows"] == batch["rows"][1::2]


def test_one_process_goes_on_where_two_stopped(tmp_path, checkpoint):
    """The state says nothing of how many read."""
    from gemma_mlx.data.batches import Batches
    from gemma_mlx.data.dataset import Dataset
    from gemma_mlx.data.processor import Processor

    data = Dataset(csv_file(tmp_path), Processor(checkpoint))
    whole = [b.row_ids for b in Batches(data, BATCH, seed=1, epochs=2)]
    halves = [Batches(data, BATCH, seed=1, epochs=2, share=(k, 2)) for k in (0, 1)]
    for _ in range(9):
        for half in halves:
            next(half)
    state = halves[0].state()
    assert state == halves[1].state()
    assert [b.row_ids for b in Batches(data, BATCH, seed=1, epochs=2, state=state)] == whole[9:]
    for half in halves:
        half.close()
    # 45 rows in batches of 4: the last one has a single row, and the second process none.
    last = [b for b in Batches(data, BATCH, seed=1, epochs=1, share=(1, 2))]
    assert len(last) == 12 and last[-1] is None and all(b is not None for b in last[:-1])
