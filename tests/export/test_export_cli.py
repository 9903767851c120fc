"""The command, as a person meets it; uploads go to a local server, through the real client library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import upload_hub
from click.testing import CliRunner

from gemma_mlx.__main__ import verbs
from gemma_mlx.cli.door import enter

DEMO = Path(__file__).parents[2] / "gemma_mlx" / "demo" / "checkpoint"


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command in this process."""
    code = enter(verbs, ["export", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_an_export_and_its_verification(tmp_path, capsys):
    code, out, err = run(capsys, "--model", DEMO, "--out", tmp_path / "out")
    assert code == 0 and out == "" and "hf: " in err and str(tmp_path / "out") in err
    assert run(capsys, "--verify", tmp_path / "out") == (0, f"{tmp_path / 'out'}: whole\n", "")
    assert run(capsys, "--verify", tmp_path / "out", "--quiet") == (0, "", "")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(data[:-1])
    code, out, err = run(capsys, "--verify", tmp_path / "out")
    assert code == 2 and out == "" and "model.safetensors: damaged, " in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", DEMO], "--out: name the folder"),
        (["--out", "x"], "nothing was named"),
        (["--run", "nowhere", "--out", "x"], "no run here"),
        (["--model", DEMO, "--out", "x", "--format", "peft"], "no adapter"),
        (["--model", DEMO, "--out", "x", "--private"], "--private: concerns --push-to-hub"),
        (["--model", DEMO, "--out", "x", "--push-to-hub", "me/mine"], "no token of the Hub"),
        (["--model", DEMO, "--out", "x", "--push-to-hub", "mine"], "expected organisation/name"),
        (["--model", DEMO, "--out", "x", "--scores", "nowhere"], "--scores nowhere: holds no evaluation's"),
        (["--verify", "nowhere"], "no export here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, out, err = run(capsys, *arguments)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and told in last
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option():
    page = CliRunner().invoke(verbs, ["export", "--help"]).output
    options = ("--run", "--out", "--format", "--step", "--bits", "--overwrite", "--push-to-hub", "--verify", "--scores")
    assert all(option in page for option in options)


@pytest.fixture(scope="module")
def hub():
    with upload_hub.serving() as hub:
        yield hub


def pushed(hub, tmp_path, *more, token=upload_hub.TOKEN):
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*",
    }  # fmt: skip
    command = [sys.executable, "-m", "gemma_mlx", "export", "--model", str(DEMO), "--out", str(tmp_path / "out")]
    return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=120)


def test_an_upload_arrives_byte_for_byte(hub, tmp_path):
    done = pushed(hub, tmp_path, "--push-to-hub", "me/mine", "--private")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.endpoint}/me/mine" in done.stderr
    sent = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*")}
    assert hub.files["me/mine"] == sent and hub.private["me/mine"] is True
    assert len(hub.objects) == 1  # the weights went by LFS


@pytest.mark.slow
def test_a_refused_upload_is_one_line_and_the_export_stays(hub, tmp_path):
    done = pushed(hub, tmp_path, "--push-to-hub", "me/other", token="hf_wrong")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: --push-to-hub me/other: the Hub did not take it")
    assert "is whole in" in last and (tmp_path / "out" / "manifest.json").exists() and "me/other" not in hub.files


@pytest.mark.slow
def test_nothing_is_uploaded_without_the_flag(hub, tmp_path):
    hub.asked.clear()
    assert pushed(hub, tmp_path).returncode == 0 and hub.asked == []
