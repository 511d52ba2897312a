"""Arrays that a graph knows by itself, written and read with the ops there are.

    write    an array of one number -> full
             any other              -> its runs of equal numbers, each a full, in one concat,
                                       reshaped
    read     a node whose operands are all known, is evaluated

A number in the graph, unlike one in a store, is the same for every store, so a pass may rely on it
and claim `equal`; it prints, hashes and is saved with the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType

#: Elements of the largest array that is worth knowing: gates are small, activations are not.
MOST_ELEMENTS = 2**16


def write(graph: Graph, array: np.ndarray, dtype: DType, name: str = "") -> Value:
    """A constant value, as nodes at the current scope."""
    flat = np.asarray(array).reshape(-1)
    starts = [0, *(int(i) + 1 for i in np.flatnonzero(flat[1:] != flat[:-1]))]
    if len(starts) == 1 and flat.size:
        full = Full(value=float(flat[0]), shape=array.shape, dtype=dtype)
        return graph.emit(full, name=name)
    runs = (
        graph.emit(Full(value=float(flat[a]), shape=(b - a,), dtype=dtype))
        for a, b in zip(starts, [*starts[1:], flat.size])
    )
    joined = graph.emit(Concat(axis=0), *runs, name=name if array.ndim == 1 else "")
    if array.ndim == 1:
        return joined
    return graph.emit(Reshape(shape=array.shape), joined, name=name)


class KnownArrays:
    """The constants among the values of a graph; show it the nodes in their order."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._arrays: dict[Value, np.ndarray] = {}
        for node in nodes:
            self.visit(node)

    def visit(self, node: Node) -> None:
        """Evaluate `node` if all it reads is known."""
        if node.op.declared or node.op.symbolic or node.op.introduces:
            return
        if not node.inputs and not isinstance(node.op, Full):
            return
        if all(v in self._arrays for v in node.inputs) and all(map(_small, node.outputs)):
            with np.errstate(all="ignore"):
                arrays = node.op.evaluate(*(self._arrays[v] for v in node.inputs))
            self._arrays.update(zip(node.outputs, arrays))

    def get(self, value: Value) -> np.ndarray | None:
        """The elements of `value`, if the graph knows them."""
        return self._arrays.get(value)


def _small(value: Value) -> bool:
    sizes = [d for d in value.shape if isinstance(d, int)]
    return len(sizes) == len(value.shape) and prod(sizes) <= MOST_ELEMENTS
