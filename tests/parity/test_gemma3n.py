"""Gemma 3n whole against transformers, everything random, float32: logits, adapter gradients, answers, loading."""

import itertools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import tiny_gemma3n as tiny3n
import torch
from mlx.utils import tree_flatten
from parity_cases import random_lora, relative_differences

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.errors import InputError
from gemma_mlx.generation import answer_ids
from gemma_mlx.lora import apply_lora, lora_layers, set_lora_parameters
from gemma_mlx.loss import at_positions, label_positions, loss_and_count, loss_sum
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.spec import read_spec

pytest.importorskip("timm")
BOUND, GRADIENTS = 2e-4, 1e-3
TARGETS = "decoder,audio,embedders,per_layer_input_gate,per_layer_projection,linear_left,linear_right,modality_router"
CASES = {
    "text beyond the window": dict(kind="text", n_text=70),
    "padded batch": dict(kind="text", n_text=30, batch=3),
    "one clip": dict(kind="audio", lens=(80,)),
    "clips of other lengths over a batch, shorter first": dict(kind="audio", lens=(61, 200), batch=2, n_text=20),
    "clips in a row": dict(kind="audio", lens=(97, 33, 64)),
    "one image": dict(kind="image"),
    "images and clips over a batch": dict(kind="image+audio", n_img=2, lens=(80, 61), batch=2),
}


SHALLOW = dict(  # four layers: through ten, the reference's own noise on pixels reaches 1e-4
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("tiny3n")


@pytest.fixture(scope="module")
def pair(folder):
    reference = tiny3n.make(folder, seed=0)
    return reference, load_model(folder)


@pytest.fixture(scope="module")
def shallow_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shallow3n")


@pytest.fixture(scope="module")
def shallow(shallow_folder):
    reference = tiny3n.make(shallow_folder, seed=4, text=SHALLOW)
    return reference, load_model(shallow_folder)


def moved_media(batch):
    """The batch with pixels and features moved by 1e-7."""
    rng = np.random.default_rng(0)
    names = [name for name in ("pixel_values", "input_features") if name in batch]
    moved = {n: (batch[n] + 1e-7 * rng.standard_normal(batch[n].shape)).astype(np.float32) for n in names}
    return {**batch, **moved}


def logit_floor(reference, batch):
    """`tiny.logit_floor`, and the reference's change when pixels and features move by 1e-7."""
    valid = batch["attention_mask"].astype(bool)
    change = tiny.reference_logits(reference, moved_media(batch)) - tiny.reference_logits(reference, batch)
    return max(tiny.logit_floor(reference, batch), np.abs(change[valid]).max())


@pytest.mark.parametrize("case", CASES)
def test_logits(pair, shallow, case, judge):
    reference, ours = shallow if "image" in case else pair
    batch = tiny3n.inputs(**CASES[case])
    valid = batch["attention_mask"].astype(bool)
    expected = tiny.reference_logits(reference, batch)[valid]
    assert 0.5 < expected.std() < 2
    difference = np.abs(np.array(ours(**batch))[valid] - expected).max()
    judge("logits 3n", case, logit_floor(reference, batch), difference, BOUND, least=1e-5)


@pytest.mark.parametrize("style", ["hub", "native"])
def test_widths_by_layer_and_no_sharing(style, tmp_path, judge):
    """intermediate_size as a list, no shared keys and values, default sparsity; both spellings of the rotary bases."""
    text = dict(
        num_hidden_layers=5, layer_types=tiny3n.TEXT["layer_types"][:5], num_kv_shared_layers=0,
        intermediate_size=[96, 64, 80, 48, 96], activation_sparsity_pattern=[0.9, 0.0, 0.95, 0.5, 0.0],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "default", "rope_theta": 2e5},
        },
    )  # fmt: skip
    reference = tiny3n.make(tmp_path, seed=1, style=style, text=text)
    batch = tiny3n.inputs("text", n_text=40)
    expected = tiny.reference_logits(reference, batch)
    difference = np.abs(np.array(load_model(tmp_path)(**batch)) - expected).max()
    judge("logits 3n", f"widths by layer, {style}", tiny.logit_floor(reference, batch), difference, BOUND, least=1e-5)


def with_labels(batch):
    return np.where(batch["attention_mask"] * (batch["input_ids"] < tiny3n.BOI), batch["input_ids"], IGNORE_INDEX)


