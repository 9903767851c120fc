"""The chat on the terminal, driven by lines. The oracle is `generate` on the conversation written out by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gemma_mlx
from gemma_mlx.cli import chat as chat_module
from gemma_mlx.cli.chat import Chat, media_in
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE, Prompts
from gemma_mlx.data.rows import Rows
from gemma_mlx.errors import InputError
from gemma_mlx.sampling import Settings

MOST = 5
SHORT = Settings(max_tokens=MOST)


@pytest.fixture
def folder(rows, tmp_path, monkeypatch):
    for name in ("0.wav", "3.wav", "1.png"):
        shutil.copy(rows / name, tmp_path)
    shutil.copy(rows / "3.wav", tmp_path / "two words.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chat(loaded):
    return Chat(*loaded, SHORT)


def asked(loaded, *messages, system=None):
    """What `generate` answers to messages: text or parts, the user's and the model's in turn."""
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    turns = [{"role": "system", "content": system}] * bool(system) + turns
    return gemma_mlx.generate(*loaded, [turns], max_tokens=MOST)[0]


def said(chat):
    return [turn.text for turn in chat.turns]


def test_a_conversation_of_several_turns_with_files(loaded, folder, chat, capsys):
    for line in ("hello", "/audio 0.wav", "", "'two words.wav'", "1.png", "and this?", "good"):
        assert chat.take(line)
    first = asked(loaded, "hello")
    clip = [{"type": "text", "text": TRANSCRIBE}, {"type": "audio", "audio": folder / "0.wav"}]
    second = asked(loaded, "hello", first, clip)
    both = [{"type": "image", "image": folder / "1.png"}, {"type": "text", "text": "and this?"},
            {"type": "audio", "audio": folder / "3.wav"}]  # fmt: skip
    third = asked(loaded, "hello", first, clip, second, both)
    fourth = asked(loaded, "hello", first, clip, second, both, third, "good")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in (first, second, third, fourth))
    assert chat.waiting == [] and len(chat.turns) == 8


def test_undo_reset_and_system(loaded, folder, chat, capsys):
    chat.take("hello")
    chat.take("bad")
    chat.take("/undo")
    chat.take("there")
    assert said(chat)[2] == "there" and said(chat)[3] == asked(loaded, "hello", said(chat)[1], "there").strip()
    chat.take("/system Be brief.")
    chat.take("and now")
    four = said(chat)[:4]
    assert said(chat)[5] == asked(loaded, *four, "and now", system="Be brief.").strip()
    chat.take("/system")
    chat.take("/reset")
    chat.take("hello")
    assert said(chat)[1] == asked(loaded, "hello").strip() and len(chat.turns) == 2
    chat.take("1.png")
    chat.take("/undo")
    assert chat.waiting == [] and len(chat.turns) == 2
    chat.take("/undo")
    with pytest.raises(InputError, match="nothing to take back"):
        chat.take("/undo")


def test_what_is_said_by_default(loaded, folder):
    chat = Chat(*loaded, SHORT, Prompts(audio="In {language}:", system="Kind."), language="Dutch")
    chat.take("0.wav")
    chat.take("")
    assert said(chat)[0] == "In Dutch:" and chat.system == "Kind."
    chat.take("1.png")
    chat.take("")
    assert said(chat)[2] == DESCRIBE
    chat.take("")
    assert len(chat.turns) == 4
    chat.take("/system")
    assert chat.system == ""


@pytest.mark.parametrize(
    "line,message",
    [
        ("/audio missing.wav", "missing.wav: no such file"),
        ("/audio", "needs the name of a file"),
        ("/audio 1.png", "1.png: "),
        ("/image 0.wav", "0.wav: unreadable image"),
        ("/nonsense", "/nonsense: no such command"),
        ("/adapter", "/adapter FOLDER"),
        ("/adapter nowhere/", "nowhere"),
        ("/save", "needs the name"),
        ("/save conversation.txt", "end the name in .jsonl"),
        ("/save missing/conversation.jsonl", "cannot be written"),
        ("torn.wav", "truncated audio"),
        ("long.wav", "over-long audio"),
        ("say <|image|> <image|>", "image"),
    ],
)
def test_errors_are_one_line_and_keep_the_conversation(loaded, folder, chat, capsys, monkeypatch, line, message):
    import soundfile

    (folder / "torn.wav").write_bytes((folder / "0.wav").read_bytes()[:1000])
    soundfile.write(folder / "long.wav", [0.0] * 16_000 * 31, 16_000)
    lines = iter(["hello", line, "again", None])
    monkeypatch.setattr(chat_module, "_next_line", lambda asking: next(lines))
    chat.run()
    told = capsys.readouterr()
    assert told.err.count("error: ") == 1 and told.err.count("\n") == 1 and message in told.err
    assert (
        said(chat)[::2] == ["hello", "again"]
        and said(chat)[3] == asked(loaded, "hello", said(chat)[1], "again").strip()
    )


def test_a_file_that_breaks_later_does_not_stay_in_the_way(loaded, folder, chat):
    chat.take("0.wav")
    (folder / "0.wav").write_bytes(b"gone")
    with pytest.raises(InputError, match="unreadable audio"):
        chat.take("what?")
    chat.take("hello")
    assert said(chat) == ["hello", asked(loaded, "hello").strip()]


def test_names_of_dragged_files(folder):
    one, two = folder / "0.wav", folder / "two words.wav"
    for line in ("0.wav", " 0.wav ", "'0.wav'", str(one), f'"{one}"'):
        assert media_in(line) == [("audio", one)], line
    for line in ("two words.wav", r"two\ words.wav", '"two words.wav"', "'two words.wav' ", str(two)):
        assert media_in(line) == [("audio", two)], line
    assert media_in(r"1.png two\ words.wav") == [("image", folder / "1.png"), ("audio", two)]
    (folder / "it's.png").write_bytes(b"x")
    assert media_in("it's.png") == [("image", folder / "it's.png")]
    (folder / "notes.txt").write_text("x")
    for line in ("", "what is 0.wav?", "notes.txt", "missing.wav", "it's", "0.wav missing.wav", "x" * 5000, "a\0b"):
        assert media_in(line) == [], line


def test_a_saved_conversation_can_be_trained_on(loaded, folder, chat, tmp_path_factory, capsys):
    chat.take("/system Be brief.")
    chat.take("1.png")
    chat.take("what?")
    chat.take("and?")
    chat.take("/save talk.jsonl")
    chat.take("/save talk.jsonl")
    assert "--media-root" not in capsys.readouterr().err
    found = list(Rows(folder / "talk.jsonl"))
    processor = loaded[1]
    assert len(found) == 2
    for example in found:
        assert [turn.role for turn in example.turns] == ["system", "user", "model", "user", "model"]
        assert [turn.text for turn in example.turns[1:]] == said(chat)
        assert example.media()[0].path == folder / "1.png"
        assert (processor.sample(example).labels != -100).sum() > 0
    elsewhere = tmp_path_factory.mktemp("else where") / "talk.jsonl"
    chat.take(f"/save '{elsewhere}'")
    assert f"--media-root {folder}" in capsys.readouterr().err
    assert Rows(elsewhere, [folder])[0].media()[0].path == folder / "1.png"
    with pytest.raises(InputError, match="outside"):
        Rows(elsewhere)[0]


class Slow:
    """A stream that sends a signal to this process behind its second piece."""

    def __init__(self, signum):
        self.signum, self.closed = signum, False

    def __call__(self, model, processor, conversation, settings, cache):
        try:
            yield "one "
            yield "two "
            os.kill(os.getpid(), self.signum)
            yield "three "
            yield "four "
        finally:
            self.closed = True


def test_ctrl_c_stops_an_answer_and_not_the_chat(loaded, chat, capsys, monkeypatch, tmp_path):
    slow = Slow(signal.SIGINT)
    monkeypatch.setattr(chat_module, "stream", slow)
    assert chat.take("count")
    told = capsys.readouterr()
    assert told.out == "one two three \n" and told.err == "stopped\n" and slow.closed
    assert said(chat) == ["count", "one two three"] and not chat.turns[1].learned
    monkeypatch.undo()
    chat.take("go on")
    assert said(chat)[3] == asked(loaded, "count", "one two three ", "go on").strip()
    chat.take(f"/save {tmp_path / 'a.jsonl'}")
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_a_second_ctrl_c_takes_the_message_back(loaded, chat, capsys, monkeypatch):
    def hangs(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        yield "never"

    lines = iter(["hello", None])
    monkeypatch.setattr(chat_module, "_next_line", lambda asking: next(lines))
    monkeypatch.setattr(chat_module, "stream", hangs)
    started = time.monotonic()
    chat.run()
    assert time.monotonic() - started < 4 and chat.turns == []
    assert "taken back" in capsys.readouterr().err


def test_sigterm_ends_the_chat(chat, monkeypatch):
    from gemma_mlx.signals import Interrupted

    monkeypatch.setattr(chat_module, "stream", Slow(signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        chat.take("count")
    assert stop.value.signum == signal.SIGTERM


@pytest.fixture(scope="module")
def adapter(checkpoint_folder, rows, tmp_path_factory):
    from gemma_mlx.loop import finetune

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        run = finetune(
            str(checkpoint_folder), data=rows / "train.csv", out=tmp_path_factory.mktemp("runs") / "a b", steps=3,
            rank=2, lr=0.1, quiet=True, audio_prompt="Listen.", system="Be brief.",
        )  # fmt: skip
    return run.adapter


def test_adapters_come_and_go_on_one_base(checkpoint_folder, adapter, folder, capsys):
    """Answers are those of models loaded with the adapter and without; the conversation stays."""
    chat = Chat(*gemma_mlx.load(checkpoint_folder, dtype="float32"), SHORT)
    bare = gemma_mlx.load(checkpoint_folder, dtype="float32")
    tuned = gemma_mlx.load(checkpoint_folder, dtype="float32", adapter=adapter)
    chat.take("hello")
    chat.take(f"/adapter '{adapter}'")
    chat.take("hello")
    chat.take("0.wav")
    chat.take("")
    chat.take("/adapter none")
    chat.take("1.png")
    chat.take("")
    one, two, three = said(chat)[1:6:2]
    clip = [{"type": "text", "text": "Listen."}, {"type": "audio", "audio": folder / "0.wav"}]
    picture = [{"type": "image", "image": folder / "1.png"}, {"type": "text", "text": DESCRIBE}]
    assert one == asked(bare, "hello").strip()
    assert two == asked(tuned, "hello", one, "hello", system="Be brief.").strip()
    assert two != asked(bare, "hello", one, "hello", system="Be brief.").strip(), "the adapter should change something"
    assert three == asked(tuned, "hello", one, "hello", two, clip, system="Be brief.").strip()
    assert said(chat)[7] == asked(bare, "hello", one, "hello", two, clip, three, picture).strip()


def test_nothing_that_another_adapter_computed_is_used(checkpoint_folder, adapter, capsys):
    """The same system turn throughout: all of the conversation could be taken for known."""
    chat = Chat(*gemma_mlx.load(checkpoint_folder, dtype="float32"), SHORT, given={"system"})
    tuned = gemma_mlx.load(checkpoint_folder, dtype="float32", adapter=adapter)
    chat.take("hello")
    assert len(chat._cache)
    chat.take(f"/adapter '{adapter}'")
    assert not len(chat._cache)
    chat.take("hello")
    one, two = said(chat)[1], said(chat)[3]
    assert two == asked(tuned, "hello", one, "hello").strip()


def test_flags_count_more_than_what_an_adapter_remembers(checkpoint_folder, adapter, folder, capsys):
    model, processor = gemma_mlx.load(checkpoint_folder, dtype="float32")
    prompts = Prompts(system="Mine.")
    chat = Chat(model, processor, SHORT, prompts, given={"system"}, loaded={"audio_window": 13})
    chat.take("/adapter " + str(adapter.parent).replace(" ", "\\ "))
    assert chat.prompts == Prompts(audio="Listen.", system="Mine.")
    assert "trained with audio_window 12, this base has 13" in capsys.readouterr().err
    chat.take("/adapter none")
    assert chat.prompts == prompts


@pytest.mark.slow
def test_a_person_at_a_terminal(checkpoint_folder, folder):
    """A real terminal: a prompt, an answer, Ctrl-C at the prompt, a dragged file, Ctrl-D."""
    pty = pytest.importorskip("pty")
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(gemma_mlx.__file__).parents[1]), "TERM": "dumb"}
    command = [sys.executable, "-m", "gemma_mlx", "generate", "--model", str(checkpoint_folder), "--max-tokens", "5"]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True)
    os.close(side)
    seen = bytearray()

    def read():
        while True:
            try:
                seen.extend(os.read(main, 4096))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()

    def wait(text, since):
        deadline = time.monotonic() + 60
        while text not in bytes(seen[since:]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert text in bytes(seen[since:]), bytes(seen)
        return len(seen)

    at = wait(b"> ", 0)
    os.write(main, b"hello\n")
    at = wait(b"> ", at + 1)
    os.kill(process.pid, signal.SIGINT)
    at = wait(b"Ctrl-D or /quit ends the chat", at)
    os.write(main, rb"two\ words.wav" + b"\n")
    at = wait(b"goes with your next line", at)
    os.write(main, b"/quit\n")
    assert process.wait(20) == 0
    os.close(main)
