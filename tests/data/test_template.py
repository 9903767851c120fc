"""Token ids, token types and label mask against transformers' Gemma4Processor on the same files."""

import numpy as np
import pytest
from small_checkpoint import make_folder, reference_processor
from tokenizers import Tokenizer

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.dataset import Dataset, read_examples
from gemma_mlx.data.examples import Audio, Example, Image, Text, Turn
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.template import messages_of, render_conversation, token_spans
from gemma_mlx.errors import InputError
from gemma_mlx.spec import read_spec

ROWS = {
    "transcript": "audio_path,text\nlong.wav,the quick brown fox\n",
    "caption": "image_path,caption\nwide.png,a small red house\n",
    "question": "image_path,question,answer\ntall.png,What is in this picture?,The sun.\n",
    "chat": 'prompt,response\n"Say\n\nhello <b>\n","  the lazy dog\n\ngoes down  "\n',
    "both media": "image_path,audio_path,prompt,text\ntall.png,short.wav,What does it say?,hello é 日本\n",
    "spoken question": "image_path,audio_path,answer,system\nwide.png,long.wav,it jumps,Be brief.\n",
}


def conversation(media):
    """Four rounds: two pictures in one turn, a clip, text alone, two clips, the shorter first, around a picture."""
    wide, tall = Image(media / "wide.png"), Image(media / "tall.png")
    short, long = Audio(media / "short.wav"), Audio(media / "long.wav")
    turns = [
        ("system", Text("You are in the room.")),
        ("user", wide, Text("What is in this "), tall, Text(" picture?")),
        ("model", Text("A house.\n\n\nTwo lines")),
        ("user", Text("Transcribe the speech"), long),
        ("model", Text("  hello everybody\n")),
        ("user", Text("say more")),
        ("model", Text("the dog, the fox")),
        ("user", short, tall, Text("and this?"), long),
        ("model", Text("the sun")),
    ]
    return Example(tuple(Turn(role, parts) for role, *parts in turns), "here:1", "1")


def with_files(messages, example):
    """Messages as transformers wants them: media parts name their files."""
    files = iter(example.media())
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] != "text":
                part["path"] = str(next(files).path)
    return messages


def reference_ids(reference, example, turns=None, **options):
    """(ids, token types) of the conversation through transformers."""
    messages = with_files(messages_of(example.turns if turns is None else turns), example)
    out = reference.apply_chat_template(
        messages, tokenize=True, return_dict=True, processor_kwargs={"max_soft_tokens": 70}, **options
    )
    return out["input_ids"][0], list(out["mm_token_type_ids"][0])


def reference_labels(reference, example):
    """Loss on what follows the generation prompt, through <turn|>, where each prompt is rendered by transformers."""
    ids, _ = reference_ids(reference, example)
    labels = [IGNORE_INDEX] * len(ids)
    close = reference.tokenizer.convert_tokens_to_ids("<turn|>")
    for k, turn in enumerate(example.turns):
        if turn.role == "model":
            before = Example(example.turns[:k])
            start = len(reference_ids(reference, before, add_generation_prompt=True)[0])
            end = ids.index(close, start) + 1
            labels[start:end] = ids[start:end]
    return labels


def check(processor, reference, example):
    sample = processor.sample(example)
    ids, types = reference_ids(reference, example)
    assert sample.input_ids.tolist() == ids
    assert sample.token_types.tolist() == types
    assert sample.labels.tolist() == reference_labels(reference, example)
    prompt = processor.prompt(example)
    before = Example(example.turns[:-1])
    assert prompt.input_ids.tolist() == reference_ids(reference, before, add_generation_prompt=True)[0]
    assert (prompt.labels == IGNORE_INDEX).all()
    return sample


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_reference(table, processor, reference, name):
    (example,) = read_examples(table(ROWS[name]))
    sample = check(processor, reference, example)
    learned = processor.decode(sample.labels[sample.labels != IGNORE_INDEX], skip_special_tokens=False)
    assert learned == example.reference.strip() + "<turn|>"
    assert sample.label_count == (sample.labels != IGNORE_INDEX).sum() > 1


