"""The Backend protocol and the registry through which backends are reached."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.errors import MissingError

#: Called after each instruction with the seconds it took.
Observer = Callable[[Instruction, float], None]


@dataclass
class Results:
    """Arrays of one run, in the order of the program's lists.

    The caller owns the outputs; updates and gradients may be the runner's own until its next run.
    """

    outputs: list[np.ndarray]
    updates: list[np.ndarray]
    gradients: list[np.ndarray]


class Runner(Protocol):
    """A program made ready on a backend, for one executable."""

    def run(
        self,
        arguments: Mapping[str, np.ndarray],
        states: Sequence[np.ndarray],
        version: int = 0,
        observer: Observer | None = None,
    ) -> Results:
        """Run once. `states` are in the numbering of the program and are not written.

        While `version` is that of the run before, the states hold what they held then.
        """
        ...


class Backend(Protocol):
    """What the compiler asks of a backend."""

    name: str
    #: Whether graphs are rewritten for speed before they come to it.
    optimises: bool

    def load(self, program: Program) -> Runner:
        """Make `program` ready, or raise `UnsupportedError` naming the ops without a kernel."""
        ...


#: Backend name to the module that defines `BACKEND`.
_MODULES = {
    "numpy": "branchgraph.backends.numpy",
    "onednn": "branchgraph.backends.onednn",
}


def backends() -> list[str]:
    """Names that `backend` knows."""
    return list(_MODULES)


def backend(name: str) -> Backend:
    """The backend `name`, imported on first use."""
    if name not in _MODULES:
        known = ", ".join(backends())
        raise MissingError(f"there is no backend {name!r}; this version has: {known}")
    found: Backend = importlib.import_module(_MODULES[name]).BACKEND
    return found
