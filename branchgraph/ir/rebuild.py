"""Walking a graph into a new one: the base of copies, lowerings and most passes.

`Rebuild` visits nodes in topological order and emits each into a new graph; subclasses override
`visit` to emit something else. `clone` is the identity rebuild, `bind` the one that gives symbolic
dimensions a value.
"""

from __future__ import annotations

from collections.abc import Mapping

from branchgraph.ir.dims import DimLike, as_dim, substitute_shape
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.state import State


class Rebuild:
    """One walk over `old` that fills `new`; `mapped` takes old values to new ones."""

    def __init__(self, old: Graph, name: str | None = None) -> None:
        self.old = old
        self.new = Graph(name or old.name)
        self.mapped: dict[Value, Value] = {}

    def run(self) -> Graph:
        """The new graph."""
        self.begin()
        for value in self.old.inputs.values():
            self.mapped[value] = self.visit_input(value)
        for state, value in self.old.reads.items():
            self.mapped[value] = self.visit_state(state)
        for node in self.old.nodes:
            inputs = tuple(self.mapped[v] for v in node.inputs)
            with at(node.scope):
                outputs = self.visit(node, inputs)
            self.mapped.update(zip(node.outputs, outputs))
        self.finish()
        return self.new

    def begin(self) -> None:
        """Called before the walk."""

    def visit_input(self, value: Value) -> Value:
        """The new value for an input."""
        return self.new.input(value.name, value.shape, value.dtype, value.default)

    def visit_state(self, state: State) -> Value:
        """The new value for the reading of a state."""
        return self.new.read(state)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """The new values for the outputs of `node`; by default the same op."""
        return self.new.apply(node.op, *inputs, name=node.name)

    def finish(self) -> None:
        """Carry outputs, updates and gradients over."""
        for name, value in self.old.outputs.items():
            self.new.output(name, self.mapped[value])
        for state, value in self.old.updates.items():
            self.new.update(state, self.mapped[value])
        for state, value in self.old.gradients.items():
            self.new.set_gradient(state, self.mapped[value])


class _Clone(Rebuild):
    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        types = (v.type for v in node.outputs)
        return self.new.insert(node.op, inputs, types, node.name, node.scope)


def clone(graph: Graph) -> Graph:
    """A copy that shares only the states."""
    return _Clone(graph).run()


def clone_with_map(graph: Graph) -> tuple[Graph, Mapping[Value, Value]]:
    """A copy, and the map from old values to new ones."""
    copying = _Clone(graph)
    return copying.run(), copying.mapped


class _Bind(Rebuild):
    def __init__(self, old: Graph, bindings: Mapping[str, DimLike]) -> None:
        super().__init__(old)
        self.bindings = bindings

    def visit_input(self, value: Value) -> Value:
        shape = substitute_shape(value.shape, self.bindings)
        return self.new.input(value.name, shape, value.dtype, value.default)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        return self.new.apply(node.op.bind(self.bindings), *inputs, name=node.name)


def bind(graph: Graph, **sizes: DimLike | str) -> Graph:
    """The graph with symbols replaced: `bind(g, N=16)`."""
    return _Bind(graph, {k: as_dim(v) for k, v in sizes.items()}).run()
