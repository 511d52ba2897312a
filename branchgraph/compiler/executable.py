"""Executable = Program + Binding: a compiled graph that can be called.

step = compile(graph, store=store)
outputs = step(x=images, labels=labels)      # updates are committed to the store together
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from branchgraph.compiler.backend import Observer, Results, Runner
from branchgraph.compiler.program import Program
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType


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
    ) -> None:
        self.program = program
        self.store = store
        self.states = states
        self._runner = runner
        self._names = names
        self._output_names = output_names
        self._lock = threading.Lock()

    def __call__(self, **inputs: np.ndarray | float) -> dict[str, np.ndarray]:
        """Run once with keyword inputs; see `run`."""
        return self.run(inputs)

    def run(
        self, inputs: Mapping[str, np.ndarray | float], observer: Observer | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name, as fresh arrays; updates are committed when all of them are computed.

        Raises `GraphError` for unknown or missing inputs, `ShapeError` for arrays that do not fit.
        `observer` is called with every instruction and its seconds.
        """
        return self._results(inputs, observer)[0]

    def gradients(self, inputs: Mapping[str, np.ndarray | float]) -> dict[State, np.ndarray]:
        """Run once (updates included) and return the graph's gradients by state."""
        return self._results(inputs, None)[1]

    def _results(
        self, inputs: Mapping[str, np.ndarray | float], observer: Observer | None
    ) -> tuple[dict[str, np.ndarray], dict[State, np.ndarray]]:
        arguments = self._arguments(inputs)
        with self._lock:
            values = [self.store[s] for s in self.states]
            results = self._runner.run(arguments, values, observer)
            self._commit(results)
        outputs = dict(zip(self._output_names, results.outputs))
        numbers = (n for n, _ in self.program.gradients)
        return outputs, {self.states[n]: g for n, g in zip(numbers, results.gradients)}

    def _commit(self, results: Results) -> None:
        for (number, _), value in zip(self.program.updates, results.updates):
            self.store.commit(self.states[number], value)

    def _arguments(self, inputs: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
        unknown = [n for n in inputs if n not in self._names]
        if unknown:
            raise GraphError(f"no input {unknown[0]!r}; the inputs are: {', '.join(self._names)}")
        arguments = {}
        for argument, name in zip(self.program.arguments, self._names):
            given = inputs.get(name, argument.default)
            if given is None:
                raise GraphError(f"input {name!r} {argument.type} is not given")
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
