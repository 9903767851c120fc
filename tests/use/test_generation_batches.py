"""Rows that leave and join, prompts read in parts: no answer changes by it, for every family."""

import itertools

import numpy as np
import pytest
import tiny
import tiny_gemma3
import tiny_gemma3n
import torch

from gemma_mlx import decoding
from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import Example, Text, Turn, Video
from gemma_mlx.data.processor import Processor
from gemma_mlx.decoding import Row, Running, Stateless, cuts, decode, read
from gemma_mlx.errors import InputError
from gemma_mlx.generation import answer_ids, answers, as_example, generate, greedy
from gemma_mlx.models.load import load_model
from gemma_mlx.models.tables import tables_on_disk
from gemma_mlx.sampling import Settings

NO_TOKEN = -2


def livelier(reference, folder):
    """A random model repeats itself; larger logits give each step another likeliest token; slots never win."""
    text = reference.model.language_model if hasattr(reference.model, "language_model") else reference.model
    with torch.no_grad():
        text.norm.weight.mul_(4)
        text.embed_tokens.weight[490:] = 0
    reference.save_pretrained(folder)
    return load_model(folder, dtype="float32")


def gemma4(folder, **changes):
    return livelier(tiny.make(folder, seed=4, **changes), folder), tiny.inputs


def gemma3(folder):
    def inputs(kind, seed, n_text, **_):
        return tiny_gemma3.rows(n_text, seed=seed)

    return livelier(tiny_gemma3.make(folder, seed=4), folder), inputs


def gemma3n(folder):
    return livelier(tiny_gemma3n.make(folder, seed=4), folder), tiny_gemma3n.inputs


FAMILIES = {
    "E2B": (gemma4, {}, ("text", "image", "audio", "image+audio")),
    "31B": (gemma4, tiny.larger(), ("text", "image")),
    "26B": (gemma4, tiny.larger(tiny.EXPERTS), ("text", "image")),
    "3n": (gemma3n, {}, ("text", "image", "audio")),
    "3": (gemma3, {}, ("text",)),
}


SLOW = ("26B", "3n", "31B")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
def family(request, tmp_path_factory):
    """(model, prompts as batches of one row each, of 4 to 60 tokens, every kind of medium)."""
    torch.set_num_threads(1)
    make, changes, kinds = FAMILIES[request.param]
    model, inputs = make(tmp_path_factory.mktemp(request.param), **changes)
    prompts = []
    for seed, n_text in enumerate((4, 30, 9, 17, 5, 23)):
        found = inputs(kinds[seed % len(kinds)], seed=seed, n_text=n_text)
        labels = np.full_like(found["input_ids"], IGNORE_INDEX)
        prompts.append(Batch(**{"labels": labels, "mm_token_type_ids": np.zeros_like(labels), **found}))
    return model, prompts


def alone(model, prompts, lengths):
    return [answer_ids(model, prompt, [NO_TOKEN], n)[0] for prompt, n in zip(prompts, lengths, strict=True)]


def test_rows_that_leave_and_join(family):
    """Three at a time, of 7 to 40 tokens: each place is taken anew while others are in the midst of their answer."""
    model, prompts = family
    lengths = [7, 40, 13, 30, 9, 21]
    expected = alone(model, prompts, lengths)
    assert len({token for answer in expected for token in answer}) > 15, "answers should not be one token repeated"
    sizes = []

    def start(fresh):
        running = None
        for i in fresh:
            cache = model.make_cache()
            row = Row(i, prompts[i].input_ids.shape[1], lengths[i], frozenset())
            begun = Running(model, [row], cache, Stateless(greedy), read(model, prompts[i], cache))
            running = begun if running is None else (running.join(begun), running)[1]
        sizes.append(len(fresh))
        return running

    found = {row.index: row.ids for row in decode(start, iter(range(6)), 3)}
    assert [found[i] for i in range(6)] == expected
    assert sizes[0] == 3 and len(sizes) > 2


def test_prompts_read_in_parts(family, monkeypatch):
    """Of 6 columns, less than the sliding window of 8, and of 11."""
    model, prompts = family
    expected = alone(model, prompts, [20] * 6)
    for most in (6, 11):
        monkeypatch.setattr(decoding, "PART", {"cpu": most, "gpu": most})
        assert alone(model, prompts, [20] * 6) == expected


def test_cuts_are_never_inside_a_picture():
    r = np.random.default_rng(0)
    for _ in range(200):
        types = np.repeat(r.integers(0, 4, (2, 12)), r.integers(1, 6, 12), axis=1)
        most, columns = int(r.integers(1, 20)), types.shape[1]
        edges = cuts(types, most)
        assert edges[0] == 0 and edges[-1] == columns and all(a < b for a, b in itertools.pairwise(edges))
        vision = np.isin(types, (1, 2))
        inside = [c for c in range(1, columns) if (vision[:, c - 1] & vision[:, c]).any()]
        assert not set(edges) & set(inside)
        allowed = [c for c in range(columns + 1) if c not in inside]
        for a, b in itertools.pairwise(edges):
            between = [c for c in allowed if a < c < b]
            assert b - a <= most or not between, "a part is longer only where a picture is"
            assert b == columns or not [c for c in allowed if b < c <= a + most], "no part is shorter than need be"


