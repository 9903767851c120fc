"""One training step here and in what people run otherwise, on the same random checkpoint and batch.

    python benchmarks/step.py [--torch PYTHON] [--mlx-vlm PYTHON] [--text --mlx-lm PYTHON] [--pairs 5] [--out FOLDER]

On a Mac `pip install -e ".[torch]"` and `python benchmarks/step.py --divide 2 --dtype bfloat16` give the table of MLX
on Metal against torch on MPS. A peer is an interpreter that has it: transformers and PEFT (by default this one),
mlx-vlm, mlx-lm. The checkpoint is Gemma 4 E2B's 35 layers with all sizes divided by `--divide` (8), the batch four
clips of 30, 22, 14 and 10 s with 24 tokens before and an answer of 48 after each; with --text the clips are words.
LoRA of rank 16 on all seven linears of the decoder, AdamW. Everybody starts at the same loss: the adapters' B is
zero.

Each peer runs beside this library in alternated pairs, in processes that stay. Written to the folder: step.md,
step.json and step.png.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from gemma_mlx import blas

import mlx.core as mx  # isort: skip
import eighth

from gemma_mlx.flops import DecoderCost
from gemma_mlx.models.load import save_model

HERE = Path(__file__).parent / "peers"
OURS = "ours"


class Worker:
    """A process that takes a training step when asked."""

    def __init__(self, python: str, script: str, *arguments: str):
        given = {"BENCHMARK_BLAS": blas.__file__} if blas.loaded else {}
        self._process = subprocess.Popen(
            [python, str(HERE / script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **given},
        )  # fmt: skip
        self.facts = self._answer()

    def step(self) -> dict:
        """One step: seconds, loss, peak and resident bytes."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args)}: ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait()


def write_inputs(folder: Path, options: argparse.Namespace) -> dict:
    """The checkpoint and the batch in a folder; what was made, in words and numbers."""
    model = eighth.base(options.divide)
    save_model(model, folder / "checkpoint")
    seconds = [int(s) for s in options.clips.split(",")]
    batch = eighth.clips(seconds, options.prompt, options.answer, spoken=not options.text)
    arrays = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "labels")}
    if not options.text:
        arrays |= {name: getattr(batch, name) for name in ("input_features", "input_features_mask")}
    np.savez(folder / "batch.npz", audio_id=eighth.AUDIO, **arrays)
    (rows, length), text = batch.input_ids.shape, model.spec.text
    head = 4 * text.hidden_size * text.vocab_size * rows * length
    return {
        "rows": rows,
        "tokens": int(batch.attention_mask.sum()),
        "longest": length,
        "labels": batch.label_count,
        "flops": DecoderCost(eighth.adapted(model)).whole(rows, length) + head,
    }


