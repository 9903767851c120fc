"""Weights that train in full, against torch's autograd and AdamW on transformers' parameters; all random, float32."""

import numpy as np
import pytest
import torch
from full_pairs import differences, gradient, in_torch_layout, our_steps, release, step_gradients, their_steps
from parity_cases import CASES, make_batch
from parity_pairs import PATTERNS, copy_lora, make_pair, noisy

from gemma_mlx.full import resolve_full, train_fully, trained_parameters
from gemma_mlx.lora import apply_lora, freeze_base

BOUND = 1e-3  # ‖a − b‖ / ‖b‖ of each tensor
EVERYTHING = "all,embed_tokens"
SOME = ["text", "right-padded batch", "two images over a batch", "two clips over a batch, shorter first", "everything"]


@pytest.fixture(scope="module", params=PATTERNS)
def released(request, folders):
    """(pair, transformers' parameters by name): every weight that can train does, in both."""
    pair = make_pair(request.param, folders[request.param])
    train_fully(pair.ours, EVERYTHING)
    return pair, release(pair.theirs.model, trained_parameters(pair.ours))


def their_gradients(pair, parameters, batch):
    pair.theirs.model.zero_grad(set_to_none=True)
    loss = pair.theirs.model(**pair.theirs.tensors(batch), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: gradient(p) for name, p in parameters.items()}


@pytest.mark.parametrize("case", SOME)
def test_gradients_of_every_weight(released, case, judge):
    pair, parameters = released
    batch = make_batch(CASES[case], seed=2)  # seed 0 has a ReLU at its kink: the reference's own noise is 5e-3
    expected_loss, expected = their_gradients(pair, parameters, batch)
    loss, found = step_gradients(pair.ours, batch)
    assert abs(loss - expected_loss) <= 1e-5
    again = (their_gradients(pair, parameters, b)[1] for b in noisy(pair.theirs, batch))
    floor = max(max(differences(g, expected).values()) for g in again)
    found = differences(found, expected)
    worst = max(found, key=found.get)
    judge(f"full gradients {pair.name}", f"{case}: {worst}", floor, found[worst], BOUND, least=5e-5)


def test_what_trains_is_every_parameter_but_tables_and_scales(released):
    """transformers' parameters that stay: position and per-layer tables, the audio attention's scale."""
    pair, parameters = released
    others = {name for name, _ in pair.theirs.model.named_parameters()} - parameters.keys()
    leaves = {name.rpartition("layers.")[2].lstrip("0123456789.") for name in others}
    assert leaves == {
        "model.language_model.embed_tokens_per_layer.weight",
        "model.vision_tower.patch_embedder.position_embedding_table",
        "self_attn.per_dim_scale",
    }
    _, gradients = their_gradients(pair, parameters, make_batch(CASES["everything"]))
    assert all(np.linalg.norm(g) > 1e-7 for g in gradients.values())  # the comparison above is of something


def test_the_tied_embedding_gets_both_gradients(folders):
    """Of the rows looked up and of the head: each alone is another gradient."""
    pair = make_pair("E2B", folders["E2B"])
    train_fully(pair.ours, "embed_tokens")
    (name,) = trained_parameters(pair.ours)
    parameters, batch = release(pair.theirs.model, [name]), make_batch(CASES["text"])
    _, expected = their_gradients(pair, parameters, batch)
    _, found = step_gradients(pair.ours, batch)
    assert differences(found, expected)[name] <= BOUND
    table = parameters[name]
    rows = torch.nn.functional.embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", lambda ids, w, *a, **k: rows(ids, w.detach(), *a, **k))
        _, head = their_gradients(pair, parameters, batch)
    size = np.linalg.norm(expected[name])
    assert np.linalg.norm(head[name] - expected[name]) > 0.05 * size and np.linalg.norm(head[name]) > 0.05 * size
    assert table.shape == found[name].shape


