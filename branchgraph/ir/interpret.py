"""The reference interpreter: a graph evaluated node by node with `Op.evaluate`.

It is the definition that compiled programs are compared with, and what passes and `materialise`
use to compute values. `precision=DType.F64` evaluates every floating op in float64, whatever dtype
the graph declares. Values live until their last use, and states are widened at their first, so that
evaluating the expressions of a large network takes little more than what it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import Dim, bind_shape
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType


@dataclass
class Run:
    """What one run gives: outputs, new values of updated states, gradients."""

    outputs: dict[str, np.ndarray]
    updates: dict[State, np.ndarray]
    gradients: dict[State, np.ndarray]


def interpret(
    graph: Graph,
    inputs: Mapping[str, np.ndarray | float] | None = None,
    store: Store | None = None,
    precision: DType | None = None,
) -> Run:
    """Evaluate `graph`; the store is read, never written.

    Inputs that are not given take their defaults. Raises `GraphError` for unknown or missing
    inputs and `ShapeError` where an array does not fit.
    """
    store = Store() if store is None else store
    return _Interpreter(graph, store, precision).run(inputs or {})


class _Interpreter:
    def __init__(self, graph: Graph, store: Store, precision: DType | None) -> None:
        self.graph = graph
        self.store = store
        self.precision = precision
        self.bindings: dict[str, int] = {}
        self.values: dict[Value, np.ndarray] = {}

    def run(self, inputs: Mapping[str, np.ndarray | float]) -> Run:
        graph = self.graph
        check_names(graph, inputs)
        for name, value in graph.inputs.items():
            given = inputs.get(name, value.default)
            array = np.asarray(given).astype(self._dtype(value.dtype), copy=False)
            bind_shape(value.shape, array.shape, self.bindings, f"input {name!r}")
            self.values[value] = array
        kept = {*graph.outputs.values(), *graph.gradients.values()}
        updated = set(graph.updates.values()) - kept
        last = {v: node for node in graph.nodes for v in node.inputs}
        for node in graph.nodes:
            self._visit(node)
            for value in (*node.inputs, *node.outputs):
                if last.get(value, node) is not node or value in kept:
                    continue
                if value in updated:
                    self.values[value] = self.values[value].astype(value.dtype.numpy)
                else:
                    self.values.pop(value, None)
        return Run(
            {k: self._value(v) for k, v in graph.outputs.items()},
            {s: self._value(v).astype(s.dtype.numpy) for s, v in graph.updates.items()},
            {s: self._value(v) for s, v in graph.gradients.items()},
        )

    def _value(self, value: Value) -> np.ndarray:
        """A value that was computed, or that of a state, which is read when it is needed."""
        if value not in self.values and value.state is not None:
            array = self.store[value.state]
            self.values[value] = array.astype(self._dtype(value.dtype), copy=False)
        return self.values[value]

    def _dtype(self, dtype: DType) -> np.dtype:
        return (self.precision if self.precision and dtype.is_float else dtype).numpy

    def _visit(self, node: Node) -> None:
        if node.op.declared:
            raise GraphError(f"{node} has no mode yet; call specialise(graph, training=...) first")
        op = node.op.bind(self.bindings)
        if self.precision:
            op = _in_precision(op, self.precision)
        results = op.evaluate(*(self._value(v) for v in node.inputs))
        for value, result in zip(node.outputs, results):
            self.values[value] = result
            for declared, size in zip(value.shape, result.shape):
                if isinstance(declared, Dim) and node.op.introduces:
                    self.bindings.setdefault(str(declared), size)


def check_names(graph: Graph, inputs: Mapping[str, object]) -> None:
    """Raise `GraphError` for an input the graph has not, or one that is missing."""
    unknown = [n for n in inputs if n not in graph.inputs]
    missing = [n for n, v in graph.inputs.items() if n not in inputs and v.default is None]
    if unknown or missing:
        problem = f"no input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is not given"
        raise GraphError(f"{graph.name}: {problem}; the inputs are: {', '.join(graph.inputs)}")


def _in_precision(op: Op, precision: DType) -> Op:
    """`op` with floating dtype attributes replaced."""
    wider = {
        name: precision
        for name, value in op.attributes().items()
        if isinstance(value, DType) and value.is_float
    }
    return dataclasses.replace(op, **wider) if wider else op
