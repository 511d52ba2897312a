"""The CPU backend: generated kernels, oneDNN's primitives through ctypes, NumPy for the rest."""

from __future__ import annotations

import os
from functools import cache

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.kernels import GENERATED, PRIMITIVES
from branchgraph.backends.onednn.runner import OneDNNRunner
from branchgraph.codegen import engine
from branchgraph.compiler.backend import Options
from branchgraph.compiler.program import Program
from branchgraph.ir.errors import MissingError


class OneDNNBackend:
    """Plans a program for the sizes it meets and runs it on libdnnl."""

    name = "onednn"
    optimises = True

    def missing(self) -> str:
        try:
            library.load()
        except MissingError as error:
            return str(error)
        return ""

    def describe(self) -> str:
        version = ".".join(map(str, library.version()))
        reason = engine.missing()
        generated = f"no generated kernels ({reason})" if reason else engine.version()
        return f"oneDNN {version}, {generated}, {library.threads()} threads"

    def primitives(self) -> tuple[str, ...]:
        return PRIMITIVES if engine.missing() else tuple(sorted((*PRIMITIVES, *GENERATED)))

    def load(self, program: Program, options: Options) -> OneDNNRunner:
        """A runner; `MissingError` where libdnnl is not installed.

        The first one takes NumPy's OpenBLAS down to one thread: the workers of OpenBLAS spin for a
        while after each product and take the cores from OpenMP's, which makes primitives several
        times slower. `BRANCHGRAPH_KEEP_OPENBLAS=1` leaves it alone.
        """
        library.load()
        _quiet_openblas()
        return OneDNNRunner(program, options)


@cache
def _quiet_openblas() -> None:
    if os.environ.get("BRANCHGRAPH_KEEP_OPENBLAS", "") in ("", "0"):
        library.quiet_openblas()


BACKEND = OneDNNBackend()
