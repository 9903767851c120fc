"""`python -m gemma_mlx generate` from its flags: one prompt, a file of prompts, long clips, what is refused."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile

import gemma_mlx
from gemma_mlx.__main__ import verbs
from gemma_mlx.cli.door import enter
from gemma_mlx.cli.generate import FORMATS
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE
from gemma_mlx.long_audio import FORMATS as WRITTEN
from gemma_mlx.long_audio import transcribe
from gemma_mlx.sampling import Settings

MOST = 5


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    return gemma_mlx.load(checkpoint_folder, dtype="float32")


@pytest.fixture(autouse=True)
def one_model(loaded, monkeypatch):
    """Loaded once: what is tested here comes behind it."""
    monkeypatch.setattr("gemma_mlx.cli.use.load", lambda **_: loaded)


@pytest.fixture
def folder(rows, tmp_path):
    for name in ("0.wav", "3.wav", "1.png", "4.png"):
        shutil.copy(rows / name, tmp_path)
    r = np.random.default_rng(0)
    word, pause = 0.1 * r.standard_normal(16_000), np.zeros(16 * 16_000)
    soundfile.write(tmp_path / "long.wav", np.concatenate([word, pause, word, pause, word]), 16_000)
    return tmp_path


@pytest.fixture
def run(checkpoint_folder, capsys, monkeypatch):
    def run(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        given = ["generate", "--model", checkpoint_folder, "--max-tokens", MOST, *arguments]
        code = enter(verbs, [str(a) for a in given], name="gemma-mlx")
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def answer(loaded, *parts, system=None, **options):
    turns = [{"role": "system", "content": system}] * bool(system)
    turns += [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts]}]
    return gemma_mlx.generate(*loaded, [turns], **{"max_tokens": MOST, **options})[0]


def test_one_prompt_with_several_media(loaded, folder, run):
    media = [item for name in ("1.png", "4.png") for item in ("--image", folder / name)]
    media += [item for name in ("0.wav", "3.wav") for item in ("--audio", folder / name)]
    pictures = [("image", folder / "1.png"), ("image", folder / "4.png")]
    clips = [("audio", folder / "0.wav"), ("audio", folder / "3.wav")]
    expected = answer(loaded, *pictures, ("text", "All?"), *clips, system="Be brief.")
    for how in ("--stream", "--no-stream"):
        code, out, _ = run(*media, "--prompt", "All?", "--system", "Be brief.", how)
        assert (code, out) == (0, expected + "\n")
    assert run("--image", folder / "1.png")[1] == answer(loaded, pictures[0], ("text", DESCRIBE)) + "\n"
    assert run("--audio", folder / "0.wav")[1] == answer(loaded, ("text", TRANSCRIBE), clips[0]) + "\n"
    assert run("--audio", folder / "0.wav", "--language", "Dutch", "--audio-prompt", "{language}!")[1] == (
        answer(loaded, ("text", "Dutch!"), clips[0]) + "\n"
    )


def test_sampling_flags_are_the_settings(loaded, run):
    flags = {
        "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3,
        "repetition_context": 7, "seed": 5, "max_tokens": 12,
    }  # fmt: skip
    given = [item for name, value in flags.items() for item in ("--" + name.replace("_", "-"), value)]
    free = answer(loaded, ("text", "hello"), **flags)
    assert run("--prompt", "hello", *given)[1] == free + "\n"
    assert free != answer(loaded, ("text", "hello"), **{**flags, "seed": 6})
    ends = free[3:5]
    code, out, _ = run("--prompt", "hello", *given, "--stop", "\0never", "--stop", ends)
    assert code == 0 and out == free[: free.index(ends)] + "\n"


def test_an_answer_in_a_file(loaded, folder, run):
    out = folder / "answer.txt"
    code, printed, err = run("--prompt", "hello", "--out", out)
    assert (code, printed) == (0, "") and out.read_text() == answer(loaded, ("text", "hello")) + "\n"
    assert err == f"note: the answer ends at --max-tokens {MOST}\n"


def test_files_of_prompts_in_and_out(loaded, folder, run, monkeypatch):
    lines = [{"prompt": "hello", "id": 1}, {"audio_path": "0.wav"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "in.jsonl").write_text(text)
    expected = [answer(loaded, ("text", "hello")), answer(loaded, ("text", TRANSCRIBE), ("audio", folder / "0.wav"))]
    code, out, _ = run("--prompts", folder / "in.jsonl")
    assert code == 0 and [json.loads(line)["answer"] for line in out.splitlines()] == expected
    assert run("--prompts", folder / "in.jsonl", "--out", "-")[1] == out
    code, nothing, err = run("--prompts", folder / "in.jsonl", "--out", folder / "out.jsonl")
    assert (code, nothing) == (0, "") and "2 of 2 lines" in err and (folder / "out.jsonl").read_text() == out
    code, _, err = run("--prompts", folder / "in.jsonl", "--out", folder / "out.jsonl")
    assert code == 2 and "a file of this name" in err
    monkeypatch.chdir(folder)
    assert run("--prompts", "-", stdin=text)[:2] == (0, out)
    assert run("--prompts", "-", "--out", folder / "piped.jsonl", stdin=text)[0] == 0
    assert (folder / "piped.jsonl").read_text() == out


def test_media_roots_columns_and_bad_rows(loaded, folder, run):
    inside = folder / "rows"
    inside.mkdir()
    (inside / "in.jsonl").write_text('{"photo": "1.png", "ask": "What?"}\n{"ask": ""}\n')
    flags = ("--prompts", inside / "in.jsonl", "--columns", "image_path=photo", "--columns", "question=ask")
    code, out, err = run(*flags, "--media-root", folder)
    assert code == 2 and out == "" and "in.jsonl:2" in err
    code, out, err = run(*flags, "--media-root", folder, "--on-bad-row", "skip")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and first["answer"] == answer(loaded, ("image", folder / "1.png"), ("text", "What?"))
    assert "in.jsonl:2" in second["error"] and "1 skipped as bad" in err
    code, _, err = run(*flags)
    assert code == 2 and "in.jsonl:1" in err and "2 of 2 rows are bad" in err


def test_long_clips(loaded, folder, run):
    clip = folder / "long.wav"
    code, out, err = run("--audio", clip)
    assert code == 2 and "over-long audio: 35.0 s" in err and "--long-audio split" in err
    expected = transcribe(*loaded, clip, settings=Settings(max_tokens=MOST))
    code, out, err = run("--audio", clip, "--long-audio", "split")
    assert (code, out) == (0, expected.text + "\n")
    assert "s are silent and were left out" in err and "pieces 1, 2, 3 end at" in err
    assert run("--audio", clip, "--timestamps")[1] == expected.written("timestamps")
    assert run("--audio", clip, "--format", "vtt")[1] == expected.written("vtt")
    assert run("--audio", clip, "--out", folder / "a.srt")[:2] == (0, "")
    assert (folder / "a.srt").read_text() == expected.written("srt")
    edged = transcribe(*loaded, clip, settings=Settings(max_tokens=MOST), edge_seconds=(0, 0.1), piece_seconds=2)
    given = ("--edge-silence", "0", "0.1", "--piece-seconds", "2")
    assert run("--audio", clip, "--format", "json", *given)[1] == edged.written("json")
    (folder / "in.jsonl").write_text('{"audio_path": "long.wav"}\n')
    code, out, err = run("--prompts", folder / "in.jsonl")
    assert (code, out) == (2, "") and "in.jsonl:1" in err and "over-long audio" in err
    line = json.loads(run("--prompts", folder / "in.jsonl", "--long-audio", "split")[1])
    assert line["answer"] == expected.text and len(line["pieces"]) == 3
    assert set(FORMATS) == set(WRITTEN)


def test_training_does_not_split(folder, checkpoint_folder, capsys):
    given = ["train", "--model", checkpoint_folder, "--data", folder / "x.csv", "--out", folder / "x"]
    given += ["--long-audio", "split"]
    assert enter(verbs, [str(a) for a in given], name="gemma-mlx") == 2
    assert "expected error or truncate, got 'split'" in capsys.readouterr().err


def test_a_chat_from_a_pipe(loaded, folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, err = run("--chat", stdin="hello\n1.png\n\n/nonsense\n")
    assert code == 0 and err.count("error: ") == 1
    first = answer(loaded, ("text", "hello"))
    turns = [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image", "image": folder / "1.png"}, {"type": "text", "text": DESCRIBE}]},
    ]  # fmt: skip
    assert out == first + "\n" + gemma_mlx.generate(*loaded, [turns], max_tokens=MOST)[0] + "\n"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "nothing to answer"),
        (("--prompts", "FOLDER/in.jsonl", "--prompt", "x"), "leave out --prompt"),
        (("--prompts", "FOLDER/in.jsonl", "--chat"), "leave out"),
        (("--prompts", "FOLDER/missing.jsonl"), "missing.jsonl"),
        (("--prompts", "FOLDER/empty.jsonl"), "empty.jsonl:1: the file is empty"),
        (("--prompts", "FOLDER/in.jsonl", "--out", "FOLDER/in.jsonl"), "is the file of prompts"),
        (("--prompts", "FOLDER/in.jsonl", "--out", "FOLDER/no/out.jsonl"), "no such folder"),
        (("--prompts", "FOLDER/in.jsonl", "--timestamps"), "are for --audio"),
        (("--chat", "--out", "FOLDER/x"), "/save FILE"),
        (("--prompt", "x", "--timestamps"), "are for one --audio"),
        (("--image", "FOLDER/1.png", "--audio", "FOLDER/0.wav", "--format", "srt"), "are for one --audio"),
        (("--audio", "FOLDER/0.wav", "--piece-seconds", "31", "--timestamps"), "expected 1 to 30"),
        (("--audio", "FOLDER/0.wav", "--edge-silence", "2", "0", "--timestamps"), "edge-silence"),
        (("--prompt", "x", "--out", "FOLDER/no/x.txt"), "cannot be written"),
        (("--prompt", "x", "--top-p", "2"), "top-p"),
        (("--prompt", "   "), "nothing to answer"),
    ],
)
def test_what_is_refused_is_one_line(folder, run, arguments, message):
    (folder / "in.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "empty.jsonl").write_text("")
    code, out, err = run(*(a.replace("FOLDER", str(folder)) for a in arguments), stdin="")
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    assert (folder / "in.jsonl").read_text() == '{"prompt": "x"}\n'
