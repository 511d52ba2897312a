"""Makes the environment that `compare.py` runs in, from nothing.

    python benchmarks/make_peers.py DIR                   PyTorch, ONNX Runtime, OpenVINO, JAX
    python3.11 benchmarks/make_peers.py DIR --legacy      Chainer 7.8.1 and MXNet 1.9.1

DIR becomes a virtual environment of the interpreter that runs this file. The first holds this
checkout of branchgraph too (editable), since both sides of a comparison share a process. The second
needs Python 3.11 or older: give its `bin/python` to `compare.py --legacy-python`. PyTorch comes
from PyPI; `--torch-index URL` takes it from elsewhere, such as PyTorch's index of CPU builds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

#: pip's arguments, a line a call. Chainer's setup reads what newer setuptools took away, so its
#: build must see the installed one (`--no-build-isolation`).
PEERS = (
    ("torch==2.13.0",),
    ("onnx", "onnxruntime", "openvino", "jax"),
    ("-e", str(CHECKOUT)),
)
LEGACY = (
    ("setuptools<70", "wheel", "numpy==1.23.5"),
    ("mxnet==1.9.1", "numpy==1.23.5"),
    ("--no-build-isolation", "chainer==7.8.1", "numpy==1.23.5"),
)


def pip_lines(legacy: bool, torch_index: str | None = None) -> list[list[str]]:
    """The arguments of `pip install`, call by call."""
    lines = [list(line) for line in (LEGACY if legacy else PEERS)]
    if torch_index is not None and not legacy:
        lines[0] += ["--index-url", torch_index]
    return lines


def make(folder: Path, lines: list[list[str]]) -> Path:
    """The interpreter of the new environment."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for line in lines:
        print("pip install", *line, flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *line], check=True)
    return python


def main() -> None:
    """Make it and say how to use it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--legacy", action="store_true", help="Chainer and MXNet instead")
    parser.add_argument("--torch-index", metavar="URL", help="where PyTorch comes from")
    chosen = parser.parse_args()
    if chosen.folder.exists():
        parser.error(f"{chosen.folder} exists already; name a new folder")
    if chosen.legacy and sys.version_info >= (3, 12):
        parser.error("MXNet 1.9.1 and Chainer 7.8.1 need Python 3.11 or older; run this with one")
    python = make(chosen.folder, pip_lines(chosen.legacy, chosen.torch_index))
    use = "compare.py --legacy-python" if chosen.legacy else "run benchmarks/compare.py with"
    print(f"{use} {python}")


if __name__ == "__main__":
    main()
