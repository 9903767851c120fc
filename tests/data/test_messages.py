"""Rows that are conversations: what they are read as, ids beside transformers', spans of loss written out by hand."""

import base64
import json

import numpy as np
import pytest
from small_checkpoint import reference_processor
from tool_checkpoint import DECLARATION, TOOLS_AND_EMPTY_THOUGHT, WEATHER, make_tool_folder

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.blob import Embedded
from gemma_mlx.data.examples import DESCRIBE, Audio, Image, Prompts, RowReader, Text, Video
from gemma_mlx.data.places import Folders
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError


@pytest.fixture(scope="module")
def tool_folder(tmp_path_factory):
    return make_tool_folder(tmp_path_factory.mktemp("tools") / "it")


@pytest.fixture(scope="module")
def tool_processor(tool_folder):
    return Processor(tool_folder, image_tokens=70)


@pytest.fixture(scope="module")
def tool_reference(tool_folder):
    return reference_processor(tool_folder)


def read(values, folder="/nowhere", **options):
    """The example of one JSONL row, through its text."""
    reader = RowReader(tuple(values), Folders(folder), "t.jsonl", **options)
    return reader.example(Row(values, "t.jsonl:7"))


def said(example):
    return [(t.role, [p.text if isinstance(p, Text) else p.path.name for p in t.parts]) for t in example.turns]


def user(content):
    return {"role": "user", "content": content}


