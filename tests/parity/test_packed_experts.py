"""Mixture of experts on quantized bases: packed on load and read from conversions, against transformers and PEFT with
the same weights unpacked by numpy."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from conversions import change_tensor, convert, replaced, unpack, unpacked
from mlx.utils import tree_flatten
from parity_cases import make_batch, random_lora, relative_differences
from parity_pairs import Pair, copy_lora, our_gradients

from gemma_mlx.errors import InputError
from gemma_mlx.inspection import examine
from gemma_mlx.lora import apply_lora, linear_shape, lora_layers
from gemma_mlx.models.gemma4.experts import SORT_FROM
from gemma_mlx.models.load import load_model, save_model
from gemma_mlx.models.quantize import Packed, dequantize_model, quantize_model, quantized_paths
from gemma_mlx.models.stacks import ExpertStacks, PackedStack, Stack
from gemma_mlx.torch_backend import TorchBackend

TOLERANCE, BOUND = 2e-4, 1e-3
TOKENS = {"sorted": 40, "unsorted": 15}  # times three experts a token
SHAPE = tiny.larger({
    **tiny.EXPERTS, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
})  # fmt: skip


def make(folder, **changes):
    return tiny.make(folder, seed=2, **{**SHAPE, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    torch.set_num_threads(1)
    make(folder)
    return folder


def text(tokens):
    ids = np.random.default_rng(tokens).integers(3, 490, (1, tokens))
    assert (3 * tokens >= SORT_FROM) == (tokens == TOKENS["sorted"])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "mm_token_type_ids": np.zeros_like(ids)}


def compare(reference, ours, what):
    for name, batch in {**{k: text(n) for k, n in TOKENS.items()}, "picture": tiny.inputs("image")}.items():
        expected = tiny.reference_logits(reference, batch)
        difference = np.abs(np.array(ours(**batch)) - expected).max()
        print(f"{what}, {name}: {difference:.1e}")
        assert expected.std() > 0.2 and difference <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packed_on_load_equals_transformers_with_the_unpacked_weights(checkpoint, bits, tmp_path):
    weights = unpacked(checkpoint, bits)
    ours = load_model(checkpoint, quantize=bits)
    forms = quantized_paths(ours)
    assert set(forms) == set(weights)
    assert {f for p, f in forms.items() if p.endswith("experts.gate_up_proj")} == {Packed(bits, 64)}
    assert {f for p, f in forms.items() if p.endswith("experts.down_proj")} == {Packed(bits, 32)}
    assert sum(".experts." in path for path in forms) == 8 and not any("router" in path for path in forms)
    assert not tree_flatten(ours.trainable_parameters())
    compare(replaced(make(tmp_path / "made"), weights, tmp_path / "unpacked"), ours, f"{bits} bits")


@pytest.mark.parametrize(("bits", "special"), [(4, ()), (8, ()), (4, ("up_proj", "experts.switch_glu.down_proj"))])
def test_conversion_equals_transformers_with_the_unpacked_weights(checkpoint, bits, special, tmp_path):
    """Gate and up apart, each with its own bits; routers packed at 8 bits."""
    weights = convert(checkpoint, tmp_path / "mlx", bits, special)
    ours = load_model(tmp_path / "mlx")
    forms = quantized_paths(ours)
    experts = {path.partition(".experts.")[2]: form for path, form in forms.items() if ".experts." in path}
    other = 8 if special else bits
    assert experts == {"gate_proj": Packed(bits, 32), "up_proj": Packed(other, 32), "down_proj": Packed(other, 32)}
    assert {form.bits for path, form in forms.items() if path.endswith("router.proj")} == {8}
    compare(replaced(make(tmp_path / "made"), weights, tmp_path / "unpacked"), ours, f"conversion {bits} {special}")


@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_lm_converts_computes_what_mlx_lm_computes(bits, tmp_path):
    """Not our idea of a conversion, but its own: names, split experts, routers at 8 bits in groups of 64."""
    from mlx_lm import utils

    make(tmp_path / "float", **tiny.larger({**SHAPE["text"], "moe_intermediate_size": 64, "intermediate_size": 128},
                                           vision=None))  # fmt: skip
    path = tmp_path / "float" / "config.json"
    path.write_text(json.dumps({"vocab_size": tiny.VOCAB, **json.loads(path.read_text())}))  # it looks there
    theirs, config = utils.quantize_model(*utils.load_model(tmp_path / "float", lazy=True), 64, bits)
    utils.save_model(tmp_path / "mlx", theirs)
    utils.save_config(config, tmp_path / "mlx" / "config.json")
    with pytest.warns(UserWarning, match="vocab_size"):
        ours = load_model(tmp_path / "mlx")
    forms = {path.partition(".layers.2.")[2]: form for path, form in quantized_paths(ours).items()}
    assert {forms[f"experts.{name}_proj"] for name in ("gate", "up", "down")} == {Packed(bits, 64)}
    assert forms["router.proj"] == Packed(8, 64)
    ids = mx.array(text(TOKENS["sorted"])["input_ids"])
    difference = mx.abs(ours(input_ids=ids) - theirs(ids)).max().item()
    print(f"mlx-lm's conversion, {bits} bits: {difference:.1e}")
    assert difference <= TOLERANCE


def test_float_conversion_is_the_checkpoint_again(checkpoint, tmp_path):
    """Split and not packed: joined on load, saved in transformers' layout, and quantized as the original is."""
    assert not convert(checkpoint, tmp_path / "mlx", None)
    expected, found = (dict(tree_flatten(load_model(f).parameters())) for f in (checkpoint, tmp_path / "mlx"))
    assert set(expected) == set(found) and all(mx.array_equal(expected[n], found[n]).item() for n in expected)
    save_model(load_model(tmp_path / "mlx"), tmp_path / "saved")
    saved, original = (mx.load(str(f / "model.safetensors")) for f in (tmp_path / "saved", checkpoint))
    assert set(saved) == set(original) and all(mx.array_equal(saved[n], original[n]).item() for n in saved)
    packed = dict(tree_flatten(load_model(tmp_path / "mlx", quantize=4).parameters()))
    again = dict(tree_flatten(load_model(checkpoint, quantize=4).parameters()))
    assert set(packed) == set(again) and all(mx.array_equal(packed[n], again[n]).item() for n in packed)