def pairs(folder: Path, options: argparse.Namespace, peer: tuple, ours: str) -> list[dict]:
    """Records of a peer and of this library, from alternated steps; the first of each warms up."""
    common = (str(folder / "checkpoint"), str(folder / "batch.npz"), options.dtype)
    python, script, *more = peer
    workers = [
        Worker(python, script, *common, *more),
        Worker(sys.executable, "with_gemma_mlx.py", *common, *ours.split()),
    ]
    found = [{**worker.facts, "steps": []} for worker in workers]
    for i in range(options.pairs + 1):
        for worker, record in zip(workers, found, strict=True):
            made = worker.step()
            if i == 0:
                record["first_loss"] = made["loss"]
            else:
                record["steps"].append(made)
            print(f"{record['name']}: {made['seconds']:.2f} s, loss {made['loss']:.5f}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.close()
    return found


def row(peer: dict, mine: dict, facts: dict) -> str:
    """A line of the table."""
    theirs, ours = (statistics.median(s["seconds"] for s in record["steps"]) for record in (peer, mine))
    peaks = [max(s["peak"] for s in record["steps"]) / 1e9 for record in (peer, mine)]
    resident = [max(s["resident"] for s in record["steps"]) / 1e9 for record in (peer, mine)]
    flops = [record.get("flops", facts["flops"]) for record in (peer, mine)]
    apart = abs(peer["first_loss"] / mine["first_loss"] - 1)
    cells = [peer["name"], mine["name"], f"{theirs:.2f}", f"{ours:.2f}", f"**{theirs / ours:.1f}×**"]
    cells += [f"{flops[0] / 1e9:.0f}", f"{flops[1] / 1e9:.0f}", f"{flops[1] / flops[0]:.2f}"]
    cells += [f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", f"{resident[0]:.1f}", f"{resident[1]:.1f}", f"{apart:.0e}"]
    return "| " + " | ".join(cells) + " |"


def report(found: list[list[dict]], facts: dict, options: argparse.Namespace) -> str:
    """The Markdown page."""
    heads = ("peer", "here", "peer s", "here s", "faster", "peer GFLOP", "here GFLOP", "of them", "peer peak GB",
             "here", "peer resident GB", "here", "first losses differ by")  # fmt: skip
    versions = sorted({f"{r['name']}: {r['version']} on {r.get('device', 'cpu')}" for pair in found for r in pair})
    return "\n".join([
        f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"{options.dtype}, seed 0. E2B's 35 layers, sizes divided by {options.divide}; {facts['rows']} rows, "
        f"{facts['tokens']} tokens, the longest row {facts['longest']}, {facts['labels']} labels. Medians of "
        f"{options.pairs} alternated pairs. GFLOP: decoder, head and their gradients, counted from shapes; attention "
        "and head of a peer over all positions. Peak: what the allocator reports, on torch's CPU the process's own.",
        "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|",
        *(row(*pair, facts) for pair in found), "", *(f"- {line}" for line in versions), "",
    ])  # fmt: skip


def plot(found: list[list[dict]], path: Path) -> None:
    """Bars: seconds and peak memory of each pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.9 * len(found)), layout="constrained")
    for axes, name, unit in zip(
        figure.subplots(1, 2), ("seconds", "peak"), ("seconds a step", "peak, GB"), strict=True
    ):
        values = [
            (statistics.median(s["seconds"] for s in r["steps"]) if name == "seconds" else
             max(s["peak"] for s in r["steps"]) / 1e9, r["name"], i % 2)
            for pair in found for i, r in enumerate(pair)
        ]  # fmt: skip
        places = range(len(values))[::-1]
        bars = axes.barh(places, [v for v, *_ in values], color=[("tab:gray", "tab:blue")[mine] for *_, mine in values])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_yticks(places, [label for _, label, _ in values])
        axes.set_xlabel(unit)
        axes.margins(x=0.2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=sys.executable, help="an interpreter with transformers and PEFT; none skips")
    parser.add_argument("--mlx-vlm", default="none", help="an interpreter with mlx-vlm")
    parser.add_argument("--mlx-lm", default=sys.executable, help="an interpreter with mlx-lm, for --text")
    parser.add_argument("--attention", default="eager,sdpa", help="torch's, comma separated")
    parser.add_argument("--ours", default=",without-cache", help="settings of this library, comma separated")
    parser.add_argument("--text", action="store_true", help="words in place of clips")
    parser.add_argument("--divide", type=int, default=8, help="E2B's sizes divided by: 8, 4, 2 or 1")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clips", default="30,22,14,10", help="seconds of each row's clip")
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    options = parser.parse_args()
    peers = [(options.torch, "with_torch.py", kind) for kind in options.attention.split(",")]
    peers = [] if options.torch == "none" else peers
    if options.text:
        peers.append((options.mlx_lm, "with_mlx_lm.py"))
    if options.mlx_vlm != "none":
        peers.append((options.mlx_vlm, "with_mlx_vlm.py"))
    settings = options.ours.split(",") if not options.text else [""]
    with tempfile.TemporaryDirectory() as folder:
        facts = write_inputs(Path(folder), options)
        mx.clear_cache()
        found = []
        for peer, ours in product(peers, settings):
            try:
                found.append(pairs(Path(folder), options, peer, ours))
            except RuntimeError as error:  # the others are worth their table
                print(f"left out: {error}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    page = report(found, facts, options)
    (options.out / "step.md").write_text(page)
    (options.out / "step.json").write_text(json.dumps({"facts": facts, "pairs": found}, indent=1))
    plot(found, options.out / "step.png")
    print(page)


if __name__ == "__main__":
    main()
