"""Run the programs of `tests/chainer/programs.py` with Chainer itself and write what they give.

    LEGACY_VENV/bin/python tools/record_chainer_programs.py programs.npz

The tests read it as tests/data/recordings/chainer/programs.npz. Needs Chainer 7.8.1 (Python 3.11,
setuptools<70, numpy 1.23.5, built without isolation).
"""

import importlib.util
import pathlib
import sys

import chainer
import numpy as np

PROGRAMS = pathlib.Path(__file__).parent.parent / "tests" / "chainer" / "programs.py"


def main() -> None:
    """Write one array for each program and result."""
    spec = importlib.util.spec_from_file_location("programs", PROGRAMS)
    programs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(programs)
    results = {
        f"{program.__name__}/{name}": array
        for program in programs.PROGRAMS
        for name, array in program(chainer).items()
    }
    np.savez_compressed(sys.argv[1], **results)


if __name__ == "__main__":
    main()
