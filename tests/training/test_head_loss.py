"""Head, softcap and cross entropy in chunks: against torch in float64, and against the form with logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mlx import head_loss
from gemma_mlx.head_loss import Head, pays, read_head, target_scores
from gemma_mlx.lanes import shared
from gemma_mlx.loss import label_scores
from gemma_mlx.ops import head_curve
from gemma_mlx.step import can_compile

torch = pytest.importorskip("torch")


class Tail(nn.Module):
    """What of a model follows the final norm."""

    def __init__(self, weight, cap, trains=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(*weight.shape)
        self.embed_tokens.weight = weight
        self.cap = cap
        if not trains:
            self.freeze()

    def output_head(self):
        return self.embed_tokens, self.cap

    def logits(self, hidden):
        z = self.embed_tokens.as_linear(hidden).astype(mx.float32)
        return z if self.cap is None else mx.tanh(z / self.cap) * self.cap


def problem(n=37, vocabulary=517, dims=24, spread=1.0, seed=0):
    """hidden, weight, targets (half of them the argmax), and what each log-probability counts in the loss."""
    r = np.random.default_rng(seed)
    hidden = (spread * r.standard_normal((n, dims))).astype(np.float32)
    weight = r.standard_normal((vocabulary, dims)).astype(np.float32)
    targets = r.integers(0, vocabulary, n).astype(np.int32)
    targets[::2] = (hidden[::2] @ weight.T).argmax(1)
    counts = r.standard_normal(n).astype(np.float32)
    counts[-5:] = 0  # padding
    return hidden, weight, targets, counts


def exact(hidden, weight, targets, counts, cap):
    """(log-probabilities, correct, gradients of hidden and weight) in float64.

    The argmax is that of the scores before the cap, which makes equals of large ones.
    """
    h, w = (torch.tensor(np.array(x), dtype=torch.float64).requires_grad_() for x in (hidden, weight))
    raw = h @ w.T
    z = raw if cap is None else cap * torch.tanh(raw / cap)
    log_probs = torch.log_softmax(z, -1)[range(len(targets)), targets]
    (log_probs * torch.tensor(counts)).sum().backward()
    return log_probs.detach().numpy(), raw.argmax(-1).numpy() == targets, h.grad.numpy(), w.grad.numpy()


def ours(hidden, weight, targets, counts, cap, trains=False, chunk=(16, 1024)):
    """The same of ours; the weight's gradient of a frozen head is zero."""

    def loss(h, w):
        log_probs, correct = target_scores(h, mx.array(targets), Head((w,), cap, None, trains), chunk=chunk)
        return mx.sum(log_probs * mx.array(counts)), (log_probs, correct)

    (_, (log_probs, correct)), grads = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(hidden), mx.array(weight))
    return np.array(log_probs), np.array(correct), *(np.array(g.astype(mx.float32)) for g in grads)


def distance(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("cap", [30.0, None, 5.0, 80.0])  # 80: powers too small for a sum without a running maximum
def test_equals_torch_in_float64(cap, spread, trains):
    """1e-6 of the log-probabilities and 3e-6 of the gradients, which float32 products of this size leave."""
    log_probs, correct, d_hidden, d_weight = exact(*(case := problem(spread=spread)), cap)
    found = ours(*case, cap, trains)
    assert distance(found[0], log_probs) < 1e-6
    assert (found[1] == correct).all() and 0.3 < correct.mean() < 0.9
    assert distance(found[2], d_hidden) < 3e-6
    assert distance(found[3], d_weight) < 3e-6 if trains else not found[3].any()


@pytest.mark.parametrize("n,vocabulary,chunk", [
    (1, 1, (16, 64)), (1, 63, (1, 1)), (5, 64, (2, 128)), (7, 65, (7, 64 * 7)), (33, 129, (16, 16 * 64)),
    (32, 128, (16, 16 * 64)), (3, 1000, None),
])  # fmt: skip
@pytest.mark.parametrize("trains", [False, True])
def test_any_numbers_of_positions_rows_and_chunks(n, vocabulary, chunk, trains):
    case = problem(n, vocabulary, 8)
    case[3][:] = np.linspace(0.5, 1.5, n)
    log_probs, correct, d_hidden, d_weight = exact(*case, 30.0)
    found = ours(*case, 30.0, trains, chunk)
    assert np.abs(found[0] - log_probs).max() < 1e-5 and (found[1] == correct).all()
    assert np.abs(found[2] - d_hidden).max() < 1e-5
    assert not trains or np.abs(found[3] - d_weight).max() < 1e-5


def with_logits(hidden, weight, targets, counts, cap):
    """The plain form's log-probabilities and gradients."""

    def loss(h, w):
        log_probs, _ = label_scores(Tail(w, cap), h, mx.array(targets), chunked=False)
        return mx.sum(log_probs * mx.array(counts)), log_probs

    (_, log_probs), grads = mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight)
    return np.array(log_probs), *(np.array(g.astype(mx.float32)) for g in grads)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("certain", [False, True])
