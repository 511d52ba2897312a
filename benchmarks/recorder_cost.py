"""What recording one operation costs, beside Chainer's own cost of applying it.

    python benchmarks/recorder_cost.py --chainer-python LEGACY_VENV/bin/python

Runs this file again as `--measure MODULE` in alternating processes: ours in this interpreter and
Chainer in the other (Python 3.11, setuptools<70, numpy 1.23.5, chainer 7.8.1 built without
isolation). Each process applies every operation to tiny arrays, so that arithmetic hardly counts,
and takes the median of batches. Ours records, shape inference included, and in a second column also
numbers the program and makes the key under which it is found again: all that a program that was
compiled before pays for an operation besides running it. Prints microseconds a call and ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time

import numpy as np

REPEATS = 30
CALLS = 200


def operations(chainer):  # type: ignore[no-untyped-def]
    """Name to a call on tiny variables."""
    F = importlib.import_module(chainer.__name__ + ".functions")
    rng = np.random.RandomState(0)

    def variable(*shape):  # type: ignore[no-untyped-def]
        return chainer.Variable(rng.randn(*shape).astype(np.float32))

    x, w, b = variable(1, 2, 4, 4), variable(2, 2, 3, 3), variable(2)
    flat, fc = variable(1, 8), variable(4, 8)
    h = F.relu(x)
    assert h.array is not None  # known, so that it may be read after what is pending is forgotten
    return {
        "relu": lambda: F.relu(h),
        "convolution_2d": lambda: F.convolution_2d(h, w, b, 1, 1),
        "linear": lambda: F.linear(flat, fc),
        "max_pooling_2d": lambda: F.max_pooling_2d(h, 2, 2),
        "add": lambda: h + h,
        "concat": lambda: F.concat((h, h)),
        "reshape": lambda: F.reshape(h, (1, 32)),
    }


def measure(name: str) -> dict[str, float]:
    """Microseconds a call of each operation."""
    chainer = importlib.import_module(name)
    found = {}
    for label, call in operations(chainer).items():
        samples, with_key = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            samples.append((time.perf_counter() - start) / CALLS * 1e6)
            _key_of_what_is_pending(name)
            with_key.append((time.perf_counter() - start) / CALLS * 1e6)
        found[label] = statistics.median(samples)
        found[label + " + key"] = statistics.median(with_key)
    return found


def _key_of_what_is_pending(name: str) -> None:
    """Do what `flush` does before a program that was compiled before is run; then forget it."""
    if name.startswith("branchgraph"):
        from branchgraph.chainer.recorder import _Pending, recorder

        calls, recorder().pending = recorder().pending, []
        hash(_Pending(calls, []).key)


def main() -> None:
    """Alternate processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--chainer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    sides = {"branchgraph.chainer": sys.executable, "chainer": options.chainer_python}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, python in sides.items():
            command = [python, __file__, "--measure", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'operation':<22} {'ours us':>9} {'chainer us':>11} {'ratio':>6}")
    for label in rounds["chainer"][0]:
        ours, theirs = (statistics.median(r[label] for r in rounds[name]) for name in sides)
        print(f"{label:<22} {ours:9.1f} {theirs:11.1f} {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
