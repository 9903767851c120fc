"""A worker of ``step.py``: a step of this library. ``without-cache`` encodes every clip at every step."""

import sys

from protocol import ALPHA, LR, RANK, arguments, serve

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np

from gemma_mlx import machine
from gemma_mlx.batch import Batch
from gemma_mlx.flops import Picked
from gemma_mlx.full import trained_parameters
from gemma_mlx.lora import apply_lora
from gemma_mlx.models.load import load_model
from gemma_mlx.optim import learning_rate
from gemma_mlx.step import Step, should_compile
from gemma_mlx.tower_store import Memory


def main() -> None:
    folder, arrays, dtype = arguments()
    cached, recompute = "without-cache" not in sys.argv, int("checkpointing" in sys.argv)
    types = np.where(arrays["input_ids"] == arrays.pop("audio_id"), 3, 0).astype(np.int32)
    batch = Batch(mm_token_type_ids=types, **arrays)
    rows = len(batch.input_ids)
    model = load_model(folder, dtype)
    model.freeze()
    apply_lora(model, "decoder", RANK, ALPHA)
    lanes = 1 if should_compile() else machine.lanes(rows, int(batch.attention_mask.sum()) // rows)
    run = Step(model, clip=0.0, lanes=lanes, recompute=recompute, towers=Memory() if cached else Memory(limit=0))
    state = {"weights": trained_parameters(model)}
    state["moments"] = run.optimizer.init(state["weights"])
    mx.eval(model.parameters(), state)
    taken = [0]

    def step() -> float:
        taken[0] += 1
        grads, sums = run.gradients(state["weights"], batch, mx.random.key(0))
        scalars = run.optimizer.scalars(taken[0], learning_rate(0, 1, LR, "constant"), 0.0)
        state["weights"], state["moments"], norm = run.apply(
            state["weights"], state["moments"], grads, sums.labels, scalars
        )
        mx.eval(state, norm, sums.loss)
        run.install(state["weights"])
        return sums.loss.item() / sums.labels

    flops = sum(_flops(run, part) for part in run.lay_out(batch))
    serve(
        "gemma_mlx" + (" (towers not cached)" if not cached else "") + (" (checkpointing)" if recompute else ""),
        step, mx.get_peak_memory, flops=flops, version=f"MLX {mx.__version__}", device=machine.describe(),
        settings=f"{lanes} lanes, {'compiled' if run.compiled else 'not compiled'}",
    )  # fmt: skip


def _flops(run: Step, part) -> int:
    """Of decoder and head, counted from shapes."""
    shape, text = part.arrays["input_ids"].shape, run.model.spec.text
    picked = Picked(len(part.arrays["positions"]), part.arrays["columns"].size) if "columns" in part.arrays else None
    head = 4 * text.hidden_size * text.vocab_size * len(part.arrays["positions"])
    return run.cost.step(*shape, picked, run.recompute) + head


if __name__ == "__main__":
    main()
