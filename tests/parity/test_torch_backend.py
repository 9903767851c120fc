"""The torch path itself: what it is asked is what transformers and PEFT are given."""

import numpy as np
import pytest
import torch
from parity_cases import CASES, make_batch, random_lora

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.errors import InputError
from gemma_mlx.torch_backend import TorchBackend

Q = "model.language_model.layers.0.self_attn.q_proj"
V = "model.vision_tower.encoder.layers.1.self_attn.v_proj.linear"


@pytest.fixture(scope="module")
def backend(folders):
    backend = TorchBackend(folders["E2B"], device="cpu")
    backend.add_lora([Q, V], rank=2, alpha=4)
    return backend


def test_loss_is_the_mean_over_label_positions(backend):
    batch = make_batch(CASES["everything"])
    result = backend.run(batch)
    logits = result.logits[:, :-1].astype(np.float64)
    labels = batch.labels[:, 1:]
    rows, columns = np.nonzero(labels != IGNORE_INDEX)
    chosen = logits[rows, columns]
    losses = np.log(np.exp(chosen).sum(-1)) - chosen[np.arange(len(rows)), labels[rows, columns]]
    assert abs(result.loss - losses.mean()) < 1e-5
    assert np.abs(backend.logits(batch) - result.logits).max() < 1e-6


def test_adapters_by_finite_differences(backend):
    """A and B go in and gradients come out in our orientation: directional derivatives say so."""
    batch = make_batch(CASES["one image"])
    weights = random_lora({Q: (64, 64), V: (32, 32)}, rank=2)
    backend.set_lora(weights)
    for path, pair in backend.lora().items():
        assert all(np.array_equal(a, b) for a, b in zip(pair, weights[path], strict=True))
    base = backend.run(batch)
    size = 1e-2
    for path in weights:
        for i in range(2):
            g = base.gradients[path][i]
            moved = [w + size * g / np.linalg.norm(g) if j == i else w for j, w in enumerate(weights[path])]
            backend.set_lora({**weights, path: tuple(moved)})
            slope = (backend.run(batch).loss - base.loss) / size
            assert slope == pytest.approx(np.linalg.norm(g), rel=0.1)


def test_step_moves_adapters_only(backend):
    batch = make_batch(CASES["one image"])
    frozen = {n: p.clone() for n, p in backend.model.named_parameters() if "lora_" not in n}
    before = backend.lora()
    optimizer = torch.optim.AdamW(backend.parameters(), lr=1e-2)
    losses = [backend.step(batch, optimizer, max_norm=1.0) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(not np.array_equal(a, b) for p in before for a, b in zip(before[p], backend.lora()[p], strict=True))
    after = dict(backend.model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in frozen.items())


def test_wrong_paths(folders, backend):
    with pytest.raises(InputError, match=r"differ at model\.nothing"):
        backend.set_lora({"model.nothing": ()} | backend.lora())
    with pytest.raises(InputError, match="PEFT's adapters differ from the request at"):
        TorchBackend(folders["E2B"], device="cpu").add_lora([Q, "model.nothing"], rank=2, alpha=2)
