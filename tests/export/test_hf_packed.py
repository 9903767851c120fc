"""Merged exports off and onto packed weights: QLoRA runs, MLX conversions, GGUF files; trees that are packed again."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gguf
from adapter_pairs import adapted, batches, difference, ours, randomise
from conversions import convert, unpack
from merged_pairs import Bases, fast, load_checked, tensors

from gemma_mlx.data.processor import Processor
from gemma_mlx.exporting.run import export
from gemma_mlx.lora import apply_lora, lora_layers, save_adapter
from gemma_mlx.merging import merge
from gemma_mlx.models.load import load, load_model
from gemma_mlx.models.names import stored_name
from gemma_mlx.models.quantize import quantize_model, quantized_paths

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp)


def largest(name, model, reference):
    found = 0.0
    for inputs in batches(name).values():
        expected = tiny.reference_logits(reference, inputs)
        assert expected.std() > 0.2
        found = max(found, difference(model(**inputs), expected, inputs))
    return found


@pytest.mark.parametrize(("name", "bits"), fast([("Gemma 3", 6)], ("E2B", 4), ("26B", 8), ("Gemma 3", 6)))
def test_a_run_on_a_base_that_was_packed_on_load(name, bits, bases, tmp_path):
    """The adapter remembers the bits: what is merged into is what the packed weights stand for."""
    base = load_model(bases(name), quantize=bits)
    apply_lora(base, "all" if name != "26B" else "all,router.proj", 3, 6.0)
    randomise(base)
    save_adapter(base, tmp_path / "adapter", options={"quantize": bits})
    out = export(model=bases(name), adapter=tmp_path / "adapter", out=tmp_path / "out", quiet=True)
    model, _ = load(bases(name), adapter=tmp_path / "adapter")
    assert quantized_paths(model)
    found = largest(name, model, load_checked(out))
    print(f"QLoRA {name}, {bits} bits: {found:.1e}")
    assert found <= TOLERANCE
    layers, after = lora_layers(base), tensors(out)
    path = next(p for p, layer in layers.items() if "scales" in layer.linear)
    layer = layers[path]
    w = unpack(layer.linear.weight, layer.linear.scales, layer.linear.biases, bits)
    expected = w + 2.0 * (np.array(layer.lora_a, np.float64) @ np.array(layer.lora_b, np.float64)).T
    assert np.abs(np.array(after[stored_name(f"{path}.weight")]) - expected).max() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("E2B", 4), ("26B", 4), ("12B", 8), ("3n", 8), ("E2B", None)])
def test_a_conversion_for_mlx_comes_out_as_transformers_has_it(name, bits, bases, tmp_path):
    weights = convert(bases(name), tmp_path / "mlx", bits)
    model, folder = adapted(name, tmp_path / "mlx", tmp_path / "adapter")
    out = export(model=tmp_path / "mlx", adapter=folder, out=tmp_path / "out", quiet=True)
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config) and config["dtype"] == "float32"
    reference = load_checked(out)
    found = largest(name, model, reference)
    print(f"conversion {name}, {bits} bits: {found:.1e}")
    assert found <= TOLERANCE
    layers, after = lora_layers(model), tensors(out)
    for path, value in weights.items():  # unpacked by numpy
        tensor = stored_name(path if path in after else f"{path}.weight", model.spec.unified)
        if path in layers:
            value = value + 2.0 * (np.array(layers[path].lora_a) @ np.array(layers[path].lora_b)).T
        if tensor in after:  # but for keys and values that no layer has
            assert np.abs(np.array(after[tensor]) - value).max() < 2e-6, tensor


def test_a_base_of_a_gguf_file(tmp_path):
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>\n{% endfor %}"
    reference = tiny_gemma3.make(tmp_path / "hf")
    file = tiny_gguf.write(tmp_path / "m.gguf", reference, {"attn_q.weight": "Q8_0"}, template=template)
    model, folder = adapted("Gemma 3", file, tmp_path / "adapter")
    out = export(model=file, adapter=folder, out=tmp_path / "out", dtype="float32", quiet=True)
    found = largest("Gemma 3", model, load_checked(out))
    print(f"GGUF: {found:.1e}")
    assert found <= TOLERANCE
    tokenizer, own = AutoTokenizer.from_pretrained(out), Processor(file).tokenizer
    text = "Repeat alfa  bravo\n<end_of_turn>"
    assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "alfa"}], tokenize=False).startswith(
        "<bos><start"
    )
    assert tokenizer.encode("alfa")[0] == tokenizer.bos_token_id == 2 and tokenizer.eos_token_id == own.eos_id
    assert Processor(out).eos_ids == own.eos_ids


PACKED = [(name, bits) for name in ("E2B", "26B", "Gemma 3", "3n", "12B") for bits in (4, 6, 8)]


@pytest.mark.parametrize(("name", "bits"), fast([("26B", 4)], *PACKED))
def test_packed_again_is_the_merged_model_quantized(name, bits, bases, tmp_path):
    model, folder = adapted(name, bases(name), tmp_path / "adapter")
    merge(model)
    quantize_model(model, bits)
    out = export(model=bases(name), adapter=folder, out=tmp_path / "out", bits=bits, quiet=True)
    again = ours(name, out)
    assert quantized_paths(again) and len(quantized_paths(again)) >= len(quantized_paths(model))
    inputs = batches(name)["media" if name != "Gemma 3" else "text"]
    found = difference(model(**inputs), again(**inputs), inputs)
    print(f"packed {name}, {bits} bits: {found:.1e}")
    assert found <= TOLERANCE


@pytest.mark.parametrize("name", fast(["Gemma 3"], "E2B", "26B", "Gemma 3", "3n", "31B"))
def test_mlx_lm_reads_the_packed_tree(name, bases, tmp_path):
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as mlx_lm_load

    _, folder = adapted(name, bases(name), tmp_path / "adapter")
    out = export(model=bases(name), adapter=folder, out=tmp_path / "out", bits=8, quiet=True)
    config = json.loads((out / "config.json").read_text())
    for_mlx_lm(out, config)
    theirs, _ = mlx_lm_load(out)
    ids = np.arange(3, 60)[None] * 7 % 240
    (out / "config.json").write_text(json.dumps(config))
    cache = make_prompt_cache(theirs)  # without one its Gemma 3n shares no keys and values
    found = np.abs(np.array(theirs(mx.array(ids), cache=cache)) - np.array(ours(name, out)(input_ids=ids))).max()
    print(f"mlx-lm {name}: {found:.1e}")
    assert found <= TOLERANCE


def for_mlx_lm(folder, config):
    """mlx-lm reads the size of the vocabulary beside the parts' configs; the published ones have its default."""
    if "text_config" in config:
        more = {"vocab_size": config["text_config"]["vocab_size"]}
        (folder / "config.json").write_text(json.dumps(config | more))