@pytest.fixture(scope="module")
def ready(checkpoint_folder):
    return load_model(checkpoint_folder, dtype="float32"), Processor(checkpoint_folder)


def test_batches_of_any_size_give_the_same_answers(ready, rows):
    """Ten rows of sound, pictures and text from a file, greedy and sampled."""
    model, processor = ready
    examples = [row for row in read_examples(rows / "media.csv") if not row.completion]
    examples += [as_example(f"Repeat: {word}") for word in ("alfa", "bravo charlie", "delta")]
    for sampling in ({}, {"temperature": 1.0, "top_p": 0.95, "seed": 3}, {"repetition_penalty": 1.3}):
        settings = Settings(max_tokens=12, **sampling)
        one = dict(answers(model, processor, examples, settings, batch_size=1))
        found = dict(answers(model, processor, examples, settings, batch_size=4))
        assert found == one and sorted(found) == list(range(len(examples)))
        assert generate(model, processor, examples, 12, batch_size=3, **sampling) == [
            one[i].text for i in range(len(examples))
        ]


def test_what_an_answer_tells(ready):
    model, processor = ready
    question = as_example("Repeat: alfa")
    [(_, free)] = answers(model, processor, [question], Settings(max_tokens=12))
    prompt = processor.prompt(question)
    assert free.finish == "length" and len(free.ids) == 12 and free.prompt_tokens == len(prompt)
    assert free.text == processor.decode(free.ids)
    end = free.ids[5]
    processor = Processor(processor.folder)
    processor.tokenizer.eos_ids = (end,)
    [(_, ended)] = answers(model, processor, [question], Settings(max_tokens=12))
    assert ended.finish == "stop" and ended.ids == free.ids[: free.ids.index(end)]


def test_bad_rows_and_sizes(ready, tmp_path):
    model, processor = ready
    with pytest.raises(InputError, match="batch_size is 0"):
        list(answers(model, processor, [as_example("hi")], batch_size=0))
    missing = Example((Turn("user", (Text("Look."), Video(tmp_path / "none.mp4"))),), where="rows.csv:7")
    with pytest.raises(InputError, match=r"rows\.csv:7"):
        list(answers(model, processor, [as_example("hi"), missing]))
    assert list(answers(model, processor, [])) == []


def test_a_table_on_disk_changes_no_answer(checkpoint_folder):
    """Per-layer rows are read from the file at each step, of three rows at once."""
    processor, examples = Processor(checkpoint_folder), [as_example(f"Repeat: {'alfa ' * n}") for n in (1, 4, 2, 6)]
    settings = Settings(max_tokens=12)
    whole, disk = (load_model(checkpoint_folder, dtype="float32", disk_bytes=n) for n in (1 << 40, 0))
    assert tables_on_disk(disk) and not tables_on_disk(whole)
    assert dict(answers(disk, processor, examples, settings, 3)) == dict(answers(whole, processor, examples, settings))


def test_videos_beside_each_other(ready, tmp_path):
    """Videos of other numbers of frames beside text alone: as one by one."""
    av = pytest.importorskip("av")
    model, processor = ready
    r, examples = np.random.default_rng(0), [as_example("Repeat: alfa")]
    for count in (3, 9, 6):
        path = tmp_path / f"{count}.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=3)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(count):
                shown = np.repeat(np.repeat(r.integers(0, 255, (3, 4, 3), np.uint8), 16, 0), 16, 1)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            file.mux(stream.encode())
        examples.append(Example((Turn("user", (Text("Look."), Video(path))),), where=path.name))
    settings = Settings(max_tokens=10)
    one = dict(answers(model, processor, examples, settings, batch_size=1))
    assert len({answer.prompt_tokens for answer in one.values()}) == 4
    assert dict(answers(model, processor, examples, settings, batch_size=3)) == one


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.5}])
def test_sampled_rows_that_end_at_other_times(checkpoint_folder, sampling):
    """Every ninth token ends an answer: draws and penalties stay with their rows as others leave and join."""
    model, processor = load_model(checkpoint_folder, dtype="float32"), Processor(checkpoint_folder)
    processor.tokenizer.eos_ids = tuple(range(0, model.spec.text.vocab_size, 9))
    examples = [as_example(f"Repeat: {'alfa ' * n}") for n in (1, 4, 2, 6, 3, 5, 7, 8)]
    settings = Settings(max_tokens=30, temperature=1.0, seed=3, **sampling)
    one = dict(answers(model, processor, examples, settings, 1))
    assert len({len(answer.ids) for answer in one.values()}) > 3
    assert dict(answers(model, processor, examples, settings, 3)) == one
