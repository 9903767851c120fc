"""Tokens a second of batched and single answers on the demo model, and what a step of one row is made of.

    python benchmarks/generation.py [--rounds 3] [--rows 16] [--tokens 24]

Text, audio and image prompts; batches of 8 and 1 by turns in the same process, medians over the rounds. End tokens are
left out of account, so that every answer has as many tokens. Prompts are made and media decoded within the time.
"""

import argparse
import csv
import time
from pathlib import Path

import gemma_mlx as gm  # OpenBLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np

from gemma_mlx import machine
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.generation import answers, as_example
from gemma_mlx.models.padding import chosen_by_model
from gemma_mlx.sampling import Settings

DEMO = Path(gm.__file__).parent / "demo"


def prompts(rows: int) -> dict[str, list]:
    """Kind -> examples."""
    words = [row["text"] for row in csv.DictReader((DEMO / "data" / "test_nato.csv").open(encoding="utf-8"))][:rows]
    return {
        "text": [as_example(f"Repeat: {text}") for text in words],
        "audio": list(read_examples(DEMO / "data" / "test_everyday.csv"))[:rows],
        "image": list(read_examples(DEMO / "data" / "test_digits.csv"))[:rows],
    }


def seconds(model, processor, examples: list, tokens: int, batch_size: int) -> np.ndarray:
    """For all answers: on the clock, and of the processor (which others' work on the machine lengthens less)."""
    start = np.array([time.perf_counter(), time.process_time()])
    found = list(answers(model, processor, examples, Settings(max_tokens=tokens), batch_size))
    assert all(len(answer.ids) == tokens for _, answer in found)
    return np.array([time.perf_counter(), time.process_time()]) - start


def step_parts(model, rows: int, steps: int = 60) -> tuple[float, float]:
    """Milliseconds of a step: making its graph, evaluating it."""
    cache, ids = model.make_cache(), np.random.default_rng(0).integers(50, 400, (rows, 60))
    hidden, times = model.hidden(ids, cache=cache), []
    for _ in range(steps):
        tokens = mx.argmax(model.logits(hidden[:, -1]), axis=-1)
        mx.eval(tokens)
        start = time.perf_counter()
        with chosen_by_model():
            hidden = model.hidden(tokens[:, None], cache=cache)
        made = time.perf_counter()
        mx.eval(hidden)
        times.append((made - start, time.perf_counter() - made))
    return tuple(1000 * float(x) for x in np.median(times, axis=0))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 3), ("rows", 16), ("tokens", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    model, processor = gm.load(DEMO / "checkpoint")
    processor.tokenizer.eos_ids = ()
    print(f"{machine.describe()}, {machine.cores()} cores; tokens/s, medians of {given.rounds} rounds")
    for kind, examples in prompts(given.rows).items():
        seconds(model, processor, examples[:8], 4, 8)
        rounds = [[seconds(model, processor, examples, given.tokens, n) for n in (1, 8)] for _ in range(given.rounds)]
        one, eight = np.array(rounds).swapaxes(0, 1)
        rates = len(examples) * given.tokens / np.median([one, eight], axis=1)
        ratios = np.median(one / eight, axis=0)
        print(
            f"{kind:6} batch 1 {rates[0, 0]:6.1f}   batch 8 {rates[1, 0]:6.1f}   ratio {ratios[0]:.2f}"
            f"   (tokens per processor second {rates[0, 1]:.1f}, {rates[1, 1]:.1f}, ratio {ratios[1]:.2f})",
            flush=True,
        )
    for rows in (1, 8):
        made, done = step_parts(model, rows)
        print(f"step of {rows} rows: graph {made:.2f} ms, evaluation {done:.2f} ms")


if __name__ == "__main__":
    main()
