"""Opens a million rows as a run does and reads batches of them; prints seconds and megabytes as JSON.

``million.py FOLDER CHECKPOINT KIND``: writes ``train.csv`` or ``train.parquet`` first, in another process.
"""

import json
import sys
import time
from pathlib import Path

ROWS = 1_000_000


def write(path):
    """A clip, a text and an id each; every clip is the same file."""
    if path.suffix == ".csv":
        with path.open("w") as file:
            file.write("id,audio_path,text\n")
            file.writelines(f'r{i},clip.wav,"the fox, number {i} of many others"\n' for i in range(ROWS))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"the fox, number {i} of many others" for i in range(ROWS)]
    columns = {"id": [f"r{i}" for i in range(ROWS)], "audio_path": ["clip.wav"] * ROWS, "text": texts}
    pq.write_table(pa.table(columns), path)


def memory(field):
    """Megabytes of this process: VmRSS now, VmHWM at the most."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{field}:") + 1]) / 1024


def read(path, checkpoint, batches_read=1500):
    from gemma_mlx.config import TrainConfig
    from gemma_mlx.data.batches import Batches
    from gemma_mlx.data.processor import Processor
    from gemma_mlx.preparation import fetcher_of, open_rows, plan_of
    from gemma_mlx.progress import Reporter

    if path.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  (what importing takes is no memory of the rows)
    processor = Processor(checkpoint)
    _ = processor.template, processor.tokenizer.control_tokens
    start = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    config, began = TrainConfig(data=str(path), batch_size=4), (time.perf_counter(), time.process_time())
    rows = open_rows(str(path), processor, config, Reporter(quiet=True), fetcher_of(config))
    plan = plan_of(config, rows)
    first, middle = None, []
    with Batches(rows, 4, plan=plan, seed=0) as batches:
        next(batches)
        first = time.perf_counter() - began[0], time.process_time() - began[1]
        for n in range(batches_read):
            next(batches)
            if n % 300 == 0:
                middle.append(memory("VmRSS") - start)
        state = batches.state()
    for place in (ROWS - 8, ROWS // 2):  # and anywhere else at once
        batches.seek({**state, "epoch": 3, "position": place})
        for _ in range(5):
            next(batches)
    batches.close()
    print(json.dumps({
        "rows": len(rows), "first_batch_s": first[0], "first_batch_cpu_s": first[1],
        "over_start_mb": memory("VmHWM") - start, "along_mb": middle,
        "state_bytes": len(json.dumps(state)), "read": state["position"],
    }))  # fmt: skip


if __name__ == "__main__":
    folder, checkpoint, kind = sys.argv[1:]
    target = Path(folder) / f"train.{kind}"
    if target.exists():
        read(target, checkpoint)
    else:
        write(target)
