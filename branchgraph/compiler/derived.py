"""States computed from the states of a graph: what is static is evaluated once a version.

A folded batch norm or a concatenation of sibling kernels is an expression over states. Backends
that keep packed copies of weights want its value, not the expression: the compiler cuts the graph
at such expressions (`passes.materialise`), and an executable evaluates them, in float64, whenever
its store may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType
from branchgraph.passes.materialise import materialise


@dataclass(frozen=True)
class Derived:
    """How `states` follow from the states that `sources` number."""

    origin: Graph
    sources: tuple[tuple[int, State], ...]
    states: tuple[State, ...]

    def values(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays of `states`, given those of the graph's states in their canonical order."""
        if not self.states:
            return []
        store = Store()
        for number, state in self.sources:
            store.commit(state, arrays[number])  # taken over as it is, and only read
        with np.errstate(all="ignore"):  # infinity and NaN are values, as in a run
            found = interpret(self.origin, {}, store, precision=DType.F64).updates
        return [np.ascontiguousarray(found[s], s.dtype.numpy) for s in self.states]


def derive(graph: Graph, numbering: dict[State, int]) -> tuple[Graph, Derived]:
    """`graph` over derived states; they are numbered, in `numbering`, behind the others."""
    cut, origin = materialise(graph)
    sources = tuple((numbering[s], s) for s in origin.states if s in numbering)
    states = tuple(origin.updates)
    for state in states:
        numbering[state] = len(numbering)
    return cut, Derived(origin, sources, states)
