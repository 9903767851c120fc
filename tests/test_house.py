"""The rooms of the library and who may know whom: walks every import of the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_mlx

PACKAGE = Path(gemma_mlx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"mlx", "numpy", "torch", "transformers", "mlx_lm", "PIL", "soundfile", "matplotlib"}

# room -> prefixes it must not import (a room is a path prefix inside the package)
FORBIDDEN = {
    "data/": ("mlx", "torch", *(f"gemma_mlx.{m}" for m in ("models", "ops", "loop", "lora", "loss", "step", "demo"))),
    "preparing/": ("mlx", "torch", "gemma_mlx.models", "gemma_mlx.ops", "gemma_mlx.loop"),
    "demo/run.py": ("torch", "transformers"),
    "spec.py": (*HEAVY, "gemma_mlx.data", "gemma_mlx.models"),
    "errors.py": tuple(HEAVY),
    "batch.py": ("mlx", "torch", "gemma_mlx.data", "gemma_mlx.models"),
    "config.py": ("mlx", "torch", "gemma_mlx.data", "gemma_mlx.models", "gemma_mlx.loop"),
    "models/": ("torch", "transformers", "gemma_mlx.loop", "gemma_mlx.loss", "gemma_mlx.checkpoint", "gemma_mlx.cli"),
    "models/gemma4/": ("gemma_mlx.models.gemma3n", "gemma_mlx.models.gemma3", "gemma_mlx.data", "numpy.random"),
    "models/gemma3n/": ("gemma_mlx.models.gemma4", "gemma_mlx.models.gemma3", "gemma_mlx.data", "numpy.random"),
    "ops/": ("torch", "transformers", "gemma_mlx.data", "gemma_mlx.models", "gemma_mlx.loop", "gemma_mlx.lora"),
    "lora.py": ("torch", "gemma_mlx.loop", "gemma_mlx.data", "gemma_mlx.cli"),
    "full.py": ("torch", "gemma_mlx.loop", "gemma_mlx.data", "gemma_mlx.cli"),
    "loss.py": ("torch", "gemma_mlx.loop", "gemma_mlx.data", "gemma_mlx.cli"),
    "loop.py": ("torch", "transformers", "gemma_mlx.cli", "click"),
}
# modules that only some rooms may know
ONLY = {
    "transformers": {"torch_backend.py", "demo/"},
    "torch": {"torch_backend.py", "demo/"},
    "click": {"train.py", "__main__.py", "cli/", "config.py"},
}


def imports(path):
    """(module, at the top level?) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def within(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_their_direction(path):
    room = path.relative_to(PACKAGE).as_posix()
    found = list(imports(path))
    for place, banned in FORBIDDEN.items():
        if room.startswith(place):
            bad = [m for m, _ in found for b in banned if within(m, b)]
            assert not bad, f"{room} must not import {bad}"
    for module, places in ONLY.items():
        if not any(room.startswith(p) for p in places):
            assert not [m for m, _ in found if within(m, module)], f"{room} must not import {module}"
    assert not [m for m, top in found if top and within(m, "mlx_lm")], f"{room} imports mlx_lm eagerly"


@pytest.mark.parametrize("path", [f for f in FILES if f.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_package_inits_stay_lazy(path):
    if path.parent == PACKAGE:
        allowed = {"__future__", "importlib", "typing", "gemma_mlx", "gemma_mlx.blas"}
    else:
        allowed = {"__future__"}
    eager = {m for m, top in imports(path) if top and m not in ("__future__.annotations", "typing.Any")}
    assert eager <= allowed, f"{path} imports {eager - allowed} at import time"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            lines = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_exported_names_are_not_submodules():
    submodules = {f.stem for f in PACKAGE.glob("*.py")} | {d.name for d in PACKAGE.iterdir() if d.is_dir()}
    assert not submodules & set(gemma_mlx.__all__)


@pytest.mark.parametrize("module", ["gemma_mlx", "gemma_mlx.spec", "gemma_mlx.batch", "gemma_mlx.config"])
def test_light_modules_load_no_framework(module):
    code = f"import sys, {module}; print(sorted({{'mlx', 'torch', 'transformers', 'mlx_lm'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
