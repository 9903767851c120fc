"""Adapters against PEFT and mlx-lm, by name and by group, and their files."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mlx.errors import InputError
from gemma_mlx.lora import (
    DoRALinear,
    LoRALinear,
    apply_lora,
    dropout_keys,
    freeze_base,
    linear_paths,
    load_adapter,
    lora_layers,
    lora_parameters,
    lora_weights,
    resolve_targets,
    save_adapter,
    set_lora_parameters,
)


class Clipped(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.linear = nn.Linear(i, o, bias=False)
        self.output_max = mx.array(0.3)

    def __call__(self, x):
        return mx.minimum(self.linear(x), self.output_max)


class Block(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.q_proj, self.down_proj, self.per_layer_input_gate = make(6, 10), make(10, 6), make(6, 6)

    def __call__(self, x):
        return self.down_proj(self.q_proj(x)) + self.per_layer_input_gate(x)


class Stack(nn.Module):
    def __init__(self, make, n):
        super().__init__()
        self.layers = [Block(make) for _ in range(n)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Projector(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_projection = nn.Linear(6, 6, bias=False)

    def __call__(self, x):
        return self.embedding_projection(x)


class Toy(nn.Module):
    """Module names of the real tree, tiny."""

    def __init__(self):
        super().__init__()
        self.language_model = Stack(lambda i, o: nn.Linear(i, o, bias=False), 12)
        self.audio_tower = Stack(Clipped, 2)
        self.embed_audio = Projector()

    @property
    def layers(self):
        return self.language_model.layers

    def __call__(self, x):
        return self.language_model(self.embed_audio(self.audio_tower(x)))


def randomise(model, seed=0):
    r = np.random.default_rng(seed)
    values = {n: mx.array(r.standard_normal(w.shape).astype(np.float32)) for n, w in lora_parameters(model).items()}
    set_lora_parameters(model, values)


def test_groups_and_names_choose_the_right_layers():
    model = Toy()
    decoder = resolve_targets(model, "decoder")
    assert len(decoder) == 24 and all(p.startswith("language_model") and "gate" not in p for p in decoder)
    assert decoder[4].startswith("language_model.layers.2.")  # natural order: layer 2 before layer 10
    assert resolve_targets(model, "audio.q_proj") == [f"audio_tower.layers.{i}.q_proj.linear" for i in range(2)]
    assert len(resolve_targets(model, "q_proj")) == 14
    assert len(resolve_targets(model, ["per_layer_input_gate"])) == 14
    assert resolve_targets(model, "embedders") == ["embed_audio.embedding_projection"]
    assert len(resolve_targets(model, "all")) == 24 + 6 + 1
    assert resolve_targets(model, "layers.3.q_proj, q_proj") == resolve_targets(model, "q_proj")


@pytest.mark.parametrize(
    "target,hint", [("q_porj", "q_proj"), ("decodr", "decoder"), ("proj", "q_proj"), ("vision", "known: decoder")]
)
def test_unknown_target_lists_close_names(target, hint):
    with pytest.raises(InputError) as caught:
        resolve_targets(Toy(), target)
    assert repr(target) in str(caught.value) and "\n" not in str(caught.value)
    assert hint in str(caught.value)


def test_adapter_starts_as_identity_and_lies_inside_the_clips():
    model, x = Toy(), mx.random.normal((5, 6))
    before = model(x)
    apply_lora(model, "all", rank=3)
    assert mx.array_equal(before, model(x))
    assert isinstance(model.audio_tower.layers[0].q_proj.linear, LoRALinear)
    randomise(model)
    assert mx.max(model.audio_tower.layers[0].q_proj(x)).item() <= 0.3 + 1e-7  # a clip around the sum
    assert not mx.array_equal(before, model(x))


def test_only_adapters_train_and_seed_decides():
    from mlx.utils import tree_flatten

    a, b, c = Toy(), Toy(), Toy()
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        apply_lora(model, "all", rank=3, seed=seed)
    names = {k for k, _ in tree_flatten(a.trainable_parameters())}
    assert names == set(lora_parameters(a)) and len(names) == 62
    pa, pb, pc = lora_parameters(a), lora_parameters(b), lora_parameters(c)
    assert all(mx.array_equal(pa[k], pb[k]) for k in pa)
    assert not any(mx.array_equal(pa[k], pc[k]) for k in pa if k.endswith("lora_a"))
    drawn = np.concatenate([np.array(w).ravel() * np.sqrt(w.shape[0]) for k, w in pa.items() if k.endswith("lora_a")])
    assert np.abs(drawn).max() <= 1 and abs(drawn.mean()) < 0.1 and abs(drawn.std() - 3**-0.5) < 0.05


def test_forward_and_gradients_equal_peft():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"])).double()
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    for i in (0, 2):
        model.layers[i].weight = mx.array(net[i].base_layer.weight.detach().float().numpy())
        model.layers[i].bias = mx.array(net[i].base_layer.bias.detach().float().numpy())
        model.layers[i] = LoRALinear(model.layers[i], 4, 6.0)
    weights = {}
    for i in (0, 2):
        for leaf, mine in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            w = getattr(net[i], leaf)["default"].weight
            torch.nn.init.normal_(w)
            weights[f"layers.{i}.{mine}"] = mx.array(w.detach().float().numpy().T)
    set_lora_parameters(model, weights)
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    wanted = wrapped(torch.tensor(x).double())
    wanted.square().sum().backward()
    model.freeze()
    for layer in lora_layers(model).values():
        layer.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
    assert np.allclose(np.array(model(mx.array(x))), wanted.detach().numpy(), atol=1e-4, rtol=1e-5)
    grads = nn.value_and_grad(model, lambda m: mx.sum(m(mx.array(x)) ** 2))(model)[1]
    for i in (0, 2):
        for leaf, mine in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            want = getattr(net[i], leaf)["default"].weight.grad.numpy().T
            got = np.array(grads["layers"][i][mine])
            assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


def test_dropout_follows_its_key_alone():
    layer = LoRALinear(nn.Linear(400, 8), 4, 4.0, dropout=0.25)
    layer.lora_b = mx.random.normal((4, 8))
    x = mx.ones((50, 400))
    clean = layer(x)

    def masked(seed):
        with dropout_keys([layer], mx.random.key(seed)):
            return layer(x)

    assert mx.array_equal(masked(1), masked(1)) and not mx.array_equal(masked(1), masked(2))
    assert mx.array_equal(layer(x), clean)  # outside the block there is no dropout
    many = mx.stack([masked(s) for s in range(40)]).mean(axis=(0, 1))
    assert mx.allclose(many, clean.mean(axis=0), atol=0.05 * mx.abs(clean).max().item())  # mean unchanged


def test_bfloat16_base_keeps_its_dtype():
    model = Toy()
    model.set_dtype(mx.bfloat16)
    apply_lora(model, "all", rank=2)
    randomise(model)
    assert model(mx.ones((2, 6), dtype=mx.bfloat16)).dtype == mx.bfloat16
    assert {w.dtype for w in lora_parameters(model).values()} == {mx.float32}


def test_saved_adapter_loads_to_bit_equal_outputs(tmp_path):
    model, x = Toy(), mx.random.normal((5, 6))
    base = Toy()
    base.update(model.parameters())
    apply_lora(model, "decoder,audio.q_proj", rank=3, alpha=5.0, dropout=0.1)
    randomise(model)
    save_adapter(model, tmp_path / "a", base_model="some/model", targets="decoder,audio.q_proj")
    assert load_adapter(base, tmp_path / "a") == list(lora_weights(model))
    assert mx.array_equal(base(x), model(x))
    assert lora_layers(base)["audio_tower.layers.0.q_proj.linear"].scale == 5.0 / 3
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_mlx_lm_reads_our_adapter(tmp_path):
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    model, x = Toy(), mx.random.normal((5, 6))
    theirs = Toy()
    theirs.update(model.parameters())
    apply_lora(model, "all", rank=3, alpha=5.0)
    randomise(model)
    save_adapter(model, tmp_path)
    utils.load_adapters(theirs, str(tmp_path))
    assert mx.allclose(theirs(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "damage,word",
    [
        (lambda w, c: w.pop("language_model.layers.3.q_proj.lora_b"), "layers.3.q_proj.lora_b is missing"),
        (lambda w, c: w.update({"x.lora_a": mx.zeros((2, 2))}), "x.lora_a belongs to no layer"),
        (lambda w, c: w.update({"language_model.layers.3.q_proj.lora_b": mx.zeros((3, 9))}), "shape"),
        (lambda w, c: c["lora_parameters"]["keys"].append("language_model.layers.99.q_proj"), "layers.99.q_proj"),
        (lambda w, c: c.update(fine_tune_type="full"), "full"),
        (lambda w, c: c.pop("lora_parameters"), "adapter_config.json"),
    ],
)
def test_bad_adapter_is_one_clear_line_and_changes_nothing(tmp_path, damage, word):
    model = Toy()
    apply_lora(model, "decoder", rank=3)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = dict(mx.load(str(tmp_path / "adapters.safetensors")))
    damage(weights, config)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = Toy()
    with pytest.raises(InputError, match=re.escape(word)) as caught:
        load_adapter(base, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not lora_layers(base)


def test_adapter_on_an_adapter_is_refused(tmp_path):
    model = Toy()
    apply_lora(model, "decoder", rank=3)
    assert len(linear_paths(model)) == 12 * 3 + 6 + 1
    with pytest.raises(InputError, match="already has an adapter"):
        apply_lora(model, "q_proj", rank=3)
    with pytest.raises(InputError, match="no adapter here"):
        load_adapter(Toy(), tmp_path / "nothing")


def test_dora_equals_peft():
    """Output and the gradients of all three tensors, with a bias and without; float64 in torch."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    r = np.random.default_rng(3)
    for bias in (False, True):
        linear = nn.Linear(12, 7, bias=bias)
        layer = DoRALinear(linear, rank=3, alpha=6.0)
        x, way = (r.standard_normal(shape).astype(np.float32) for shape in ((5, 12), (5, 7)))
        a, b = r.standard_normal((12, 3)), r.standard_normal((3, 7))
        m = 0.5 + r.random(7)
        assert np.allclose(np.array(layer(mx.array(x))), np.array(linear(mx.array(x))), atol=1e-6)  # starts as the base
        layer.lora_a, layer.lora_b, layer.m = (mx.array(v.astype(np.float32)) for v in (a, b, m))

        holder = torch.nn.Sequential(torch.nn.Linear(12, 7, bias=bias)).double()
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True), holder)
        theirs = holder[0].double()
        with torch.no_grad():
            theirs.base_layer.weight.copy_(torch.tensor(np.array(linear.weight)))
            if bias:
                theirs.base_layer.bias.copy_(torch.tensor(np.array(linear.bias)))
            theirs.lora_A["default"].weight.copy_(torch.tensor(a.T))
            theirs.lora_B["default"].weight.copy_(torch.tensor(b.T))
            theirs.lora_magnitude_vector["default"].weight.copy_(torch.tensor(m))
        out = theirs(torch.tensor(x).double())
        (out * torch.tensor(way)).sum().backward()
        assert np.allclose(np.array(layer(mx.array(x))), out.detach().numpy(), atol=1e-5)

        freeze_base(layer_holder := nn.Sequential(layer))

        def loss(trained, holder=layer_holder, x=x, way=way):
            holder.update(trained)
            return (holder(mx.array(x)) * mx.array(way)).sum()

        [grads] = mx.grad(loss)(layer_holder.trainable_parameters())["layers"]
        expected = {
            "lora_a": theirs.lora_A["default"].weight.grad.numpy().T,
            "lora_b": theirs.lora_B["default"].weight.grad.numpy().T,
            "m": theirs.lora_magnitude_vector["default"].weight.grad.numpy(),
        }
        assert {name for name, g in grads.items() if isinstance(g, mx.array)} == set(expected)
        for name, value in expected.items():
            assert np.linalg.norm(np.array(grads[name]) - value) <= 1e-5 * np.linalg.norm(value), (name, bias)


@pytest.mark.parametrize("bits", [None, 4])
def test_dora_file_round_trip(tmp_path, bits):
    """Saved, loaded and the same, on float and on packed linears; the file says that it is DoRA's."""

    def base():
        mx.random.seed(1)
        model = Stack(lambda i, o: nn.Linear(64, 64, bias=False), 2)
        if bits:
            nn.quantize(model, group_size=32, bits=bits)
        return model

    model, x = base(), mx.random.normal((5, 64))
    before = model(x)
    apply_lora(model, ["q_proj", "down_proj"], rank=3, dora=True)
    assert np.allclose(np.array(before), np.array(model(x)), atol=1e-4)
    randomise(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    again = base()
    load_adapter(again, tmp_path)
    assert all(isinstance(layer, DoRALinear) for layer in lora_layers(again).values())
    assert mx.array_equal(again(x), model(x)) and not np.allclose(np.array(before), np.array(again(x)), atol=0.1)