def test_tensors_of_a_packed_model_load_as_they_are(checkpoint, tmp_path):
    """Without switch_glu, gate and up in one stack."""
    model = load_model(checkpoint, quantize=4)
    saved = dict(tree_flatten(model.parameters()))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), saved)
    ours = load_model(tmp_path)
    assert quantized_paths(ours) == quantized_paths(model)
    batch = text(TOKENS["sorted"])
    assert mx.array_equal(ours(**batch), model(**batch)).item()


def test_one_half_packed_and_the_other_not(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "mlx", 8)
    whole, ids = load_model(tmp_path / "mlx"), text(TOKENS["sorted"])["input_ids"]
    mx.eval(whole.parameters())  # the file is written anew below
    file = str(tmp_path / "mlx" / "model.safetensors")
    tensors = dict(mx.load(file))
    name = "language_model.model.layers.1.experts.switch_glu.up_proj"
    packed = [tensors.pop(f"{name}.{leaf}") for leaf in ("weight", "scales", "biases")]
    tensors[f"{name}.weight"] = mx.dequantize(*packed, 32, 8)
    mx.eval(tensors)
    mx.save_safetensors(file, tensors)
    ours = load_model(tmp_path / "mlx")
    left = set(quantized_paths(whole)) - set(quantized_paths(ours))
    assert left == {"model.language_model.layers.1.experts.up_proj"}
    assert mx.abs(ours(input_ids=ids) - whole(input_ids=ids)).max().item() <= TOLERANCE
    dequantize_model(ours)
    save_model(ours, tmp_path / "saved")
    tensors["language_model.model.layers.1.experts.gate_up_proj.weight"] = mx.zeros((8, 64, 64))
    mx.save_safetensors(file, tensors)
    with pytest.raises(InputError, match=r"1 unexpected tensors: .*1\.experts\.gate_up_proj"):
        load_model(tmp_path / "mlx")


