"""Reads batches in children that are killed at random moments, and goes on from the last line that each wrote.

Run as ``killed.py SPEC``: a JSON object with ``source``, ``checkpoint``, ``cache`` (a folder), ``ledger`` (a path),
``processes``, ``kills``, ``seed``, ``epochs`` and ``batch_size``. Child k of n writes LEDGER.k: a line for each batch,
its row ids and the state after it. Children are forked before any thread runs, so that starting one takes little.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from gemma_mlx.data.batches import Batches
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import Shuffled
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.remote.lazy import LazyFetcher
from gemma_mlx.data.rows import Rows


def read(spec, share, ledger):
    """One child's work, from where its ledger ends."""
    fetcher = LazyFetcher([spec["source"]], folder=spec["cache"], run=str(ledger), resumed=True)
    data = Dataset(Rows(spec["source"], fetcher=fetcher), Processor(spec["checkpoint"], image_tokens=70), check=False)
    lines = whole_lines(ledger)
    ledger.write_bytes(b"".join(lines))
    state = json.loads(lines[-1])["state"] if lines else None
    plan = Shuffled(data.walk(spec["seed"]), spec["batch_size"])
    with (
        ledger.open("ab") as file,
        Batches(
            data, spec["batch_size"], seed=spec["seed"], epochs=spec["epochs"], plan=plan, share=share, state=state
        ) as batches,
    ):
        for batch in batches:
            ids = list(batch.row_ids) if batch is not None else []
            file.write(json.dumps({"rows": ids, "state": batches.state()}).encode() + b"\n")
            file.flush()
            time.sleep(spec.get("pause", 0))
    fetcher.close()


def whole_lines(ledger):
    """The lines that were written to their end."""
    if not ledger.exists():
        return []
    return [line for line in ledger.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def start(spec, k, ledger):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            read(spec, (k, spec["processes"]), ledger)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(spec):
    rng, n = random.Random(spec["seed"]), spec["processes"]
    ledgers = [Path(f"{spec['ledger']}.{k}") for k in range(n)]
    kills = 0
    for target in [*sorted(0.9 * rng.random() for _ in range(spec["kills"])), None]:
        children = [start(spec, k, ledger) for k, ledger in enumerate(ledgers)]
        if target is not None:
            # The moment: when this part of all lines is there, and then some way into the next batch.
            while len(whole_lines(ledgers[0])) < target * spec["lines"]:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.004)
            for child in children:
                os.kill(child, signal.SIGKILL)
        ended = [os.waitpid(child, 0)[1] for child in children]
        killed = [os.WIFSIGNALED(status) for status in ended]
        assert target is None or all(os.WIFSIGNALED(s) or s == 0 for s in ended), ended
        assert target is not None or ended == [0] * n, ended
        kills += any(killed)
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
