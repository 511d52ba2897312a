"""The process that loads and measures systems: `python -m peers.server`, driven over its pipes.

One JSON object a line comes in, one goes out. What libraries print goes to standard error.

    {"do": "import", "system": S, "meta": {...}}  import the system
    {"do": "load", "system": S, "bundle": DIR}    load the cell
    {"do": "check", "system": S, "steps": K, "file": F}    K steps; losses; arrays into F (.npz)
    {"do": "burst", "system": S, "count": C, "warm": W}    seconds of C steps after W untimed ones
    {"do": "mark"} and {"do": "peak"}             MB that the peak has grown since the mark
    {"do": "gemm", "size": M, "seconds": T}       GFLOP/s of a matrix product

An error is answered as {"error": TEXT}, and the process goes on.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback

import numpy as np

from peers.bundle import Bundle


class Server:
    """The systems that live here."""

    def __init__(self) -> None:
        self.loaded = {}
        self.training = False
        self.start = 0.0

    def module(self, system):  # type: ignore[no-untyped-def]
        return importlib.import_module("peers.systems.run_" + system.replace(".", "_"))

    def do_import(self, system, meta):  # type: ignore[no-untyped-def]
        self.module(system).prepare(meta)
        return {}

    def do_load(self, system, bundle):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        opened = Bundle(bundle)
        self.training = opened.training
        self.loaded[system] = self.module(system).load(opened)
        self.loaded[system].step()
        return {"seconds": time.perf_counter() - start}

    def do_check(self, system, steps, file):  # type: ignore[no-untyped-def]
        """Like `load`, the first step included: losses of all steps, and the arrays after them."""
        found = self.loaded[system]
        losses = [found.loss()] if self.training else []
        while 0 < len(losses) < steps:
            found.step()
            losses.append(found.loss())
        arrays = found.trained() if self.training else found.outputs()
        np.savez(file, **{f"a{i}": np.asarray(a) for i, a in enumerate(arrays)})
        return {"losses": losses}

    def do_burst(self, system, count, warm):  # type: ignore[no-untyped-def]
        step = self.loaded[system].step
        clock = time.perf_counter
        gc.collect()
        gc.disable()
        try:
            for _ in range(warm):
                step()
            times = []
            for _ in range(count):
                start = clock()
                step()
                times.append(clock() - start)
        finally:
            gc.enable()
        return {"times": times}

    def do_mark(self):  # type: ignore[no-untyped-def]
        """Resident memory now; the peak is counted anew from here."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.start = _status("VmRSS")
        return {}

    def do_peak(self):  # type: ignore[no-untyped-def]
        return {"peak_mb": _status("VmHWM") - self.start}

    def do_gemm(self, size, seconds):  # type: ignore[no-untyped-def]
        """The best product that fits in `seconds`: PyTorch's, or NumPy's where that is not here."""
        if "torch" in sys.modules:
            import torch

            a, product = torch.randn(size, size), torch.mm
        else:
            a, product = np.random.rand(size, size).astype(np.float32), np.matmul
        product(a, a)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(a, a)
            best = min(best, time.perf_counter() - start)
        return {"gflops": 2 * size**3 / best / 1e9}

    def answer(self, line):  # type: ignore[no-untyped-def]
        request = json.loads(line)
        try:
            return getattr(self, "do_" + request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            return {"error": _summary(error)}


def _summary(error):  # type: ignore[no-untyped-def]
    text = str(error).strip().splitlines()
    kind = "" if type(error) is RuntimeError else type(error).__name__ + ": "
    return kind + (text[0] if text else "no message")


def _status(name):  # type: ignore[no-untyped-def]
    """A line of /proc/self/status, in MB."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError("no " + name + " in /proc/self/status")


def main() -> None:
    """Answer until the pipe is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server()
    for line in sys.stdin:
        replies.write(json.dumps(server.answer(line)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
