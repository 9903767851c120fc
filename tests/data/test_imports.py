"""Data workers must not load MLX, nor codecs before they are needed."""

import subprocess
import sys
from pathlib import Path

import gemma_mlx.data

MODULES = sorted(
    "gemma_mlx.data." + ".".join(path.relative_to(Path(gemma_mlx.data.__path__[0])).with_suffix("").parts)
    for path in Path(gemma_mlx.data.__path__[0]).rglob("*.py")
    if path.name != "__init__.py"
)


def test_data_never_imports_mlx():
    assert "gemma_mlx.data.sources.local" in MODULES and len(MODULES) >= 9
    heavy = ("mlx", "torch", "transformers", "av", "pillow_heif", "soundfile", "soxr", "PIL", "jinja2")
    code = f"import sys, {', '.join(MODULES)}; print(sorted({{n.split('.')[0] for n in sys.modules}} & set({heavy!r})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