def test_a_conversation_equals_the_reference(media, processor, reference):
    example = conversation(media)
    sample = check(processor, reference, example)
    learned = processor.decode(sample.labels[sample.labels != IGNORE_INDEX], skip_special_tokens=False)
    assert learned == "A house.\n\n\nTwo lines<turn|>hello everybody<turn|>the dog, the fox<turn|>the sun<turn|>"
    assert [len(image.pixels) for image in sample.images] == [9 * n for n in _runs(sample.token_types.tolist(), 1)]
    assert [-(-len(clip) // 4) for clip in sample.clips] == _runs(sample.token_types.tolist(), 3)


def _runs(values, wanted):
    """Lengths of the runs of one value."""
    edges = np.flatnonzero(np.diff(np.array([0, *[v == wanted for v in values], 0], int)))
    return (edges[1::2] - edges[::2]).tolist()


def test_random_conversations_equal_the_reference(media, processor, reference):
    rng = np.random.default_rng(5)
    words = ["the", "fox", "\n", "hello", "é", "日", "  ", "\n\n", "room.", "<b>", "▁", "{{ x }}", "\t"]
    files = [
        Image(media / "wide.png"),
        Image(media / "tall.png"),
        Audio(media / "short.wav"),
        Audio(media / "long.wav"),
    ]
    for _ in range(15):
        turns = [Turn("system", (Text("Be brief."),))] if rng.random() < 0.5 else []
        for _ in range(rng.integers(1, 4)):
            parts = [files[i] for i in rng.integers(0, 4, rng.integers(0, 3))]
            parts.insert(rng.integers(0, len(parts) + 1), Text(" ".join(rng.choice(words, rng.integers(1, 9)))))
            answer = Text("x " + "".join(rng.choice(words, rng.integers(1, 9))))
            turns += [Turn("user", tuple(parts)), Turn("model", (answer,))]
        check(processor, reference, Example(tuple(turns), "here:1"))


def test_loss_on_the_last_turn_alone(media, checkpoint, processor):
    example = conversation(media)
    last = Processor(checkpoint, image_tokens=70, train_on="last").sample(example)
    whole = processor.sample(example)
    assert np.array_equal(last.input_ids, whole.input_ids)
    assert processor.decode(last.labels[last.labels >= 0], skip_special_tokens=False) == "the sun<turn|>"


def test_slots_counted_from_headers(media, processor):
    example = conversation(media)
    whole, light = processor.sample(example), processor.sample(example, with_features=False)
    assert np.array_equal(whole.input_ids, light.input_ids) and np.array_equal(whole.labels, light.labels)
    assert light.images == light.clips == () and len(whole.images) == len(whole.clips) == 3


def test_generation_prompt_with_an_empty_thought(media, thinking_checkpoint):
    """The example is generation prompt + answer + <turn|>; history has no thought, so earlier turns carry no loss."""
    reference, processor = reference_processor(thinking_checkpoint), Processor(thinking_checkpoint, image_tokens=70)
    example = conversation(media)
    sample = processor.sample(example)
    prompt, _ = reference_ids(reference, Example(example.turns[:-1]), add_generation_prompt=True)
    assert processor.decode(prompt[-4:], skip_special_tokens=False).endswith("<channel|>")
    answer = reference.tokenizer.encode("the sun<turn|>\n", add_special_tokens=False)
    assert sample.input_ids.tolist() == prompt + answer
    newline = reference.tokenizer.encode("\n", add_special_tokens=False)
    n = len(answer) - len(newline)
    labels = [IGNORE_INDEX] * len(prompt) + answer[:n] + [IGNORE_INDEX] * len(newline)
    assert sample.labels.tolist() == labels
    assert np.array_equal(processor.prompt(example).input_ids, prompt)
    rendered = render_conversation(example, processor.template)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["the sun<turn|>"]


def test_the_prompt_stays_whole_where_a_token_would_reach_over_its_end(tmp_path):
    """A vocabulary with a token of the header's line break and an answer's first word."""
    folder = make_folder(tmp_path / "odd")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["\nthe"])
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = Processor(folder)
    turns = [Turn("user", (Text("hi"),)), Turn("model", (Text("the sun"),))] * 2
    sample, prompt = processor.sample(Example(tuple(turns))), processor.prompt(Example(tuple(turns)))
    whole = processor.decode(sample.input_ids, skip_special_tokens=False)
    assert sample.input_ids.tolist() != processor.tokenizer.encode(whole)  # there it would have reached over
    assert np.array_equal(sample.input_ids[: len(prompt)], prompt.input_ids)
    learned = processor.tokenizer.encode("the sun<turn|>")
    assert sample.labels[sample.labels != IGNORE_INDEX].tolist() == learned  # the last turn alone


@pytest.mark.parametrize("odd", [(), ("\nthe", "dog<|turn>", " s")])
def test_spans_begin_and_end_where_their_prompts_do(tmp_path, odd):
    """Against the definition: what stands before a cut has the same ids alone as in the whole."""
    folder = make_folder(tmp_path / "odd")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(list(odd))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = Processor(folder).tokenizer
    rng = np.random.default_rng(3)
    pieces = ["<|turn>", "<turn|>", "<eos>", "<|tool_response>", "model", "\n", "\n\n", "the", " dog", " sun", "é"]
    seen = []
    for _ in range(150):
        said = rng.choice(pieces, rng.integers(4, 40))
        text, borders = "".join(said), np.cumsum([0, *map(len, said)])
        cuts = sorted(rng.choice(borders, 2 * rng.integers(1, 3), replace=False).tolist())
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        ids = tokenizer.encode(text)
        alone = {cut: tokenizer.encode(text[:cut]) for cut in cuts}
        fits = {cut: len(head) if ids[: len(head)] == head else None for cut, head in alone.items()}
        expected = [None if None in (fits[a], fits[b]) else (fits[a], fits[b]) for a, b in spans]
        assert token_spans(spans, text, ids, tokenizer) == expected
        seen += expected
    assert 50 < len([span for span in seen if span]) < len(seen)


def test_completion(table, processor):
    text = " Once upon a time \n\n the fox <b> "
    path = table(f'text\n"{text}"\n"<bos>the sun<eos>"\n')
    first, second = read_examples(path)
    sample = processor.sample(first)
    spec, encode = processor.spec.text, processor.tokenizer.encode
    assert sample.input_ids.tolist() == [spec.bos_token_id, *encode(text), spec.eos_token_id]
    assert sample.labels.tolist() == [IGNORE_INDEX, *encode(text), spec.eos_token_id]
    assert processor.sample(second).input_ids.tolist() == encode("<bos>the sun<eos>")
    assert processor.prompt(first).input_ids.tolist() == [spec.bos_token_id]


def test_without_a_template_the_format_is_gemma_4s(tmp_path, media, checkpoint):
    bare = Processor(make_folder(tmp_path / "base", template=None), image_tokens=70)
    given = Processor(checkpoint, image_tokens=70)
    for example in (conversation(media), Example(conversation(media).turns[1:])):
        a, b = bare.sample(example), given.sample(example)
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        assert np.array_equal(bare.prompt(example).input_ids, given.prompt(example).input_ids)


def test_template_in_other_files(tmp_path, checkpoint, media):
    import json

    folder = make_folder(tmp_path / "json", template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}A{{ messages | tojson }}"}))
    example = Example((Turn("user", (Text("<é>"),)),))
    assert processor_text(Processor(folder), example) == '<bos>A[{"role": "user", "content": "<é>"}]'
    (folder / "chat_template.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert processor_text(Processor(folder), example) == "D<eos>"


def processor_text(processor, example):
    return processor.decode(processor.prompt(example).input_ids, skip_special_tokens=False)


def test_transformers_own_rendering_of_odd_templates(reference):
    """Whitespace control, loop controls, generation blocks, dates: the text that transformers renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from gemma_mlx.data.template import ChatTemplate

    template = """{{ bos_token }}
    {% for m in messages %}
      {% if loop.index > 2 %}
        {% break %}
      {% endif %}
    {% generation %}{{ m.role | upper }}{{ m | tojson(indent=2) }}
{% endgeneration %}
    {% endfor %}
{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }} {{ strftime_now('%Y') }} {{ tools is none }}
"""
    messages = [{"role": r, "content": "<&é>"} for r in ("user", "assistant", "user")]
    special = {"bos_token": "<bos>"}
    (expected,), _ = render_jinja_template([messages], chat_template=template, **special)
    assert ChatTemplate(template, special).render(messages, "here") == expected


@pytest.mark.parametrize("token", ["<turn|>", "<|turn>", "<|image|>", "<audio|>", "<eos>", "<pad>"])
def test_control_tokens_in_what_is_said(table, processor, token):
    path = table(f"prompt,response\nhi,ho\nhi,ho {token} ho\n")
    with pytest.raises(InputError, match=r"train.csv:3: the text contains the control token"):
        Dataset(path, processor)
    good, bad = read_examples(path)
    assert len(processor.sample(good))
    with pytest.raises(InputError, match=r"train.csv:3: the text contains the control token"):
        processor.sample(bad)
    with pytest.raises(InputError, match=r"train.csv:2: the text contains the control token <\|image\|>"):
        Dataset(table("text\na <|image|> b\n"), processor)


def test_answers_that_the_template_alters(table, processor):
    path = table("prompt,response\nhi,<|channel>thought\n")
    with pytest.raises(InputError, match=r"train.csv:2: the chat template alters the answer"):
        Dataset(path, processor)[0]


def test_templates_that_refuse_or_do_not_know_media(table, checkpoint):
    refuses = Processor(checkpoint, chat_template="{{ raise_exception('only in verse') }}")
    path = table("image_path,caption\nwide.png,a house\n")
    with pytest.raises(InputError, match=r"train.csv:2: the chat template refuses .*only in verse"):
        Dataset(path, refuses)[0]
    text_only = Processor(checkpoint, chat_template="{% for m in messages %}{% if m.content is string %}"
                          "{{ m.content }}{% endif %}!{% endfor %}")  # fmt: skip
    with pytest.raises(InputError, match=r"csv:2: 1 images, 0 frames and 0 clips, but .* for 0 images"):
        Dataset(path, text_only)[0]
    with pytest.raises(InputError, match="not valid Jinja"):
        Processor(checkpoint, chat_template="{% if %}").prompt(Example((Turn("user", (Text("a"),)),)))
    unsafe = Processor(checkpoint, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match="refuses"):
        unsafe.prompt(Example((Turn("user", (Text("a"),)),)))


def test_a_folder_without_a_tokenizer_will_do_until_text_is_needed(tmp_path):
    folder = make_folder(tmp_path / "bare", template=None)
    (folder / "tokenizer.json").unlink()
    processor = Processor(folder)
    assert processor.pad_id == 0 and processor.image_tokens == 280
    with pytest.raises(InputError, match=r"tokenizer.json: not found"):
        processor.decode([1])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        Processor(folder).decode([1])


def test_a_checkpoint_without_a_tower(tmp_path, media):
    import json

    folder = make_folder(tmp_path / "deaf")
    config = json.loads((folder / "config.json").read_text()) | {"audio_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_spec(folder).audio is None
    with pytest.raises(InputError, match=r"here:1: .*short.wav: this checkpoint has no audio tower"):
        Processor(folder).sample(
            Example((Turn("user", (Audio(media / "short.wav"),)), Turn("model", (Text("a"),))), "here:1")
        )


def test_eos_ids_and_decoding(tmp_path, checkpoint, processor):
    at = processor.tokenizer.id_of
    assert processor.eos_ids == (at("<eos>"), at("<turn|>"), at("<|tool_response>"))
    for content, expected in (('{"eos_token_id": [1, 106, 50]}', (1, 106, 50)), ('{"eos_token_id": 7}', (7,))):
        folder = make_folder(tmp_path / "eos")
        (folder / "generation_config.json").write_text(content)
        assert Processor(folder).eos_ids == expected
    ids = [*processor.tokenizer.encode("the sun é 日本"), at("<turn|>"), at("<|image|>"), at("<pad>")]
    assert processor.decode(ids) == "the sun é 日本"
    assert processor.decode(ids, skip_special_tokens=False) == "the sun é 日本<turn|><|image|><pad>"


def test_image_budget_of_the_checkpoint(tmp_path):
    folder = make_folder(tmp_path / "budget")
    (folder / "preprocessor_config.json").write_text('{"max_soft_tokens": 140}')
    assert Processor(folder).image_tokens == 140
    (folder / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 560}}')
    assert Processor(folder).image_tokens == 560
    assert Processor(folder, image_tokens=1120).image_tokens == 1120


@pytest.mark.parametrize("option", [{"long_audio": "cut"}, {"train_on": "first"}, {"image_tokens": 0}])
def test_unknown_options(checkpoint, option):
    with pytest.raises(InputError, match="expected"):
        Processor(checkpoint, **option)