def test_no_further_from_float64_than_the_form_with_logits(monkeypatch, certain, dtype, gpu, trains):
    """``gpu``: products in the weight's dtype, as they run there; then bfloat16 logits are rounded in both forms.

    ``certain``: where the loss is small, each gradient is; a share of 1e-3 must not drown in the rounding of its row.
    What may be added: of log-probabilities 2e-7, since logits less the cap have steps of 2e-6; of gradients 2**-10
    in bfloat16, since each chunk's product is rounded.
    """
    monkeypatch.setattr(head_loss, "on_gpu", lambda: gpu)
    monkeypatch.setattr(head_curve, "on_gpu", lambda: gpu)
    hidden, weight, targets, counts = problem(dims=256, spread=0.03)
    if certain:
        targets = np.arange(37).astype(np.int32) * 13
        hidden += 0.06 * weight[targets]
    low = [mx.array(x).astype(dtype) for x in (hidden, weight)]
    log_probs, _, *gradients = exact(*(x.astype(mx.float32) for x in low), targets, counts, 30.0)
    assert (1e-4 if certain else 1) < -np.median(log_probs) < (1e-2 if certain else 10)
    found, plain = ours(*low, targets, counts, 30.0, trains), with_logits(*low, targets, counts, 30.0)
    assert distance(found[0], log_probs) <= 1.2 * distance(plain[0], log_probs) + 2e-7
    for got, other, wanted in list(zip(found[2:], plain[1:], gradients, strict=True))[: 1 + trains]:
        assert distance(got, wanted) <= 1.2 * distance(other, wanted) + (1e-7 if dtype == mx.float32 else 2**-10)
        assert gpu or distance(got, wanted) < (1e-5 if dtype == mx.float32 else 4e-3)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_heads(monkeypatch, bits, gpu):
    """Against float64 over the weights that the packed ones stand for, and against the form with logits."""
    monkeypatch.setattr(head_loss, "on_gpu", lambda: gpu)
    monkeypatch.setattr(head_curve, "on_gpu", lambda: gpu)
    hidden, weight, targets, counts = problem(dims=64)
    tail = Tail(mx.array(weight), 30.0)
    tail.embed_tokens = tail.embed_tokens.to_quantized(group_size=32, bits=bits)
    e = tail.embed_tokens
    whole = np.array(mx.dequantize(e.weight, e.scales, e.biases, e.group_size, e.bits))
    log_probs, correct, d_hidden, _ = exact(hidden, whole, targets, counts, 30.0)

    def loss(h, chunked):
        scores = label_scores(tail, h, mx.array(targets), chunked=chunked)
        return mx.sum(scores[0] * mx.array(counts)), scores

    for chunked in (True, False):
        (_, found), grad = mx.value_and_grad(loss)(mx.array(hidden), chunked)
        assert distance(found[0], log_probs) < 1e-6 and (np.array(found[1]) == correct).all()
        assert distance(grad, d_hidden) < 3e-6


def test_the_first_of_equal_scores_is_the_argmax():
    hidden, weight, _, _ = problem(n=40)
    weight[300:] = weight[: len(weight) - 300]  # equal rows, chunks apart
    best = (hidden @ weight.T).argmax(1)
    for targets, right in ((best, 1.0), (best + 300, 0.0)):
        targets = np.minimum(targets, len(weight) - 1).astype(np.int32)
        head = Head((mx.array(weight),), 30.0)
        _, correct = target_scores(mx.array(hidden), mx.array(targets), head, chunk=(16, 1024))
        assert (np.array(correct)[best < len(weight) - 300] == right).all()


@pytest.mark.parametrize("cap", [30.0, None])
def test_huge_scores_stay_finite_and_nan_is_not_hidden(cap):
    hidden, weight, targets, counts = problem(spread=1e4)
    found = ours(hidden, weight, targets, counts, cap)
    assert all(np.isfinite(x).all() for x in found)
    hidden[3] = np.nan
    found = ours(hidden, weight, targets, np.ones_like(counts), cap)
    assert np.isnan(found[0][3]) and np.isnan(found[2][3]).all() and np.isfinite(found[0][4:]).all()