def model(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(town, **more):
    return {"type": "function", "function": {"name": "weather", "arguments": {"town": town, **more}}}


# ---- the forms that conversations come in

TALK = [("user", ["hi"]), ("model", ["ho"]), ("user", ["and?"]), ("model", ["no"])]
FORMS = {
    "messages": {"messages": [user("hi"), model("ho"), user("and?"), model("no")]},
    "JSON text": {"messages": json.dumps([user("hi"), model("ho"), user("and?"), model("no")])},
    "model": {"messages": [{"role": "model" if m["role"] == "assistant" else "user", "content": m["content"]}
                           for m in (user("hi"), model("ho"), user("and?"), model("no"))]},
    "typed parts": {"messages": [user([{"type": "text", "text": "hi", "image": None}]), model([{"type": "text",
                    "text": "ho"}]), user([{"type": "input_text", "text": "and?"}]), model("no", tool_calls=None)]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"},
                                   {"from": "human", "value": "and?"}, {"from": "gpt", "value": "no"}]},
    "prompt and completion": {"prompt": [user("hi"), model("ho"), user("and?")], "completion": [model("no")]},
    "prompt and text": {"prompt": [user("hi"), model("ho"), user("and?")], "response": "no"},
    "an empty system message": {"conversations": [{"from": "system", "value": " "}, {"from": "human", "value": "hi"},
                                {"from": "gpt", "value": "ho"}, {"from": "human", "value": "and?"},
                                {"from": "gpt", "value": "no"}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_conversation_in_every_form(form):
    example = read(FORMS[form])
    assert said(example) == TALK and not example.completion and example.row_id == "t.jsonl:7"
    of_prompt = form.startswith("prompt")
    assert [turn.learned for turn in example.turns] == [True, not of_prompt, True, True]


def test_prompt_and_completion_of_text_and_weights():
    assert said(read({"prompt": "hi", "completion": "ho"})) == TALK[:2]
    assert said(read({"prompt": "hi", "completion": [model("ho")]})) == TALK[:2]
    assert said(read({"prompt": [user("hi")]}, need_answer=False)) == TALK[:1]
    example = read(
        {"messages": [user("hi"), model("ho", weight=0), user("and?"), model("no", weight=1.0)], "text": "x"}
    )
    assert [turn.learned for turn in example.turns] == [True, False, True, True]


def test_system_turns():
    talk = {"messages": [{"role": "developer", "content": "brief"}, user("hi"), model("ho")]}
    assert said(read(talk, prompts=Prompts(system="long"))) == [("system", ["brief"]), *TALK[:2]]
    bare = {"messages": talk["messages"][1:]}
    assert said(read(bare, prompts=Prompts(system="long")))[0] == ("system", ["long"])
    assert said(read(bare | {"system": "be"}, prompts=Prompts(system="long")))[0] == ("system", ["be"])
    with pytest.raises(InputError, match=r"t.jsonl:7: a system message and something in 'system'"):
        read(talk | {"system": "be"})


# ---- media

TINY = base64.b64encode(b"RIFF....WAVE").decode()


@pytest.mark.parametrize("part", [
    {"type": "image", "image": "wide.png"}, {"type": "image", "path": "wide.png"}, {"type": "image", "url": "wide.png"},
    {"type": "image_url", "image_url": {"url": "wide.png"}}, {"type": "input_image", "image_url": "wide.png"},
    {"type": "image", "image": {"bytes": None, "path": "wide.png"}, "audio": None},
])  # fmt: skip
def test_parts_that_name_a_file(media, part):
    example = read({"messages": [user([part, {"type": "text", "text": "what?"}]), model("ho")]}, media)
    assert example.turns[0].parts == (Image(media / "wide.png"), Text("what?"))


@pytest.mark.parametrize("part", [
    {"type": "input_audio", "input_audio": {"data": TINY, "format": "wav"}},
    {"type": "audio", "audio": f"data:audio/wav;base64,{TINY}"},
    {"type": "audio_url", "audio_url": {"url": f"data:audio/x-wav;charset=x;base64,{TINY[:8]}\n{TINY[8:]}"}},
    {"type": "audio", "base64": TINY, "format": "wav"},
    {"type": "audio", "audio": {"bytes": b"RIFF....WAVE", "path": "clips/7.WAV"}},
    {"type": "audio", "audio": Embedded("t.jsonl:7 message 1 (user) part 1 audio", b"RIFF....WAVE", ".wav")},
])  # fmt: skip
def test_parts_that_hold_their_bytes(part):
    (clip,) = read({"messages": [user([part]), model("ho")]}).media()
    assert isinstance(clip, Audio) and clip.path.open().read() == b"RIFF....WAVE" and clip.path.suffix == ".wav"
    assert clip.path.name == "t.jsonl:7 message 1 (user) part 1 audio"


def test_places_take_the_rows_media_in_order(media):
    first, second = Embedded("first", b"1"), Embedded("second", b"2")
    messages = [
        user([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "audio", "audio": None}]),
        model("b"),
        user([{"type": "image"}, {"type": "video"}, {"type": "audio"}]),
        model("c"),
    ]
    columns = {"images": [first, second], "audio": '["short.wav", "long.wav"]', "video": {"bytes": b"v", "path": None}}
    example = read({"messages": messages, **columns}, media)
    assert [p if isinstance(p, Text) else (type(p), p.path.name) for p in example.turns[0].parts] == [
        Text("a"), (Image, "first"), (Audio, "short.wav")]  # fmt: skip
    assert [type(p) for p in example.turns[2].parts] == [Image, Video, Audio]
    assert [p.path.name for p in example.media()] == [
        "first", "short.wav", "second", "t.jsonl:7 video", "long.wav"]  # fmt: skip
    tagged = {"conversations": [{"from": "human", "value": "<image>\nthen <image> <audio> what?"},
                                {"from": "gpt", "value": "b"}]}  # fmt: skip
    example = read({**tagged, "images": ["tall.png", "wide.png"]}, media)
    assert said(example)[0][1] == ["tall.png", "\nthen ", "wide.png", " <audio> what?"]
    nowhere = read({"messages": [user("what?"), model("b")], "image": first, "audio": "short.wav"}, media)
    assert said(nowhere)[0][1] == ["first", "what?", "short.wav"]


@pytest.mark.parametrize(("columns", "says"), [
    ({"images": [Embedded("x", b"1")]}, "2 places for the row's image column, which holds 1"),
    ({"images": [Embedded("x", b"1")] * 3}, "2 places for the row's image column, which holds 3"),
    ({"images": [Embedded("x", b"1")] * 2, "audio": Embedded("y", b"1")}, "0 places for the row's audio column"),
    ({}, "2 places for the row's image column, which holds 0"),
])  # fmt: skip
def test_as_many_media_as_places(columns, says):
    with pytest.raises(InputError, match=f"^t.jsonl:7: the messages have {says}"):
        read({"messages": [user([{"type": "image"}]), model("a"), user([{"type": "image"}]), model("b")], **columns})


def test_several_media_in_the_columns_of_a_table(media, tmp_path):
    columns = ("image_path", "video_path", "audio_path", "question", "answer")
    reader = RowReader(columns, Folders(tmp_path, [media]), "t.csv")
    (tmp_path / "film.mp4").write_bytes(b"not looked at")
    cells = ('["tall.png", "wide.png"]', "film.mp4", '["short.wav","long.wav"]', "What?", "this")
    example = reader.example(Row(dict(zip(columns, cells, strict=True)), "t.csv:2"))
    assert said(example)[0][1] == ["tall.png", "wide.png", "film.mp4", "What?", "short.wav", "long.wav"]
    odd = dict.fromkeys(columns, "") | {"image_path": "[1].png", "answer": "this", "question": "What?"}
    with pytest.raises(InputError, match=r"t.csv:3: image_path '\[1\].png': no such file"):
        reader.example(Row(odd, "t.csv:3"))


def test_columns_that_hold_bytes_need_no_mapping():
    blob, other = Embedded("t.parquet:1 image", b"1"), Embedded("o", b"2")
    assert said(read({"image": blob, "caption": "a house"}))[0] == ("user", ["t.parquet:1 image", DESCRIBE])
    assert said(read({"images": [blob, other], "question": "?", "answer": "b"}))[0][1] == [
        "t.parquet:1 image",
        "o",
        "?",
    ]
    # Where it came from is no file of this machine, and its bytes are here.
    assert read({"image": blob, "image_path": "/far/away.png", "caption": "c"}).media() == [Image(blob)]
    with pytest.raises(InputError, match=r"t.jsonl:1: missing column 'image_path'; found image, caption: rename"):
        read({"image": "a.png", "caption": "c"})
    with pytest.raises(InputError, match=r"empty text: 'answer' is an answer to nothing"):
        read({"image": blob, "answer": "c"}, mapping={"image": ""})
    with pytest.raises(InputError, match=r"audio holds a number; expected a path"):
        read({"audio": [0.5, 0.25], "text": "c"})
    with pytest.raises(InputError, match=r"audio has none of bytes.*not decoded samples; found array"):
        read({"audio": {"array": [0.5], "sampling_rate": 16000}, "text": "c"})
    assert said(read({"audio_url": "https://a/b", "prompt": "a", "answer": "c"}))[0] == ("user", ["a"])


# ---- ids and labels


def reference_ids(reference, messages, **options):
    sized = {"processor_kwargs": {"max_soft_tokens": 70}}
    out = reference.apply_chat_template(messages, tokenize=True, return_dict=True, **sized, **options)
    return out["input_ids"][0], list(out["mm_token_type_ids"][0])


def test_media_in_all_turns_equal_the_reference(media, processor, checkpoint, reference):
    def image(name):
        return {"type": "image", "path": str(media / name)}

    def audio(name):
        return {"type": "audio", "path": str(media / name)}

    def text(words):
        return {"type": "text", "text": words}

    messages = [
        {"role": "system", "content": "You are in the room."},
        user([audio("short.wav"), image("wide.png")]), model("the fox"),
        user([text("What is in this "), image("tall.png"), text("picture?\n"), image("wide.png")]),
        model("A house.\n\nTwo"),
        user("say more"), model([text(" the dog ")]),
        user([text("and"), audio("long.wav"), audio("short.wav"), text("hello"), image("tall.png")]), model("the sun"),
    ]  # fmt: skip
    example = read({"messages": messages}, media)
    ids, types = reference_ids(reference, messages)
    for train_on, learned in (
        ("all", "the fox<turn|>A house.\n\nTwo<turn|>the dog<turn|>the sun<turn|>"),
        ("last", "the sun<turn|>"),
    ):
        sample = Processor(checkpoint, image_tokens=70, train_on=train_on).sample(example)
        assert sample.input_ids.tolist() == ids and sample.token_types.tolist() == types
        kept = sample.labels != IGNORE_INDEX
        assert np.array_equal(sample.labels[kept], sample.input_ids[kept])
        assert processor.decode(sample.labels[kept], skip_special_tokens=False) == learned
    prompt = processor.prompt(example)
    assert prompt.input_ids.tolist() == reference_ids(reference, messages[:-1], add_generation_prompt=True)[0]
    # The same rows with the media as bytes in the row's columns.
    kinds = {"image": ("wide.png", "tall.png", "wide.png", "tall.png"), "audio": ("short.wav", "long.wav", "short.wav")}
    held = {f"{kind}s": [{"bytes": (media / name).read_bytes(), "path": name} for name in names]
            for kind, names in kinds.items()}  # fmt: skip
    bare = json.loads(json.dumps(messages))
    for message in bare:
        for part in message["content"] if isinstance(message["content"], list) else ():
            part.pop("path", None)
    again = processor.sample(read({"messages": bare, **held}))
    assert again.input_ids.tolist() == ids and len(again.images) == 4 and len(again.clips) == 3
    first = processor.sample(example)
    pairs = zip((*first.clips, *(p.pixels for p in first.images)), (*again.clips, *(p.pixels for p in again.images)),
                strict=True)  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in pairs)


CALL = '<|tool_call>call:weather{days:2,town:<|"|>the room<|"|>}<tool_call|>'
CALL2 = '<|tool_call>call:weather{town:<|"|>a house<|"|>}<tool_call|>'
RESULT = 'response:weather{value:<|"|>sun goes down<|"|>}<tool_response|>'
HEAD = f"<bos><|turn>system\nBe brief.{DECLARATION}<turn|>\n<|turn>user\nwhat is it?<turn|>\n"
ASK = [{"role": "system", "content": "Be brief."}, user("what is it?")]
CALLS = model(None, tool_calls=[call("the room", days=2)])
DONE = {"role": "tool", "name": "weather", "content": "sun goes down"}
M, U = "<|turn>model\n", "<|turn>user\n"

# name -> (messages, the text with ⟦what is learned⟧ written by hand, the same for the last turn alone)
SCRIPTS = {
    "a call without its result": (
        [*ASK, CALLS],
        f"{HEAD}{M}⟦{CALL}<|tool_response>⟧",
        f"{HEAD}{M}⟦{CALL}<|tool_response>⟧",
    ),
    "call, result, answer, more": (
        [*ASK, CALLS, DONE, model(" the sun "), user("and?"), model("no")],
        f"{HEAD}{M}⟦{CALL}<|tool_response>⟧{RESULT}⟦the sun<turn|>⟧\n{U}and?<turn|>\n{M}⟦no<turn|>⟧\n",
        f"{HEAD}{M}{CALL}<|tool_response>{RESULT}the sun<turn|>\n{U}and?<turn|>\n{M}⟦no<turn|>⟧\n",
    ),
    "two calls, then a third": (
        [*ASK, model("", tool_calls=[call("the room", days=2), call("a house")]), DONE, DONE,
         model(None, tool_calls=[call("a house")]), DONE, model("the fox")],
        f"{HEAD}{M}⟦{CALL}{CALL2}<|tool_response>⟧{RESULT}<|tool_response>{RESULT}⟦{CALL2}<|tool_response>⟧{RESULT}"
        "⟦the fox<turn|>⟧\n",
        f"{HEAD}{M}{CALL}{CALL2}<|tool_response>{RESULT}<|tool_response>{RESULT}{CALL2}<|tool_response>{RESULT}"
        "⟦the fox<turn|>⟧\n",
    ),
    "messages that go on with one turn": (
        [*ASK, model("I look."), CALLS, DONE, model("the sun"), model("goes")],
        f"{HEAD}{M}⟦I look.{CALL}<|tool_response>⟧{RESULT}⟦the sungoes<turn|>⟧\n",
        f"{HEAD}{M}I look.{CALL}<|tool_response>{RESULT}⟦the sungoes<turn|>⟧\n",
    ),
    "thoughts": (
        [*ASK, model("hello", reasoning_content="the dog"), user("and?"),
         model(None, reasoning="lazy", tool_calls=[call("a house")]), DONE, model("no", thinking="the quick")],
        f"{HEAD}{M}hello<turn|>\n{U}and?<turn|>\n{M}⟦<|channel>thought\nlazy\n<channel|>{CALL2}<|tool_response>⟧{RESULT}"
        "⟦<|channel>thought\nthe quick\n<channel|>no<turn|>⟧\n",
        f"{HEAD}{M}hello<turn|>\n{U}and?<turn|>\n{M}<|channel>thought\nlazy\n<channel|>{CALL2}<|tool_response>{RESULT}"
        "⟦<|channel>thought\nthe quick\n<channel|>no<turn|>⟧\n",
    ),
    "weights": (
        [*ASK, CALLS | {"weight": 0}, DONE, model("the sun", weight=1), user("and?"), model("no")],
        f"{HEAD}{M}{CALL}<|tool_response>{RESULT}⟦the sun<turn|>⟧\n{U}and?<turn|>\n{M}⟦no<turn|>⟧\n",
        f"{HEAD}{M}{CALL}<|tool_response>{RESULT}the sun<turn|>\n{U}and?<turn|>\n{M}⟦no<turn|>⟧\n",
    ),
}  # fmt: skip


def by_hand(reference, written):
    """(text, labels) of a text with ⟦…⟧ around what is learned, through transformers' tokenizer."""
    pieces = [piece.split("⟦") for piece in written.split("⟧")]
    text, spans = "", []
    for before, *learned in pieces:
        text += before
        if learned:
            spans.append((len(text), len(text) + len(learned[0])))
            text += learned[0]
    found = reference.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    at = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return text, [i if any(a <= start < b for a, b in spans) else IGNORE_INDEX for i, (start, _) in at]


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_tool_turns(tool_folder, tool_reference, name, train_on):
    messages, every, last = SCRIPTS[name]
    example = read({"messages": messages, "tools": [WEATHER]})
    text, labels = by_hand(tool_reference, every if train_on == "all" else last)
    ids, _ = reference_ids(tool_reference, messages, tools=[WEATHER])
    assert tool_reference.tokenizer.decode(ids) == text  # the row as it is, through transformers
    sample = Processor(tool_folder, train_on=train_on).sample(example)
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == labels
    if name != "messages that go on with one turn":  # which a prompt would cut in two
        prompt, _ = reference_ids(tool_reference, messages[:-1], tools=[WEATHER], add_generation_prompt=True)
        assert Processor(tool_folder).prompt(example).input_ids.tolist() == prompt == ids[: len(prompt)]


def test_the_prompt_of_several_messages_in_one_turn(tool_processor, tool_reference):
    messages = SCRIPTS["messages that go on with one turn"][0]
    example = read({"messages": messages, "tools": [WEATHER]})
    expected, _ = reference_ids(tool_reference, messages[:-2], tools=[WEATHER], add_generation_prompt=True)
    prompt = tool_processor.prompt(example).input_ids
    assert prompt.tolist() == expected == tool_processor.sample(example).input_ids[: len(prompt)].tolist()


def test_words_beside_a_call_stand_behind_its_result(tool_processor, tool_reference):
    """They carry no loss there: the model was not asked for them in that place."""
    calls = model("I look.", tool_calls=[call("a house")])
    example = read({"messages": [*ASK, calls, DONE, model("the sun"), user("and?"), model("no")], "tools": [WEATHER]})
    text, labels = by_hand(
        tool_reference,
        f"{HEAD}{M}⟦{CALL2}<|tool_response>⟧{RESULT}I look.the sun<turn|>\n{U}and?<turn|>\n{M}⟦no<turn|>⟧\n",
    )
    sample = tool_processor.sample(example)
    assert tool_processor.decode(sample.input_ids, skip_special_tokens=False) == text
    assert sample.labels.tolist() == labels
    last = read({"messages": [*ASK, calls], "tools": [WEATHER]})
    _, labels = by_hand(tool_reference, f"{HEAD}{M}⟦{CALL2}I look.<|tool_response>⟧")
    assert tool_processor.sample(last).labels.tolist() == labels


def test_tools_behind_an_empty_thought(tmp_path, tool_reference):
    """Generation starts behind an empty thought that history lacks: a call counts where the conversation ends in it,
    and an answer behind a result, which needs no header of its own."""
    processor = Processor(make_tool_folder(tmp_path / "larger", TOOLS_AND_EMPTY_THOUGHT))
    thought = "<|channel>thought\n<channel|>"
    for messages, written in (
        ([*ASK, CALLS], f"{HEAD}{M}{thought}⟦{CALL}<|tool_response>⟧"),
        ([*ASK, CALLS, DONE, model("the sun")], f"{HEAD}{M}{CALL}<|tool_response>{RESULT}⟦the sun<turn|>⟧\n"),
    ):
        text, labels = by_hand(tool_reference, written)
        sample = processor.sample(read({"messages": messages, "tools": [WEATHER]}))
        assert processor.decode(sample.input_ids, skip_special_tokens=False) == text
        assert sample.labels.tolist() == labels


def test_arguments_in_json_text_and_results_without_a_name(tool_processor):
    openai = {"id": "c1", "type": "function",
              "function": {"name": "weather", "arguments": '{"town": "the room", "days": 2}'}}  # fmt: skip
    flat = {"name": "weather", "arguments": {"town": "the room", "days": 2}}
    plain = tool_processor.sample(read({"messages": [*ASK, CALLS, DONE, model("x")], "tools": [WEATHER]}))
    results = {"role": "tool", "content": "sun goes down"}
    for calls, result in (([openai], results | {"tool_call_id": "c1"}), ([flat], results)):
        values = {"messages": [*ASK, model(None, tool_calls=calls), result, model("x")]}
        for tools in ([WEATHER], [WEATHER["function"]], json.dumps([WEATHER])):
            sample = tool_processor.sample(read(values | {"tools": tools}))
            assert np.array_equal(sample.input_ids, plain.input_ids) and np.array_equal(sample.labels, plain.labels)


def test_templates_that_know_no_tools_or_thoughts(processor, tool_processor):
    tools = {"messages": [*ASK, CALLS], "tools": [WEATHER]}
    for values in (tools, {"messages": [*ASK, CALLS]}, {"messages": [*ASK, model("x")], "tools": [WEATHER]}):
        with pytest.raises(InputError, match=r"t.jsonl:7: the chat template does not write the tool 'weather'"):
            processor.sample(read(values))
    with pytest.raises(InputError, match=r"t.jsonl:7: the chat template does not write the tool 'weather'"):
        processor.prompt(read(tools))
    with pytest.raises(InputError, match=r"t.jsonl:7: the chat template does not write the thought of a model turn"):
        processor.sample(read({"messages": [*ASK, model("x", reasoning="the dog")]}))
    with pytest.raises(InputError, match=r"t.jsonl:7: no model turn carries loss"):
        tool_processor.sample(read({"messages": [*ASK, model("x", weight=0)]}))


@pytest.mark.parametrize("token", ["<turn|>", '<|"|>', "<tool_response|>", "<|image|>", "<eos>", "<|channel>"])
def test_control_tokens_in_tools(tool_processor, token):
    bad = f"a{token}b"
    for messages, tools in (
        ([*ASK, model(None, tool_calls=[call(bad)])], [WEATHER]),
        ([*ASK, model(None, tool_calls=[call("x", **{bad: [1]})])], [WEATHER]),
        ([*ASK, CALLS, {"role": "tool", "content": bad}, model("x")], [WEATHER]),
        ([*ASK, model("x", reasoning=bad)], [WEATHER]),
        ([*ASK, model("x")], [{"name": "weather", "parameters": {"enum": [{"deep": bad}]}}]),
    ):
        with pytest.raises(InputError, match=r"^t.jsonl:7: .* contains the control token") as caught:
            tool_processor.check(read({"messages": messages, "tools": tools}))
        assert token in str(caught.value)


# ---- rows that are refused

DEEP = "[" * 50_000
HOSTILE = {
    "message 2: expected a role of system, .*found 'narrator'": [user("a"), {"role": "narrator", "content": "b"}],
    "message 1: expected a role of .*found null": [{"content": "a"}, model("b")],
    "message 1: expected a role of .*found a list": [{"role": ["user"], "content": "a"}, model("b")],
    r"message 3 \(system\): only the first message": [{"role": "system", "content": "a"}, user("a"),
                                                     {"role": "system", "content": "b"}, model("b")],
    r"message 1 \(user\): the conversation does not end with a model turn": [user("a")],
    r"message 3 \(tool\): the conversation does not end": [user("a"), CALLS, DONE],
    r"message 2 \(tool\): no call before it": [user("a"), DONE, model("b")],
    r"message 2 \(assistant\): empty text: it says nothing": [user("a"), model("  ")],
    r"message 1 \(user\): empty text: it says nothing": [user([]), model("b")],
    r"message 1 \(user\): content is a number": [user(3), model("b")],
    r"message 1 \(user\): content is an object": [user({"text": "a"}), model("b")],
    r"message 1 \(user\) part 1 is text; expected an object": [user(["a"]), model("b")],
    r"message 1 \(user\) part 1 is a list": [user([[["a"]]]), model("b")],
    r"message 1 \(user\) part 2: expected the type text, .*found 'hologram'": [
        user([{"type": "text", "text": "a"}, {"type": "hologram"}]), model("b")],
    r"message 1 \(user\) part 1: expected the type .*found 'none'": [user([{"text": "a"}]), model("b")],
    r"message 1 \(user\) part 1: text is a number": [user([{"type": "text", "text": 3}]), model("b")],
    r"message 1 \(user\) part 1 names its image twice \(image, path\)": [
        user([{"type": "image", "image": "a", "path": "b"}]), model("b")],
    r"message 1 \(user\) part 1 image holds a number": [user([{"type": "image", "image": 7}]), model("b")],
    r"message 1 \(user\) part 1 image 'https://a/b.png' is a URL; only files": [
        user([{"type": "image", "image": "https://a/b.png"}]), model("b")],
    r"message 1 \(user\) part 1 image '../b.png' lies outside": [
        user([{"type": "image", "path": "../b.png"}]), model("b")],
    r"message 1 \(user\) part 1 audio '!!!' is not base64": [user([{"type": "audio", "base64": "!!!"}]), model("b")],
    r"message 1 \(user\) part 1 audio.*expected data:TYPE;base64,BYTES": [
        user([{"type": "audio", "audio": "data:audio/wav,abc"}]), model("b")],
    r"message 1 \(user\) part 1 audio: base64 of nothing": [
        user([{"type": "audio", "audio": "data:audio/wav;base64,"}]), model("b")],
    r"message 2 \(assistant\) holds media": [user("a"), model([{"type": "image", "base64": "YQ=="}])],
    r"message 2 \(assistant\): the weight is '0.5'": [user("a"), model("b", weight=0.5)],
    r"message 1 \(user\): only an assistant's message may have tool_calls": [user("a") | {"tool_calls": [call("x")]},
                                                                            model("b")],
    r"message 2 \(assistant\): function_call is not read; write tool_calls": [
        user("a"), model("b", function_call={"n": 1})],
    r"message 2 \(assistant\): tool call 1 has no name": [user("a"), model("", tool_calls=[{"function": {}}])],
    r"message 2 \(assistant\): tool_calls holds an object": [user("a"), model("", tool_calls={"a": 1})],
    r"message 2 \(assistant\): tool call 1: arguments '\{' is not JSON": [
        user("a"), model("", tool_calls=[{"name": "f", "arguments": "{"}])],
    r"message 2 \(assistant\): tool call 1: the arguments are a list": [
        user("a"), model("", tool_calls=[{"name": "f", "arguments": "[1]"}])],
    r"message 2 \(assistant\): tool call 1: arguments: (JSON )?nested too deeply": [
        user("a"), model("", tool_calls=[{"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}])],
    r"message 2 \(assistant\): reasoning is an object": [user("a"), model("b", reasoning={"a": 1})],
    r"10000 messages; at most 500": [user("a"), model("b")] * 5000,
    r"messages: item 2 is text; expected a list of objects": [user("a"), "b"],
    r"messages holds an object; expected a list": {"role": "user", "content": "a"},
    r"messages: JSON nested too deeply": DEEP,
    r"messages 'hello' is not JSON": "hello",
    r"no messages but an empty system message": [{"role": "system", "content": ""}],
}  # fmt: skip


@pytest.mark.parametrize("says", HOSTILE)
def test_rows_refused_in_one_line(tmp_path, says):
    with pytest.raises(InputError, match=f"^t.jsonl:7: {says}") as caught:
        read({"messages": HOSTILE[says]}, tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_junk_is_refused_or_read(tmp_path):
    """Any JSON under the names that are read: an example or one line, never another error."""
    rng = np.random.default_rng(11)
    keys = "role content type text image audio tool_calls function name arguments weight from value path bytes data url"
    keys = [*keys.split(), "image_url", "reasoning", "tool_call_id", "id"]
    words = ["user", "assistant", "tool", "text", "image", "human", "gpt", "a.wav", "data:audio/wav;base64,YQ==", "["]
    words += ["{", "", "[1]", "\0", "..", "é" * 300, "https://a/b", "<image>"]

    def junk(depth):
        kind = rng.integers(0, 9 if depth else 6)
        if kind < 3:
            return str(rng.choice(words))
        if kind < 6:
            return [None, 7, -0.5, True, float("nan"), b"\xff"][rng.integers(0, 6)]
        if kind < 7:
            return [junk(depth - 1) for _ in range(rng.integers(0, 4))]
        return {str(key): junk(depth - 1) for key in rng.choice(keys, rng.integers(0, 6), replace=False)}

    read_ones = 0
    for _ in range(3000):
        names = [
            "messages",
            "conversations",
            "prompt",
            "completion",
            "tools",
            "images",
            "audio",
            "system",
            "text",
            "id",
        ]
        values = {str(name): junk(4) for name in rng.choice(names, rng.integers(1, 5), replace=False)} | {"text": "a"}
        if rng.random() < 0.7:
            values["messages"] = [user(junk(3)), model(junk(1)) | {"tool_calls": junk(3)}]
        try:
            read(values, tmp_path)
            read_ones += 1
        except InputError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000 and str(e).startswith("t.jsonl:")
    assert 100 < read_ones < 2900


def test_a_hundred_megabytes_of_base64(tmp_path):
    huge = "A" * (100 << 20)
    for part in ({"type": "audio", "audio": f"data:audio/wav;base64,{huge}"}, {"type": "audio", "base64": huge}):
        with pytest.raises(InputError, match="100 MiB of base64; at most 64 MiB") as caught:
            read({"messages": [user([part]), model("b")]}, tmp_path)
        assert len(str(caught.value)) < 300


def test_empty_messages_give_way_to_the_other_columns():
    with pytest.raises(InputError, match=r"t.jsonl:7: empty text: nothing in 'messages'"):
        read({"messages": []})
    assert read({"messages": [], "text": "once"}).completion


@pytest.mark.parametrize(("value", "says"), [
    ({"a": 1}, "tools holds an object"), ("[", "is not JSON"), ([{"function": {"name": " "}}], "tool 1 has no name"),
    (json.loads('[{"name": "f", "parameters": ' + '{"a":' * 60 + "1" + "}" * 61 + "]"), "tool 1: nested too deeply"),
])  # fmt: skip
def test_tools_refused(value, says):
    with pytest.raises(InputError, match=f"^t.jsonl:7: .*{says}"):
        read({"messages": [user("a"), model("b")], "tools": value})
