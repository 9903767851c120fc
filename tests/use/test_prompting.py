"""Files of prompts: what a line asks, what comes out of it, going on after a kill. The oracle is `generate`, one
conversation at a time, on conversations written out by hand."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gemma_mlx
from gemma_mlx import generation
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE, Prompts
from gemma_mlx.data.turns import Audio, Image, Text, Video
from gemma_mlx.errors import InputError
from gemma_mlx.prompting import Answering, PromptFile, answer_file, user_turn
from gemma_mlx.sampling import Settings

MOST = 5
SHORT = Settings(max_tokens=MOST)


@pytest.fixture
def folder(rows, tmp_path):
    for name in ("0.wav", "3.wav", "1.png", "4.png"):
        shutil.copy(rows / name, tmp_path)
    return tmp_path


def write(path, lines):
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(*parts):
    return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts]}]


def test_each_kind_of_line_is_answered_as_its_conversation(loaded, folder):
    lines = [
        {"id": 3, "prompt": "hello", "tags": ["a", None, 1.5], "text": None},
        {"audio_path": "0.wav"},
        {"image_path": "1.png", "question": "Which digit?", "answer": "4", "finish": "?"},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                      *user(("image", "4.png"), ("text", "three"))]},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "what would be right"}]},
        {"audio": "3.wav", "image": "1.png", "prompt": "Both?", "system": "Be brief."},
    ]  # fmt: skip
    conversations = [
        "hello",
        user(("text", TRANSCRIBE), ("audio", folder / "0.wav")),
        user(("image", folder / "1.png"), ("text", "Which digit?")),
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
         *user(("image", folder / "4.png"), ("text", "three"))],
        "one",
        [{"role": "system", "content": "Be brief."},
         *user(("image", folder / "1.png"), ("text", "Both?"), ("audio", folder / "3.wav"))],
    ]  # fmt: skip
    out = folder / "out.jsonl"
    told = answer_file(*loaded, PromptFile(write(folder / "in.jsonl", lines)), out, Answering(SHORT, 2))
    found = read(out)
    assert [line["answer"] for line in found] == [
        gemma_mlx.generate(*loaded, [c], max_tokens=MOST)[0] for c in conversations
    ]
    assert told.answered == 6 and told.bad == told.before == 0
    assert (
        [line["answer_tokens"] for line in found].count(MOST)
        == told.cut
        == sum(line["finish"] == "length" for line in found)
    )
    own = {"answer", "finish", "prompt_tokens", "answer_tokens"}
    for line, given in zip(found, lines, strict=True):
        kept = {key: value for key, value in line.items() if key not in own}
        assert kept == {("input_" + key if key in own else key): value for key, value in given.items()}
    prompts = [loaded[1].prompt(generation.as_example(c)) for c in conversations]
    assert [line["prompt_tokens"] for line in found] == [len(prompt.input_ids) for prompt in prompts]


def test_lines_come_out_in_order_and_empty_ones_do_not_count(loaded, folder):
    prompts = [f"say {'very ' * (i % 5)}{i}" for i in range(11)]
    lines = [json.dumps({"prompt": p}) + ("\n\n" if i % 3 else "") for i, p in enumerate(prompts)]
    path = write(folder / "in.jsonl", lines)
    out = io.StringIO()
    answer_file(*loaded, PromptFile(path), out, Answering(Settings(max_tokens=2), 2))
    assert [json.loads(line)["prompt"] for line in out.getvalue().splitlines()] == prompts


BAD = [
    ('{"prompt": ""}', r"in.jsonl:2: .*nothing to answer"),
    ('{"prompt": "x"', r"in.jsonl:2: not JSON"),
    ('["x"]', r"in.jsonl:2: expected a JSON object"),
    ('{"text": "once upon"}', r"in.jsonl:2: nothing to answer: a text alone"),
    ('{"audio_path": "missing.wav"}', r"in.jsonl:2: .*no such file"),
    ('{"image_path": "../out.png", "prompt": "x"}', r"in.jsonl:2: .*outside"),
    ('{"image_path": "/etc/hostname", "prompt": "x"}', r"in.jsonl:2: .*outside"),
    ('{"image_path": "https://example.org/a.png", "prompt": "x"}', r"in.jsonl:2: .*URL"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', r"in.jsonl:2: nothing to answer: the user says nothing"),
    ('{"messages": [{"role": "pope", "content": "x"}]}', r"in.jsonl:2: message 1: expected a role"),
    ('{"audio_path": "torn.wav"}', r"in.jsonl:2: .*truncated audio"),
    ('{"prompt": "a <image|> b <|image|>"}', r"in.jsonl:2: "),
]


@pytest.mark.parametrize("line,message", BAD)
def test_a_bad_line_stops_before_anything_or_is_skipped(loaded, folder, line, message):
    (folder / "torn.wav").write_bytes((folder / "0.wav").read_bytes()[:1000])
    path, out = write(folder / "in.jsonl", ['{"prompt": "first"}', line, '{"prompt": "last"}']), folder / "out.jsonl"
    with pytest.raises(InputError, match=message) as error:
        answer_file(*loaded, PromptFile(path), out, Answering(SHORT))
    assert "\n" not in str(error.value) and not list(folder.glob("out.jsonl*"))
    told = answer_file(*loaded, PromptFile(path), out, Answering(SHORT, skip_bad=True))
    found = read(out)
    assert told.bad == 1 and len(found) == 3 and "answer" in found[0] and "answer" in found[2]
    assert found[1]["error"] == str(error.value) and "answer" not in found[1]


def test_what_only_decoding_tells_stops_there_or_is_skipped(loaded, folder):
    """A clip with a sound header and broken samples: the lines before it stay, and skipping goes on behind them."""
    import soundfile

    soundfile.write(folder / "nan.wav", [0.0] * 8000 + [float("nan")], 16_000, subtype="FLOAT")
    lines = [{"prompt": f"say {i}"} for i in range(6)] + [{"audio_path": "nan.wav"}, {"prompt": "last"}]
    path, out = write(folder / "in.jsonl", lines), folder / "out.jsonl"
    with pytest.raises(InputError, match=r"in.jsonl:7: .*not finite"):
        answer_file(*loaded, PromptFile(path), out, Answering(SHORT, 1))
    assert len(read(out)) == 4
    told = answer_file(*loaded, PromptFile(path), out, Answering(SHORT, 1, skip_bad=True))
    found = read(out)
    assert told.before == 4 and told.bad == 1 and "not finite" in found[6]["error"]
    assert [line.get("prompt") for line in found] == [line.get("prompt") for line in lines]
    assert all("answer" in line for i, line in enumerate(found) if i != 6)


@pytest.fixture
def many(folder):
    return write(folder / "in.jsonl", [{"prompt": f"say {i}", "id": i} for i in range(11)])


class Killed(Exception):
    pass


def kill_after(lines):
    def progress(done, _total):
        if done >= lines:
            raise Killed

    return progress


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "say 9", "ans', b'{"prompt": "say 4"}\n{"id": 5}\n'])
def test_going_on_gives_the_same_file_and_repeats_nothing(loaded, many, folder, monkeypatch, torn):
    how = Answering(Settings(max_tokens=4, temperature=1.0, seed=3), 1)
    answer_file(*loaded, PromptFile(many), folder / "whole.jsonl", how)
    out = folder / "out.jsonl"
    with pytest.raises(Killed):
        answer_file(*loaded, PromptFile(many), out, how, {"model": "m"}, kill_after(4))
    with out.open("ab") as file:
        file.write(torn)
    asked = []
    answers = generation.answers
    monkeypatch.setattr(
        generation, "answers", lambda m, p, examples, *a: (asked.extend(examples), answers(m, p, examples, *a))[1]
    )
    told = answer_file(*loaded, PromptFile(many), out, how, {"model": "m"})
    assert told.before == 4 and [example.row_id for example in asked] == [str(i) for i in range(4, 11)]
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in folder.glob("out.jsonl*")) == ["out.jsonl"]


def test_a_seed_gives_each_group_its_own(loaded, folder):
    path, out = write(folder / "in.jsonl", [{"prompt": "say"}] * 8), io.StringIO()
    answer_file(*loaded, PromptFile(path), out, Answering(Settings(max_tokens=4, temperature=1.0, seed=3), 1))
    found = [json.loads(line)["answer"] for line in out.getvalue().splitlines()]
    assert len(set(found)) == 8


def test_going_on_with_other_input_or_options_is_refused(loaded, many, folder):
    out = folder / "out.jsonl"
    with pytest.raises(Killed):
        answer_file(*loaded, PromptFile(many), out, Answering(SHORT, 1), {"model": "m"}, kill_after(4))
    before = out.read_bytes()
    for how, made_with, message in (
        (Answering(Settings(max_tokens=9), 1), {"model": "m"}, "another max_tokens"),
        (Answering(SHORT, 1), {"model": "n"}, "another model"),
        (Answering(SHORT, 2), {"model": "m"}, "another batch_size"),
    ):
        with pytest.raises(InputError, match=message):
            answer_file(*loaded, PromptFile(many), out, how, made_with)
    many.write_text(many.read_text().replace("say 10", "say ten"))
    with pytest.raises(InputError, match="begun with another input"):
        answer_file(*loaded, PromptFile(many), out, Answering(SHORT, 1), {"model": "m"})
    assert out.read_bytes() == before


def test_a_finished_file_and_a_strange_one_are_not_touched(loaded, many, folder):
    out = folder / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="a file of this name"):
        answer_file(*loaded, PromptFile(many), out, Answering(SHORT))
    assert out.read_text() == "mine\n" and not (folder / "out.jsonl.unfinished").exists()


@pytest.mark.slow
def test_a_killed_process_goes_on_from_the_command_line(checkpoint_folder, folder):
    """SIGKILL while lines are written; the same command then ends with the file of a run that nobody stopped."""
    lines = [{"prompt": f"say {'so ' * (i % 7)}{i}"} for i in range(24)]
    command = [sys.executable, "-m", "gemma_mlx", "generate", "--model", checkpoint_folder, "--batch-size", "1",
               "--max-tokens", "16", "--prompts", write(folder / "in.jsonl", lines)]  # fmt: skip
    command = list(map(str, command))
    env = {**os.environ, "PYTHONPATH": str(Path(gemma_mlx.__file__).parents[1])}
    subprocess.run([*command, "--out", folder / "whole.jsonl"], check=True, env=env, capture_output=True)
    out = folder / "out.jsonl"
    process = subprocess.Popen([*command, "--out", str(out)], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(out.read_text().splitlines()) < 24
    done = subprocess.run([*command, "--out", str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "by an earlier call" in done.stderr
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_clip_that_is_too_long_is_answered_in_pieces(loaded, folder):
    import numpy as np
    import soundfile

    r = np.random.default_rng(0)
    word, pause = 0.1 * r.standard_normal(16_000), np.zeros(16 * 16_000)
    soundfile.write(folder / "long.wav", np.concatenate([word, pause, word, pause, word]), 16_000)
    path = write(folder / "in.jsonl", [{"audio_path": "long.wav"}, {"audio_path": "0.wav"}])
    with pytest.raises(InputError, match=r"in.jsonl:1: .*over-long audio"):
        answer_file(*loaded, PromptFile(path), io.StringIO(), Answering(SHORT))
    out = io.StringIO()
    answer_file(*loaded, PromptFile(path), out, Answering(SHORT, pieces={"edge_seconds": (0.1, 0.1)}))
    long, short = map(json.loads, out.getvalue().splitlines())
    assert [(round(p["start"]), round(p["end"])) for p in long["pieces"]] == [(0, 1), (17, 18), (34, 35)]
    whole = gemma_mlx.transcribe(*loaded, folder / "long.wav", settings=SHORT, edge_seconds=(0.1, 0.1))
    assert long["answer"] == whole.text and [p["text"] for p in long["pieces"]] == [p.text for p in whole.pieces]
    assert "pieces" not in short and short["prompt_tokens"] < long["prompt_tokens"]


def test_what_a_user_says():
    turn = user_turn(None, ["a.png"], ["b.mp4"], ["c.wav"])
    assert [type(part) for part in turn.parts] == [Image, Video, Text, Audio] and turn.text == TRANSCRIBE
    assert user_turn(None, ["a.png"]).text == DESCRIBE
    assert user_turn(None, ["a.png"], prompts=Prompts(image="What?")).text == "What?"
    dutch = user_turn(None, clips=["c.wav"], prompts=Prompts(audio="In {language}:"), language="Dutch")
    assert dutch.text == "In Dutch:"
    assert "into Dutch text" in user_turn(None, clips=["c.wav"], language="Dutch").text
    for arguments in ({"text": None}, {"text": "  "}):
        with pytest.raises(InputError, match="nothing to answer"):
            user_turn(**arguments)
    with pytest.raises(InputError, match="--language"):
        user_turn(None, clips=["c.wav"], prompts=Prompts(audio="In {language}:"))