ROWS = [[[24], [9]], [[4, ("image", 6, 6), 12], [3, ("audio", 61), 7]], [[3, ("audio", 30), 2, ("image", 9, 3), 20]]]
CHOICES = {
    "full alone": ("none", "embedders,decoder.layers.3,embed_tokens,audio.layers.1,vision.layers.0,norm"),
    "beside LoRA": ("decoder", "embed_audio,embed_vision,input_layernorm,audio_tower.subsample_conv_projection"),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("choice", CHOICES)
def test_ten_steps(name, choice, folders, record):
    """torch's AdamW with decay over all trained weights alike, clipped together: losses and the weights at the end."""
    targets, full = CHOICES[choice]
    pair = make_pair(name, folders[name])
    if targets != "none":
        paths = apply_lora(pair.ours, targets, rank=4, alpha=8)
        torch.manual_seed(0)
        pair.theirs.add_lora(paths, rank=4, alpha=8)
        copy_lora(pair.theirs.lora(), pair.ours)
    train_fully(pair.ours, full)
    names = [n for n in trained_parameters(pair.ours) if ".lora_" not in n]
    adapters = pair.theirs.parameters()
    parameters = release(pair.theirs.model, names)
    for p in adapters:
        p.requires_grad_()
    batches, settings = [make_batch(rows, seed) for seed, rows in enumerate(ROWS)], (10, 2e-3, 0.05, 1.0)
    before = {n: p.detach().numpy().copy() for n, p in parameters.items()}
    expected = their_steps(pair.theirs, [*adapters, *parameters.values()], batches, *settings)
    got, weights = our_steps(pair.ours, batches, *settings)
    assert np.mean(expected[-3:]) < np.mean(expected[:3]) - 0.3  # it learns
    record(f"loss over 10 steps, {choice}", name, difference := np.abs(np.array(got) - expected).max())
    assert difference <= 1e-3
    ours = {n: in_torch_layout(n, weights[n]) - before[n] for n in names}
    theirs = {n: p.detach().numpy() - before[n] for n, p in parameters.items()}
    assert np.median(list(differences(ours, theirs).values())) <= 1e-2  # AdamW divides noise by noise where g is tiny


@pytest.mark.parametrize("names,words", [
    ("q_proj,embed_audio", "has an adapter; name it in targets or in full"),
    ("decoder", "q_proj has an adapter"),
    ("embed_tokens_per_layer", "cannot train: a step touches a few of its rows"),
    ("layer_scalar", "'layer_scalar' names no module"),
    ("position_embedding_table", "names no module"),
    ("embed_audoi", "did you mean embed_audio"),
    (" , ", "no modules named"),
])  # fmt: skip
def test_refused(folders, names, words):
    from gemma_mlx.errors import InputError

    pair_model = make_pair("E2B", folders["E2B"]).ours
    freeze_base(pair_model)
    apply_lora(pair_model, "decoder.q_proj", rank=2)
    before = sorted(trained_parameters(pair_model))
    with pytest.raises(InputError, match=words) as caught:
        train_fully(pair_model, names)
    assert "\n" not in str(caught.value) and sorted(trained_parameters(pair_model)) == before


def test_names(folders):
    """Ends of paths, containers, groups before them; clips' inner linears by their outer name."""
    model = make_pair("E2B", folders["E2B"]).ours
    of = lambda names: [p.removeprefix("model.") for p in resolve_full(model, names)]  # noqa: E731
    assert of("decoder.layers.3.mlp.down_proj") == ["language_model.layers.3.mlp.down_proj"]
    assert of("embedders") == ["embed_audio.embedding_projection", "embed_vision.embedding_projection"]
    assert of("vision.layers.0.self_attn.q_proj") == ["vision_tower.encoder.layers.0.self_attn.q_proj.linear"]
    assert of("language_model.norm,embed_tokens") == ["language_model.embed_tokens", "language_model.norm"]
    assert of(["subsample_conv_projection.layer0"]) == [
        "audio_tower.subsample_conv_projection.layer0.conv", "audio_tower.subsample_conv_projection.layer0.norm",
    ]  # fmt: skip
    assert not any("embed_tokens" in p for p in of("all"))