@pytest.mark.parametrize("form", ["on load", "conversion"])
def test_dequantized_model_is_the_float_model_of_the_unpacked_weights(checkpoint, form, tmp_path):
    if form == "on load":
        weights, ours = unpacked(checkpoint, 4), load_model(checkpoint, quantize=4)
    else:
        weights, ours = convert(checkpoint, tmp_path / "mlx", 4), load_model(tmp_path / "mlx")
    paths = set(quantized_paths(ours))
    assert set(dequantize_model(ours)) == paths and not quantized_paths(ours)
    own = dict(tree_flatten(ours.parameters()))
    assert set(own) == {n for n, _ in tree_flatten(load_model(checkpoint).parameters())}
    for path, value in weights.items():
        found = own[path if path in own else f"{path}.weight"]
        assert np.abs(np.array(found) - value).max() <= 1e-6, path
    save_model(ours, tmp_path / "saved")


@pytest.mark.parametrize(("bits", "form"), [(4, "on load"), (8, "on load"), (4, "conversion")])
@pytest.mark.parametrize("order", TOKENS)
def test_gradients_of_adapters_equal_peft(checkpoint, bits, form, order, tmp_path):
    """Through packed experts, to adapters below, beside and (where routers are float or packed) on the routers."""
    if form == "on load":
        weights, ours = unpacked(checkpoint, bits), load_model(checkpoint, quantize=bits)
    else:
        weights, ours = convert(checkpoint, tmp_path / "mlx", bits), load_model(tmp_path / "mlx")
    replaced(make(tmp_path / "made"), weights, tmp_path / "unpacked")
    pair = Pair("experts", str(checkpoint), TorchBackend(tmp_path / "unpacked", device="cpu"), ours)
    paths = apply_lora(ours, "all,router.proj", 3, 6.0)
    adapters = random_lora({p: linear_shape(layer.linear) for p, layer in lora_layers(ours).items()}, 3)
    pair.theirs.add_lora(paths, 3, 6.0)
    pair.theirs.set_lora(adapters)
    copy_lora(adapters, ours)
    batch = make_batch([[TOKENS[order] - 1]])
    assert (batch.input_ids.size * 3 >= SORT_FROM) == (order == "sorted")
    expected = pair.theirs.run(batch)
    loss, gradients = our_gradients(ours, batch)
    differences = relative_differences(gradients, expected.gradients)
    worst = max(differences, key=differences.get)
    print(f"{bits} bits {form}, {order}: loss {abs(loss - expected.loss):.1e}, {worst} {differences[worst]:.1e}")
    assert abs(loss - expected.loss) <= 1e-5 and differences[worst] <= BOUND
    moved = [path for path, pair in gradients.items() if all(np.linalg.norm(g) for g in pair)]
    assert sum(path.endswith("router.proj") for path in moved) == 4


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_stack_is_the_unpacked_stack(bits, group):
    """One stack: outputs and the gradient of the input, against numpy in float64, for rows in any order."""
    rng = np.random.default_rng(bits)
    packed = Stack(mx.array(rng.standard_normal((5, 24, 128)).astype(np.float32))).to_quantized(group, bits)
    weight = unpack(packed.weight, packed.scales, packed.biases, bits).astype(np.float64)
    x, which = rng.standard_normal((70, 1, 128)).astype(np.float32), rng.integers(0, 5, 70)
    up = rng.standard_normal((70, 1, 24)).astype(np.float32)
    for order in (np.arange(70), np.argsort(which)):
        experts = which[order]
        run = lambda x: packed(x, mx.array(experts), bool(np.all(np.diff(experts) >= 0)))  # noqa: E731, B023
        (out,), (gradient,) = mx.vjp(run, [mx.array(x)], [mx.array(up)])
        for found, expected in (
            (out, np.einsum("nri,noi->nro", x, weight[experts])),
            (gradient, np.einsum("nro,noi->nri", up, weight[experts])),
        ):
            assert np.linalg.norm(np.array(found) - expected) <= 1e-5 * np.linalg.norm(expected)
        half = packed(mx.array(x).astype(mx.bfloat16), mx.array(experts), False)
        assert half.dtype == mx.bfloat16
        assert np.abs(np.array(half.astype(mx.float32)) - np.array(out)).max() <= 0.01 * np.abs(np.array(out)).max()


