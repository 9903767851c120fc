"""A worker of ``step.py``: mlx-vlm with what its training of Gemma 4 lacks supplied: a causal mask, and two attributes.

Its own trainer ends with an AttributeError at any Gemma 4 with an audio tower, and passes a mask that is all ones, with
which every token sees the answer it is to predict.
"""

from pathlib import Path

from protocol import ALPHA, LINEARS, LR, RANK, arguments, fast_blas, serve

fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_vlm.models.gemma4 import audio as towers  # noqa: E402
from mlx_vlm.utils import load_model  # noqa: E402
from with_mlx_lm import LoRA  # noqa: E402


def main() -> None:
    folder, arrays, dtype = arguments()
    arrays.pop("audio_id")
    model = load_model(Path(folder))
    towers.AudioRelativePositionEmbedding._no_grad = set()
    towers.AudioRelativePositionEmbedding._training = True
    model.set_dtype(getattr(mx, dtype))
    model.freeze()
    for layer in model.language_model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name in LINEARS:
                if isinstance(owner.get(name), nn.Linear):
                    setattr(owner, name, LoRA(owner[name], RANK, ALPHA / RANK))
    inputs = {name: mx.array(a) for name, a in arrays.items()}
    labels, ids = inputs.pop("labels"), inputs.pop("input_ids")
    inputs.pop("attention_mask")
    counts = labels[:, 1:] != -100
    targets = mx.where(counts, labels[:, 1:], 0)

    def loss_of(model):
        logits = model(ids, None, mask=None, **inputs).logits.astype(mx.float32)
        return (nn.losses.cross_entropy(logits[:, :-1], targets) * counts).sum() / counts.sum()

    gradients, optimizer = nn.value_and_grad(model, loss_of), optim.AdamW(LR, weight_decay=0.0, bias_correction=True)

    def step() -> float:
        loss, grads = gradients(model)
        optimizer.update(model, grads)
        mx.eval(loss, model.trainable_parameters(), optimizer.state)
        return loss.item()

    mx.eval(model.parameters())
    import mlx_vlm

    serve(f"mlx-vlm {mlx_vlm.__version__} (mask corrected)", step, mx.get_peak_memory, version=f"MLX {mx.__version__}")


if __name__ == "__main__":
    main()
