"""The Backend protocol and the registry through which backends are reached."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.errors import GraphError, MissingError


@dataclass(frozen=True)
class Work:
    """One kernel of a run: its name on the backend, and the instructions that it carries out."""

    kernel: str
    instructions: tuple[Instruction, ...]


#: Called after each kernel with the seconds it took.
Observer = Callable[[Work, float], None]


@dataclass(frozen=True)
class Footprint:
    """Memory of a planned program, in bytes, and how many of its kernels are host fall-backs.

    No arena is smaller than `lower_bound`; `kept` are packed weights and constants beside it.
    """

    arena: int
    lower_bound: int
    kept: int
    host: int


@dataclass
class Results:
    """Arrays of one run, in the order of the program's lists.

    The caller owns the outputs; updates and gradients may be the runner's own until its next run.
    An update that is None was donated: it is in the array of the state already.
    """

    outputs: list[np.ndarray]
    updates: list[np.ndarray | None]
    gradients: list[np.ndarray]


@dataclass(frozen=True)
class Options:
    """Choices that change speed, and with `fpmath` numbers; a backend refuses what it has not.

    `threads`: number of threads, by default the backend's. `fpmath`: what float32 products may be
    computed in, `strict` or `bf16` (operands rounded to 8 bits, sums in float32).
    """

    threads: int | None = None
    fpmath: str = "strict"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise GraphError(f"threads must be at least 1, got {self.threads}")
        if self.fpmath not in FPMATH:
            raise GraphError(f"unknown fpmath {self.fpmath!r}; known: {', '.join(FPMATH)}")


#: Arithmetic of float32 products.
FPMATH = ("strict", "bf16")


class Runner(Protocol):
    """A program made ready on a backend, for one executable."""

    def run(
        self,
        arguments: Mapping[str, np.ndarray],
        states: Sequence[np.ndarray],
        version: int = 0,
        observer: Observer | None = None,
    ) -> Results:
        """Run once. `states` are in the numbering of the program.

        Only those whose updates are donated may be written, when all else has been computed.

        While `version` is that of the run before, the states hold what they held then.
        """
        ...

    def footprint(self) -> Footprint | None:
        """Memory of the plans made so far; None for a backend that does not plan."""
        ...


class Backend(Protocol):
    """What the compiler asks of a backend."""

    name: str
    #: Whether graphs are rewritten for speed before they come to it.
    optimises: bool

    def missing(self) -> str:
        """Why it cannot be used here and what would bring it; empty if it can."""
        ...

    def describe(self) -> str:
        """Library, version and threads, for people."""
        ...

    def primitives(self) -> tuple[str, ...]:
        """Opcodes that kernels of a library carry out; the others run as NumPy."""
        ...

    def load(self, program: Program, options: Options) -> Runner:
        """Make `program` ready, or raise `UnsupportedError` naming what it has not."""
        ...


#: Backend name to the module that defines `BACKEND`, fastest first.
_MODULES = {
    "onednn": "branchgraph.backends.onednn",
    "numpy": "branchgraph.backends.numpy",
}
AUTO = "auto"


def backends() -> list[str]:
    """Names that `backend` knows, fastest first; `auto` is the first of them that is available."""
    return list(_MODULES)


def backend(name: str) -> Backend:
    """The backend `name`, imported on first use; `auto` takes the fastest that is available.

    Raises `MissingError` for an unknown name, and for one whose library is not installed when a
    program is loaded.
    """
    if name == AUTO:
        return _chosen()
    if name not in _MODULES:
        known = ", ".join((*backends(), AUTO))
        raise MissingError(f"there is no backend {name!r}; this version has: {known}")
    found: Backend = importlib.import_module(_MODULES[name]).BACKEND
    return found


@cache
def _chosen() -> Backend:
    """The fastest backend that is available; says which and why, once a process."""
    passed_over: list[str] = []
    for name in backends():
        candidate = backend(name)
        missing = candidate.missing()
        if not missing:
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            print(f"branchgraph: backend {name}: {candidate.describe()}{reasons}", file=sys.stderr)
            return candidate
        passed_over.append(f"not {name}: {missing}")
    raise MissingError(f"no backend is available: {'; '.join(passed_over)}")