def test_packed_stacks_never_train(checkpoint):
    model = load_model(checkpoint, quantize=4)
    model.unfreeze()
    stacks = [m for m in model.modules() if isinstance(m, PackedStack)]
    assert len(stacks) == 8 and not any(tree_flatten(m.trainable_parameters()) for m in stacks)


def test_peak_of_packing_is_a_stack_at_a_time(tmp_path):
    make(tmp_path, **tiny.larger({**SHAPE["text"], "num_experts": 64, "moe_intermediate_size": 128,
                                  "num_hidden_layers": 12, "layer_types": None}))  # fmt: skip
    held = sum(a.nbytes for _, a in tree_flatten(load_model(tmp_path).parameters()))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(tmp_path, quantize=4)
    peak = mx.get_peak_memory() - before
    assert peak < 0.35 * held, (peak, held)
    assert sum(a.nbytes for _, a in tree_flatten(model.parameters())) < 0.25 * held


def test_doctor_counts_experts(checkpoint, tmp_path):
    found = examine(checkpoint)
    experts = sum(a.size for n, a in tree_flatten(load_model(checkpoint).parameters()) if ".experts." in n)
    assert not found.problems and found.parts["experts"].weights == experts
    for bits in (4, 8):
        held = sum(a.nbytes for _, a in tree_flatten(load_model(checkpoint, quantize=bits).parameters()))
        assert sum(part.packed[bits] for part in found.parts.values()) == held
    convert(checkpoint, tmp_path / "mlx", 4)
    found = examine(tmp_path / "mlx")
    assert not found.problems and found.parts["experts"].weights == experts
    assert any(fact.startswith("quantized: ") and "4 matrices of 8 bits" in fact for fact in found.facts)


MISSHAPEN = {  # tensor of a layer's experts -> change, message
    "1.experts.switch_glu.up_proj.weight": (lambda a: a[:, :-8], r"1\.experts\.(switch_glu\.)?up_proj"),
    "1.experts.switch_glu.down_proj.weight": (lambda a: a[:-1], r"1\.experts\.(switch_glu\.)?down_proj"),
    "1.experts.switch_glu.gate_proj.weight": (lambda a: a[..., :5], r"1\.experts\.(switch_glu\.)?gate_proj"),
    "3.experts.switch_glu.gate_proj.weight": (lambda a: None, r"1 missing tensors: .*3\.experts\.gate_proj"),
    "2.experts.switch_glu.down_proj.scales": (lambda a: mx.tile(a, (1, 1, 2)), r"2\.experts\.down_proj.* no packing"),
    "2.experts.switch_glu.gate_proj.biases": (lambda a: a[1:], r"2\.experts\.switch_glu\.gate_proj\.biases has shape"),
}


@pytest.mark.parametrize(("name", "bits"), [(n, b) for n in MISSHAPEN for b in (None, 4) if b or n.endswith("weight")])
def test_misshapen_split_experts_are_one_line(checkpoint, name, bits, tmp_path):
    convert(checkpoint, tmp_path / "mlx", bits)
    change, message = MISSHAPEN[name]
    change_tensor(tmp_path / "mlx", f"language_model.model.layers.{name}", change)
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path / "mlx")
    assert "\n" not in str(error.value)


def test_what_a_packed_model_refuses(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "mlx", 4)
    model = load_model(tmp_path / "mlx")
    with pytest.raises(InputError, match="matrices are quantized"):
        save_model(model, tmp_path / "out")
    with pytest.raises(InputError, match="quantized already"):
        quantize_model(model, 4)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    name = "language_model.model.layers.3.experts.switch_glu.up_proj"
    config["quantization"][name] = {"mode": "nvfp4"}
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"3\.experts\.up_proj is quantized in mode 'nvfp4'"):
        load_model(tmp_path / "mlx")
    assert any(isinstance(m, ExpertStacks) for m in model.modules())
