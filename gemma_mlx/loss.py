"""Cross entropy at label positions, in float32, as a sum and a count.

transformers' ``ForCausalLMLoss``: labels are not shifted in the batch; the hidden state at t predicts the label at
t + 1, and ``IGNORE_INDEX`` (−100) counts nowhere. Sums, not means, so that batches with unequal numbers of labels
add up to what one large batch gives.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.head_loss import pays, read_head, target_scores

POSITION_BUCKET = 32
"""Label positions are padded to a multiple of this, so that a compiled step sees few shapes."""


def label_positions(labels: np.ndarray, multiple: int = POSITION_BUCKET) -> dict[str, np.ndarray]:
    """The positions whose next token counts, as padded flat lists.

    ``labels`` int [B, T], not shifted. Returns ``positions`` int32 [n] into the flattened [B·T] hidden states,
    ``targets`` int32 [n] token ids, ``weights`` float32 [n] (1, or 0 in the padding), n a multiple of ``multiple``.
    """
    rows, columns = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    padded = max(1, -(-len(rows) // multiple)) * multiple
    result = {"positions": np.zeros(padded, np.int32), "targets": np.zeros(padded, np.int32)}
    result["positions"][: len(rows)] = rows * labels.shape[1] + columns
    result["targets"][: len(rows)] = labels[rows, columns + 1]
    result["weights"] = (np.arange(padded) < len(rows)).astype(np.float32)
    return result


def at_positions(hidden: mx.array, positions: mx.array) -> mx.array:
    """Hidden states [B, T, H] -> those of ``label_positions``, [n, H]."""
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def label_scores(
    model: Any, hidden: mx.array, targets: mx.array, gradient: bool = True, chunked: bool | None = None
) -> tuple[mx.array, mx.array]:
    """(log-probability of each target, whether it is the argmax), float32 [n]; the second is 1 or 0.

    Args:
        model: has ``logits(hidden)``, and ``output_head()`` for the form in chunks.
        hidden: [n, H], states after the final norm at label positions.
        targets: int [n], token ids.
        gradient: whether the result may be differentiated.
        chunked: without the logits (``gemma_mlx.head_loss``), or with them; by default as ``pays`` decides.
    """
    head = read_head(*model.output_head()) if chunked is not False and hasattr(model, "output_head") else None
    if head is not None and (chunked or pays(head, hidden.shape[0])):
        return target_scores(hidden, targets, head, gradient)
    logits = model.logits(hidden).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    correct = (mx.argmax(logits, axis=-1) == targets).astype(mx.float32)
    return chosen - mx.logsumexp(logits, axis=-1), correct


def loss_sum(
    model: Any,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    gradient: bool = True,
    chunked: bool | None = None,
) -> tuple[mx.array, mx.array]:
    """(sum of cross entropies, number of correct argmaxes), float32 scalars.

    ``hidden`` [n, H] are the states after the final norm at label positions, where alone the head and its softcap run;
    targets and weights as ``label_positions`` gives them; the rest as in ``label_scores``.
    """
    log_probs, correct = label_scores(model, hidden, targets, gradient, chunked)
    return -mx.sum(log_probs * weights), mx.sum(correct * weights)


def loss_and_count(model: Any, inputs: dict[str, Any], labels: np.ndarray) -> tuple[mx.array, int, mx.array]:
    """(loss sum, label positions, correct argmaxes) of one batch: ``inputs`` as ``Batch.inputs`` gives them."""
    where = label_positions(labels)
    hidden = at_positions(model.hidden(**inputs), mx.array(where["positions"]))
    total, correct = loss_sum(model, hidden, mx.array(where["targets"]), mx.array(where["weights"]))
    return total, int(where["weights"].sum()), correct
