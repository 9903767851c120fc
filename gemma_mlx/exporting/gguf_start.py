"""Starts one of llama.cpp's converters in a process of its own: ``python gguf_start.py SCRIPT ARGUMENTS``.

The converter imports transformers, which imports torchvision wherever it is installed. Nothing of it is needed, and a
torchvision that does not fit the installed torch would end the conversion: it is hidden here.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["torchvision"] = None  # what the import system takes for a package that is not there
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # this folder holds modules with the names of packages
    runpy.run_path(sys.argv[0], run_name="__main__")
