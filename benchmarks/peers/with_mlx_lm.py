"""A worker of ``step.py --text``: mlx-lm, its own loss over the answers, on the same decoder."""

import math
from pathlib import Path

from protocol import ALPHA, LINEARS, LR, RANK, arguments, fast_blas, serve

fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402


class LoRA(nn.Module):
    """A frozen linear with an adapter beside it, as mlx-lm and mlx-vlm compute it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        out, inner = linear.weight.shape
        self.linear, self.scale = linear, scale
        bound = 1 / math.sqrt(inner)
        self.lora_a = mx.random.uniform(-bound, bound, (inner, rank))
        self.lora_b = mx.zeros((rank, out))
        linear.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(x.dtype)


def main() -> None:
    import mlx_lm
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.utils import load_model

    folder, arrays, dtype = arguments()
    model, _ = load_model(Path(folder), strict=False)
    model.set_dtype(getattr(mx, dtype))
    model.freeze()
    for layer in model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name in LINEARS:
                if isinstance(owner.get(name), nn.Linear):
                    setattr(owner, name, LoRA(owner[name], RANK, ALPHA / RANK))
    ids, labels = mx.array(arrays["input_ids"]), arrays["labels"]
    # mlx-lm counts steps from 1 and takes (prompt, end) of each row: the answer's tokens are in between.
    first = (labels != -100).argmax(axis=1)
    lengths = mx.array([[int(a), int(n) - 1] for a, n in zip(first, arrays["attention_mask"].sum(axis=1), strict=True)])
    gradients = nn.value_and_grad(model, default_loss)
    optimizer = optim.AdamW(LR, weight_decay=0.0, bias_correction=True)

    def step() -> float:
        (loss, _), grads = gradients(model, ids, lengths)
        optimizer.update(model, grads)
        mx.eval(loss, model.trainable_parameters(), optimizer.state)
        return loss.item()

    mx.eval(model.parameters())
    serve(f"mlx-lm {mlx_lm.__version__}", step, mx.get_peak_memory, version=f"MLX {mx.__version__}")


if __name__ == "__main__":
    main()