def their_gradients(model, batch, pairs):
    model.zero_grad(set_to_none=True)
    tensors = {k: torch.tensor(v) for k, v in batch.items()}
    out = model(**tensors, labels=torch.tensor(with_labels(batch)), use_cache=False)
    out.loss.backward()
    zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad  # noqa: E731
    return float(out.loss.detach()), {n: tuple(zero(p).numpy().T.copy() for p in ab) for n, ab in pairs.items()}


def our_gradients(model, batch):
    def mean_loss(model):
        total, count, _ = loss_and_count(model, batch, with_labels(batch))
        return total / count

    loss, grads = nn.value_and_grad(model, mean_loss)(model)
    flat = {name: np.array(g) for name, g in tree_flatten(grads)}
    return float(loss), {p: (flat[f"{p}.lora_a"], flat[f"{p}.lora_b"]) for p in lora_layers(model)}


@pytest.fixture(scope="module")
def adapted(pair, shallow, folder, shallow_folder):
    """For each checkpoint: both with the same random adapters; the reference's by PEFT on a copy of its own."""
    return {"deep": adapters_on(folder), "shallow": adapters_on(shallow_folder)}


def adapters_on(folder):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Gemma3nForConditionalGeneration

    ours = load_model(folder)
    paths = apply_lora(ours, TARGETS, 3, 6.0)
    theirs = Gemma3nForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs.eval().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6.0, bias="none", target_modules=sorted(paths)), theirs)
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert sorted(layers) == sorted(paths)
    pairs = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}
    weights = random_lora({p: layer.weight.shape for p, layer in lora_layers(ours).items()}, 3)
    with torch.no_grad():
        for n, (a, b) in weights.items():
            pairs[n][0].copy_(torch.tensor(a.T))
            pairs[n][1].copy_(torch.tensor(b.T))
    flat = {f"{p}.{n}": mx.array(w) for p, ab in weights.items() for n, w in zip(("lora_a", "lora_b"), ab, strict=True)}
    set_lora_parameters(ours, flat)
    return theirs, pairs, ours


@pytest.mark.parametrize("case", CASES)
def test_gradients(adapted, case, judge):
    theirs, pairs, ours = adapted["shallow" if "image" in case else "deep"]
    batch = tiny3n.inputs(**CASES[case])
    expected_loss, expected = their_gradients(theirs, batch, pairs)
    loss, found = our_gradients(ours, batch)
    assert abs(loss - expected_loss) <= 2e-5
    theirs.set_attn_implementation("sdpa")
    _, again = their_gradients(theirs, batch, pairs)
    theirs.set_attn_implementation("eager")
    _, moved = their_gradients(theirs, moved_media(batch), pairs)
    floor = max(d for other in (again, moved) for d in relative_differences(other, expected).values())
    differences = relative_differences(found, expected)
    worst = max(differences, key=differences.get)
    judge("gradients 3n", f"{case}: {worst}", floor, differences[worst], GRADIENTS, least=5e-5)


def test_every_part_has_gradients(adapted):
    theirs, pairs, _ = adapted["shallow"]
    _, gradients = their_gradients(theirs, tiny3n.inputs(**CASES["images and clips over a batch"]), pairs)
    assert len(gradients) > 60
    assert all(np.linalg.norm(g) > 1e-7 for pair in gradients.values() for g in pair)


def test_altup_clamp_in_training(tmp_path):
    """With coefficients beyond the bound: losses and gradients of both matrices in train mode, logits in eval mode."""
    reference = tiny3n.make(tmp_path, seed=0, text=dict(altup_coef_clip=0.4))
    ours = load_model(tmp_path)
    batch = tiny3n.inputs("text", n_text=20)
    assert np.abs(np.array(ours(**batch)) - tiny.reference_logits(reference, batch)).max() <= BOUND
    names = [n for n, _ in reference.named_parameters() if "correction_coefs" in n or "prediction_coefs" in n]
    beyond = [np.abs(dict(tree_flatten(ours.parameters()))[n]).max() > 0.4 for n in names]
    assert all(beyond)
    ours.train()
    for layer in ours.model.language_model.layers:
        layer.altup.correction_coefs.unfreeze()
        layer.altup.prediction_coefs.unfreeze()

    def mean_loss(model):
        total, count, _ = loss_and_count(model, batch, with_labels(batch))
        return total / count

    plain = float(mean_loss(load_model(tmp_path)))
    loss, grads = nn.value_and_grad(ours, mean_loss)(ours)
    grads = dict(tree_flatten(grads))
    reference.train()
    reference.requires_grad_(False)
    parameters = {n: p.requires_grad_() for n, p in reference.named_parameters() if n in names}
    out = reference(
        **{k: torch.tensor(v) for k, v in batch.items()}, labels=torch.tensor(with_labels(batch)), use_cache=False
    )
    out.loss.backward()
    assert abs(float(loss) - float(out.loss.detach())) <= 2e-5 < abs(float(loss) - plain)
    assert sorted(grads) == sorted(names)
    for name, p in parameters.items():
        expected = p.grad.numpy()
        assert np.linalg.norm(np.array(grads[name]) - expected) <= GRADIENTS * np.linalg.norm(expected), name


