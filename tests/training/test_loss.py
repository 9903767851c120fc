"""The loss against torch in float64 and against its own definition at odd shapes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mlx.loss import label_positions, loss_and_count


class Head(nn.Module):
    """A model of embedding and softcapped head: enough to have a loss."""

    def __init__(self, vocab=37, dims=8, dtype=mx.float32):
        super().__init__()
        self.embed = nn.Embedding(vocab, dims)
        self.head = nn.Linear(dims, vocab, bias=False)
        self.set_dtype(dtype)

    def hidden(self, input_ids):
        return self.embed(mx.array(input_ids))

    def logits(self, hidden):
        return 3.0 * mx.tanh(self.head(hidden) / 3.0)


def _labels(r, shape, vocab, share):
    labels = r.integers(0, vocab, shape).astype(np.int32)
    labels[r.random(shape) > share] = -100
    return labels


@pytest.mark.parametrize("shape,share", [((3, 17), 0.5), ((1, 2), 1.0), ((5, 33), 0.02), ((2, 40), 1.0)])
def test_equals_torch_cross_entropy_and_its_gradient(shape, share):
    torch = pytest.importorskip("torch")
    r = np.random.default_rng(3)
    model, ids, labels = Head(), r.integers(0, 37, shape), _labels(r, shape, 37, share)
    labels[0, -1] = 5
    logits = torch.tensor(np.array(model.logits(model.hidden(ids)))).double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 37), torch.tensor(labels[:, 1:]).long().reshape(-1), reduction="sum"
    )
    total, count, correct = loss_and_count(model, {"input_ids": ids}, labels)
    counted = labels[:, 1:] != -100
    assert count == counted.sum()
    assert abs(total.item() - wanted.item()) < 1e-4 * max(1, wanted.item())
    assert correct.item() == ((logits[:, :-1].argmax(-1).numpy() == labels[:, 1:]) & counted).sum()
    head = torch.tensor(np.array(model.head.weight)).double().requires_grad_()
    hidden = torch.tensor(np.array(model.hidden(ids))).double()
    z = 3.0 * torch.tanh(hidden[:, :-1] @ head.T / 3.0)
    torch.nn.functional.cross_entropy(
        z.reshape(-1, 37), torch.tensor(labels[:, 1:]).long().reshape(-1), reduction="sum"
    ).backward()
    grads = nn.value_and_grad(model, lambda m: loss_and_count(m, {"input_ids": ids}, labels)[0])(model)[1]
    got = np.array(grads["head"]["weight"])
    assert np.linalg.norm(got - head.grad.numpy()) <= 1e-5 * np.linalg.norm(head.grad.numpy())


def test_positions_are_padded_to_few_shapes():
    r = np.random.default_rng(0)
    sizes = set()
    for _ in range(50):
        labels = _labels(r, (4, int(r.integers(2, 60))), 10, r.random())
        where = label_positions(labels)
        sizes.add(len(where["positions"]))
        assert where["weights"].sum() == (labels[:, 1:] != -100).sum()
    assert all(s % 32 == 0 and s > 0 for s in sizes)


def test_the_first_label_and_a_batch_without_labels_count_nothing():
    labels = np.full((2, 6), -100, np.int32)
    labels[0, 0] = 3  # nothing predicts the first token
    total, count, correct = loss_and_count(Head(), {"input_ids": np.ones((2, 6), int)}, labels)
    assert (total.item(), count, correct.item()) == (0.0, 0, 0.0)


def test_bfloat16_logits_are_summed_in_float32():
    model = Head(dtype=mx.bfloat16)
    ids = np.random.default_rng(0).integers(0, 37, (4, 300))
    total, count, _ = loss_and_count(model, {"input_ids": ids}, ids.astype(np.int32))
    z = np.array(model.logits(model.hidden(ids)).astype(mx.float32)).astype(np.float64)[:, :-1].reshape(-1, 37)
    wanted = (np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), ids[:, 1:].ravel()]).sum()
    assert total.dtype == mx.float32 and abs(total.item() - wanted) < 1e-5 * wanted and count == len(z)