@pytest.mark.parametrize("trains", [False, True])
def test_compiled(trains):
    if not can_compile():
        pytest.skip("no C++ compiler")
    hidden, weight, targets, counts = (mx.array(x) for x in problem())

    def loss(h, w, t, c):
        log_probs, correct = target_scores(h, t, Head((w,), 30.0, None, trains), chunk=(16, 4096))
        return mx.sum(log_probs * c), mx.sum(correct)

    function = mx.value_and_grad(loss, argnums=(0, 1))
    wanted, got = (f(hidden, weight, targets, counts) for f in (function, mx.compile(function)))
    assert abs(got[0][0].item() - wanted[0][0].item()) < 1e-5 and got[0][1].item() == wanted[0][1].item()
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5).item() for a, b in zip(got[1], wanted[1], strict=True))


def test_threads_with_streams_of_their_own():
    cases = [problem(seed=seed) for seed in range(6)]
    alone = [ours(*case, 30.0) for case in cases]
    together = shared(3).map(lambda case: ours(*case, 30.0), cases)
    for a, b in zip(alone, together, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_nobody_differentiates(trains):
    hidden, weight, targets, _ = problem()
    tail = Tail(mx.array(weight), 30.0, trains)
    given = tail, mx.array(hidden), mx.array(targets)
    first, *others = [label_scores(*given, gradient=g, chunked=c) for c in (True, False) for g in (True, False)]
    for other in others:
        assert np.abs(np.array(other[0]) - np.array(first[0])).max() < 1e-5 and mx.array_equal(other[1], first[1])


def test_a_tied_weight_gets_both_of_its_gradients():
    """The weight also makes the hidden states, as a tied embedding does."""
    _, weight, targets, counts = problem()
    tail = Tail(mx.array(weight), 30.0, trains=True)
    ids = np.roll(targets, 1)

    def loss(tail, chunked):
        hidden = mx.tanh(tail.embed_tokens(mx.array(ids)))
        return mx.sum(label_scores(tail, hidden, mx.array(targets), chunked=chunked)[0] * mx.array(counts))

    one, other = (nn.value_and_grad(tail, lambda t, c=c: loss(t, c))(tail)[1]["embed_tokens"] for c in (True, False))
    assert distance(one["weight"], np.array(other["weight"])) < 3e-6


def test_which_heads_can_be_read():
    frozen, training = (Tail(mx.zeros((640, 64)), None, trains=t).embed_tokens for t in (False, True))
    assert pays(read_head(frozen, None), 1)
    assert not pays(read_head(training, None), 31) and pays(read_head(training, None), 32)
    packed = frozen.to_quantized(group_size=32, bits=4)
    packed.freeze()
    assert read_head(packed, 30.0).packing == (32, 4, "affine")
    packed.unfreeze(keys="scales")
    assert read_head(packed, 30.0) is None  # its scales have no gradient here
    assert read_head(nn.Linear(8, 9, bias=False), None).vocabulary == 9
    assert read_head(nn.Linear(8, 9), None) is None and read_head(nn.RMSNorm(8), None) is None


def peak_mb(n, vocabulary, dims, trains=False, dtype=mx.float32):
    mx.random.seed(0)
    hidden, targets = mx.random.normal((n, dims)), mx.random.randint(0, vocabulary, (n,))
    weight = (mx.random.normal((vocabulary, dims)) * 0.02).astype(dtype)
    mx.eval(hidden, targets, weight)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    head = lambda w: Head((w,), 30.0, None, trains)  # noqa: E731
    value = mx.value_and_grad(
        lambda h, w: mx.sum(target_scores(h, targets, head(w))[0]), argnums=(0, 1) if trains else 0
    )(hidden, weight)
    mx.eval(value)
    return (mx.get_peak_memory() - held) / 1e6


def test_chunks_do_not_pile_up():
    """126 MB of logits; without the chain of dependencies these took 299 and 184 MB, with it 40 and 44."""
    assert peak_mb(960, 32768, 32) < 80
    assert peak_mb(960, 32768, 32, trains=True) < 80


def test_rows_of_a_bfloat16_head_are_converted_in_blocks():
    """67 MB in float32, for two positions."""
    assert peak_mb(2, 32768, 512, dtype=mx.bfloat16) < 55


@pytest.mark.slow
def test_peak_at_full_size():
    """Gemma 4 E2B's vocabulary and width at 2,048 label positions, float32: 2.1 GB of logits."""
    assert peak_mb(2048, 262_144, 1536) <= 300