def test_training_loss_with_and_without_a_cache(pair):
    """The loss over a row is the same read in parts through a cache, and all at once."""
    _, ours = pair
    batch = tiny3n.inputs("audio", lens=(80,), n_text=40)
    labels = with_labels(batch)
    at = {k: mx.array(v) for k, v in label_positions(labels).items()}

    def loss(hidden):
        return float(loss_sum(ours, at_positions(hidden, at["positions"]), at["targets"], at["weights"])[0])

    soft = ours.encode(input_features=batch["input_features"], input_features_mask=batch["input_features_mask"])
    ids, cache, parts = batch["input_ids"], ours.make_cache(), []
    cuts = [0, 36, 37, 52, ids.shape[1]]  # the clip's slots lie in the first part
    for start, stop in itertools.pairwise(cuts):
        parts.append(ours.hidden(ids[:, start:stop], cache=cache, **(soft if start == 0 else {})))
    whole = loss(ours.hidden(**batch))
    assert abs(loss(mx.concatenate(parts, axis=1)) - whole) <= 1e-4 * whole


@pytest.mark.parametrize("case", ["text beyond the window", "one clip", "one image"])
def test_greedy_answers_equal_transformers(pair, case):
    reference, ours = pair
    inputs = tiny3n.inputs(**CASES[case])
    tensors = {k: torch.tensor(v) for k, v in inputs.items()}
    with torch.no_grad():
        theirs = reference.generate(**tensors, max_new_tokens=30, do_sample=False, eos_token_id=-2, pad_token_id=0)
    expected = theirs[0, inputs["input_ids"].shape[1] :].tolist()
    labels = np.full_like(inputs["input_ids"], IGNORE_INDEX)
    batch = Batch(mm_token_type_ids=np.zeros_like(labels), labels=labels, **inputs)
    assert answer_ids(ours, batch, [-2], 30)[0] == expected


def test_shared_layers_keys_are_dropped_and_others_refused(pair, folder, tmp_path):
    _, ours = pair
    save_model(ours, tmp_path)
    names = {n for n, _ in tree_flatten(ours.parameters())}
    weights = mx.load(str(tmp_path / "model.safetensors"))
    theirs = mx.load(str(folder / "model.safetensors"))
    assert weights.keys() == names and all(mx.array_equal(weights[n], theirs[n]).item() for n in names)
    extra = "model.language_model.layers.7.self_attn."
    weights |= {f"{extra}k_proj.weight": mx.zeros((32, 64)), f"{extra}k_norm.weight": mx.zeros((16,))}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    batch = tiny3n.inputs("text")
    assert mx.array_equal(load_model(tmp_path)(**batch), ours(**batch)).item()
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights | {f"{extra}other": mx.zeros((1,))})
    with pytest.raises(InputError, match="unexpected"):
        load_model(tmp_path)


def test_bad_input(pair, folder, tmp_path):
    _, ours = pair
    batch = tiny3n.inputs("audio")
    with pytest.raises(InputError, match="slots"):
        ours(input_ids=batch["input_ids"][:, :-40], input_features=batch["input_features"],
             input_features_mask=batch["input_features_mask"])  # fmt: skip
    with pytest.raises(InputError, match="soft tokens; a clip has 24"):
        ours(**{**batch, "input_features": np.zeros((1, 500, 128), np.float32),
                "input_features_mask": np.ones((1, 500), bool)})  # fmt: skip
    with pytest.raises(InputError, match="ids are 0 to"):
        ours(input_ids=np.array([[2, tiny3n.VOCAB]]))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = [96] * 3
    with pytest.raises(InputError, match="3 entries"):
        read_spec(config)
