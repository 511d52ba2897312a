"""The CPU backend: oneDNN's primitives through ctypes, NumPy for what they do not cover."""

from __future__ import annotations

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.runner import OneDNNRunner
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
        return f"oneDNN {version}, {library.threads()} threads"

    def load(self, program: Program) -> OneDNNRunner:
        """A runner; `MissingError` where libdnnl is not installed."""
        library.load()
        return OneDNNRunner(program)


BACKEND = OneDNNBackend()
