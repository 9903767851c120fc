"""What a user installs: the wheel's contents, the README's commands, the extras."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHERE = "from gemma_mlx.ops.sources import kernels_folder; print(kernels_folder())"


def run(code, cwd, path):
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as b; print(b.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_kernels_and_demo(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path)
    for source in (ROOT / "kernels").iterdir():
        assert f"gemma_mlx/kernels/{source.name}" in names
    assert "gemma_mlx/demo/checkpoint/model.safetensors" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]
    assert run(WHERE, tmp_path, tmp_path) == tmp_path / "gemma_mlx" / "kernels"


def test_checkout_finds_kernels(tmp_path):
    assert run(WHERE, tmp_path, ROOT) == ROOT / "kernels"


def readme_blocks():
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_first_two_readme_blocks_are_the_demo_and_the_tests():
    demo, tests = readme_blocks()[:2]
    assert "venv" in demo and "gemma_mlx.train --demo" in demo
    assert "venv" in tests and "pytest" in tests


def test_ci_runs_the_second_block_as_it_stands(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "README.md").write_text("```bash\nexit 3\n```\ntext\n```bash\necho two\nfalse | true\nexit 4\n```\n")
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("two\n", 1)


def test_extras_and_dependencies():
    extras = PROJECT["optional-dependencies"]
    assert {"cpu", "cuda", "torch", "media", "test", "dev"} <= set(extras)
    assert "torch==2.13.0" in extras["test"]
    wanted = (
        "mlx mlx-lm numpy soundfile soxr pillow huggingface-hub safetensors google-cloud-storage click rich tokenizers "
        "jinja2 pyyaml matplotlib jiwer"
    )
    assert set(wanted.split()) <= {re.split(r"[>=<\[]", d)[0] for d in PROJECT["dependencies"]}