@pytest.mark.parametrize("dtype", fast(["bfloat16"], "bfloat16", "float32"))
def test_bfloat16_is_rounded_once(dtype, bases, tmp_path):
    """A bfloat16 base: what comes out is the float32 sum rounded once, and all else the base's bytes."""
    base = tmp_path / "base"
    shutil.copytree(bases("E2B"), base)
    halves = {name: x.astype(mx.bfloat16) for name, x in tensors(base).items()}
    mx.eval(halves)
    mx.save_safetensors(str(base / "model.safetensors"), halves, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    model, folder = adapted("E2B", base, tmp_path / "adapter")
    options = {"dtype": dtype} if dtype == "float32" else {}
    out = export(model=base, adapter=folder, out=tmp_path / "out", quiet=True, **options)
    before, after, layers = tensors(base), tensors(out), lora_layers(model)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    for name, value in after.items():
        path = name.removesuffix(".weight")
        assert str(value.dtype).endswith(dtype)
        if path in layers:
            a, b = (np.array(x, np.float64) for x in (layers[path].lora_a, layers[path].lora_b))
            exact = np.array(before[name].astype(mx.float32), np.float64) + 2.0 * (a @ b).T
            spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7) if dtype == "bfloat16" else 0.0
            off = np.abs(np.array(value.astype(mx.float32)) - exact)
            assert (off <= spacing / 2 + 1e-6).all(), name  # half a step, and float32's own
        else:
            assert mx.array_equal(value.astype(mx.bfloat16), before[name]).item()
