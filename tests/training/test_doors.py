"""Bad input through the command line: exit code 2, one line, nothing written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from damage import DAMAGE

from gemma_mlx.cli import door
from gemma_mlx.errors import InputError
from gemma_mlx.signals import Interrupted


def run(arguments, module="gemma_mlx.train"):
    """A door in a process of its own."""
    environment = {**os.environ, "GEMMA_MLX_COMPILE": "off"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def entered(arguments, capsys, verb="train"):
    """(exit code, stderr) of the door in this process, which saves the imports."""
    from gemma_mlx.__main__ import verbs
    from gemma_mlx.train import command

    capsys.readouterr()
    arguments = [str(a) for a in arguments]
    code = door.enter(command, arguments, verb) if verb == "train" else door.enter(verbs, [verb, *arguments], verb)
    return code, capsys.readouterr().err


def test_a_process_ends_with_code_2_and_one_line(checkpoint_folder, rows, tmp_path):
    done = run(["--model", checkpoint_folder, "--data", rows / "nothing.csv", "--out", tmp_path / "run"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nothing.csv" in done.stderr
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = [
    (["--rank", "0"], "--rank"),
    (["--rnak", "4"], "--rank"),
    (["--lr", "fast"], "--lr"),
    (["--schedule", "cosin"], "--schedule"),
    (["--targets", "q_porj"], "q_proj"),
    (["--columns", "text=nowhere"], "nowhere"),
    (["--media-root", "/no/such/folder"], "/no/such/folder"),
    (["--config", "/no/such.yaml"], "/no/such.yaml"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--patience", "3"], "patience"),
    (["--pack-tokens", "64"], "packing"),
    (["--packing", "--pack-tokens", "0"], "--pack-tokens"),
    (["--packing", "--group-by-length"], "group_by_length"),
    (["--demo", "--steps", "3"], "only --out can be given"),
]


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("verb", ["train", "generate", "evaluate"])
def test_a_broken_checkpoint(case, verb, checkpoint_folder, rows, tmp_path, capsys):
    damage, words = DAMAGE[case]
    folder = shutil.copytree(checkpoint_folder, tmp_path / "broken")
    damage(folder)
    data = ["--data", rows / "media.csv", "--out", tmp_path / "run"]
    code, told = entered(["--model", folder, *(["--prompt", "hello"] if verb == "generate" else data)], capsys, verb)
    assert code == 2 and told.startswith("error: ") and told.count("\n") == 1 and words in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments,word", BAD_OPTIONS, ids=[" ".join(a) for a, _ in BAD_OPTIONS])
def test_bad_options(checkpoint_folder, rows, tmp_path, capsys, arguments, word):
    given = {"--model": checkpoint_folder, "--data": rows / "train.csv", "--out": tmp_path / "run", "--steps": 1}
    given = {k: v for k, v in given.items() if k not in arguments}
    code, err = entered([*(p for kv in given.items() for p in kv), *arguments], capsys)
    assert code == 2 and err.startswith("error: ") and word in err.splitlines()[-1] and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["--model", "--data", "--out"])
def test_needed_options(checkpoint_folder, rows, tmp_path, capsys, missing):
    given = {"--model": checkpoint_folder, "--data": rows / "train.csv", "--out": tmp_path / "run"}
    given.pop(missing)
    code, err = entered([p for kv in given.items() for p in kv], capsys)
    assert code == 2 and missing in err and err.count("\n") == 1


def _media(folder):
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "long.wav", np.zeros(16000 * 31, np.float32), 16000)
    (folder / "noise.wav").write_bytes(b"not a sound file" * 50)
    (folder / "none.png").write_bytes(b"")
    (folder.parent / "outside.wav").write_bytes(b"x")


BAD_ROWS = {
    "missing column": ("a,b\n1,2\n", "bad.csv:1"),
    "empty text": ("prompt,response\nhello,x\nhello,\n", "bad.csv:3"),
    "no rows": ("prompt,response\n", "bad.csv:2"),
    "ragged row": ("prompt,response\nhello\n", "bad.csv:2"),
    "empty audio": ("audio_path,text\nempty.wav,x\n", "empty.wav"),
    "unreadable audio": ("audio_path,text\nnoise.wav,x\n", "noise.wav"),
    "long audio": ("audio_path,text\nlong.wav,x\n", "bad.csv:2"),
    "missing audio": ("audio_path,text\nnowhere.wav,x\n", "bad.csv:2"),
    "outside": ("audio_path,text\n../outside.wav,x\n", "outside"),
    "empty picture": ("image_path,question,answer\nnone.png,q,a\n", "none.png"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("option", ["--data", "--valid"])
def test_bad_rows_are_found_before_anything_is_written(checkpoint_folder, rows, tmp_path, capsys, name, option):
    text, word = BAD_ROWS[name]
    folder = tmp_path / "rows"
    folder.mkdir()
    _media(folder)
    (folder / "bad.csv").write_text(text)
    given = {"--model": checkpoint_folder, "--data": rows / "train.csv", "--out": tmp_path / "run", "--steps": 1}
    given[option] = folder / "bad.csv"
    code, err = entered([p for kv in given.items() for p in kv], capsys)
    assert code == 2 and word in err and "bad.csv" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_config_file_trains(checkpoint_folder, rows, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        f"model: {checkpoint_folder}\ndata: {rows / 'train.csv'}\nsteps: 2\nbatch-size: 2\nlr: 1e-3\n"
    )
    code, err = entered(["--config", tmp_path / "c.yaml", "--out", tmp_path / "run"], capsys)
    assert code == 0, err
    assert "step 2/2" in err and "adapter:" in err  # plain lines where there is no terminal
    assert (tmp_path / "run" / "adapter" / "adapters.safetensors").is_file()


def test_the_demo_flag_calls_the_demo(monkeypatch, tmp_path):
    import types

    called = []
    fake = types.ModuleType("gemma_mlx.demo.run")
    fake.main = lambda out, quiet: called.append((out, quiet))
    monkeypatch.setitem(sys.modules, "gemma_mlx.demo.run", fake)
    from gemma_mlx.train import command

    assert door.enter(command, ["--demo", "--out", str(tmp_path)], "train") == 0
    assert called == [(str(tmp_path), False)]


def test_exit_codes(capsys):
    import click

    def raising(error):
        @click.command()
        def command():
            raise error

        return command

    assert door.enter(raising(InputError("first line\nsecond")), []) == 2
    assert capsys.readouterr().err == "error: first line second\n"
    assert door.enter(raising(Interrupted("stopped", 15)), []) == 143
    assert door.enter(raising(KeyboardInterrupt()), []) == 130
    with pytest.raises(ZeroDivisionError):
        door.enter(raising(ZeroDivisionError()), [])


def test_the_verbs_are_listed_without_being_imported():
    from gemma_mlx.__main__ import VERBS, verbs

    result = CliRunner().invoke(verbs, ["--help"])
    assert result.exit_code == 0 and all(verb in result.output for verb in VERBS)
    done = run(["nonsense"], "gemma_mlx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr
    done = run(["train", "--help"], "gemma_mlx")
    assert done.returncode == 0 and "--targets" in done.stdout
