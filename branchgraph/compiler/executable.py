"""Executable = Program + Binding: a compiled graph that can be called.

step = compile(graph, store=store)
outputs = step(x=images, labels=labels)      # updates are committed to the store together
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from branchgraph.compiler.backend import Footprint, Observer, Results, Runner
from branchgraph.compiler.derived import Derived
from branchgraph.compiler.program import Program
from branchgraph.compiler.report import Report, report
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType

_F64 = DType.F64.numpy


class Executable:
    """A program bound to a store. Calls queue on a lock; different executables do not."""

    def __init__(
        self,
        program: Program,
        runner: Runner,
        names: tuple[str, ...],
        states: tuple[State, ...],
        output_names: tuple[str, ...],
        store: Store,
        derived: Derived,
        backend: str,
    ) -> None:
        #: Name of the backend it runs on.
        self.backend = backend
        self.program = program
        self.store = store
        self.states = states
        self._runner = runner
        #: What may be fed, by name.
        self.inputs = dict(zip(names, program.arguments))
        #: The same, with the dtypes of NumPy, for each run.
        self._feeds = [(n, a, a.type.dtype.numpy) for n, a in self.inputs.items()]
        self._output_names = output_names
        self._derived = derived
        self._values: list[np.ndarray] = []
        self._read_at: int | None = None
        self._commits = 0
        self._lock = threading.Lock()

    def __call__(self, **inputs: np.ndarray | float) -> dict[str, np.ndarray]:
        """Run once with keyword inputs; see `run`."""
        return self.run(inputs)

    def run(
        self, inputs: Mapping[str, np.ndarray | float], observer: Observer | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name, as fresh arrays; updates are committed when all of them are computed.

        Raises `GraphError` for unknown or missing inputs, `ShapeError` for arrays that do not fit.
        `observer` is called with every kernel and its seconds.
        """
        arguments = self._arguments(inputs)
        with self._lock:
            results = self._run(arguments, observer)
            return dict(zip(self._output_names, results.outputs))

    def gradients(self, inputs: Mapping[str, np.ndarray | float]) -> dict[State, np.ndarray]:
        """Run once (updates included) and return the graph's gradients by state."""
        arguments = self._arguments(inputs)
        with self._lock:
            found = self._run(arguments, None).gradients
            numbers = (n for n, _ in self.program.gradients)
            return {self.states[n]: g.copy() for n, g in zip(numbers, found)}

    def report(self, inputs: Mapping[str, np.ndarray | float], *, repeats: int = 10) -> Report:
        """Where time and memory go; it runs the program `2 repeats + 1` times, updates included."""
        return report(self, inputs, repeats)

    def footprint(self) -> Footprint | None:
        """Memory of the plans made so far; None on a backend that does not plan."""
        return self._runner.footprint()

    def _run(self, arguments: dict[str, np.ndarray], observer: Observer | None) -> Results:
        """One run under the lock, its updates committed."""
        store = self.store
        version = store.version() - self._commits  # of what this program does not write itself
        if version != self._read_at:
            values = [store.peek(s) for s in self.states]
            self._values = [*values, *self._derived.values(values)]
            self._read_at = version
        results = self._runner.run(arguments, self._values, version, observer)
        for (number, _), value in zip(self.program.updates, results.updates):
            if value is None:
                store.written(self.states[number])
            else:
                store.commit(self.states[number], value)
        self._commits += len(results.updates)
        return results

    def _arguments(self, inputs: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
        for name in inputs:
            if name not in self.inputs:
                raise GraphError(f"no input {name!r}; the inputs are: {', '.join(self.inputs)}")
        arguments = {}
        for name, argument, wanted in self._feeds:
            given = inputs.get(name, argument.default)
            if isinstance(given, np.ndarray) and given.dtype is wanted:
                arguments[argument.name] = given
            elif wanted is _F64 and isinstance(given, float):
                arguments[argument.name] = np.array(given)
            elif given is None:
                raise GraphError(f"input {name!r} {argument.type} is not given")
            else:
                arguments[argument.name] = _converted(given, argument.type.dtype, name)
        return arguments


def _converted(given: np.ndarray | float, dtype: DType, name: str) -> np.ndarray:
    """`given` as an array of `dtype`; a change of kind (float to integer) is refused."""
    array = np.asarray(given)
    wanted = dtype.numpy
    if array.dtype == wanted:
        return array
    if (array.dtype.kind in "fV" and not dtype.is_float) or array.dtype.kind not in "fiubV":
        raise ShapeError(f"input {name!r}: expected {dtype}, got an array of {array.dtype}")
    return array.astype(wanted)
