"""Copies of a part of a network as branches, and the origin of the states they need.

A copy of branch i stands at the location of the original inside the branch. It reads what it does
not copy: a common trunk, common inputs, states. Random streams are its own, so that branches draw
different dropout masks. New states are cut from old ones by slices, which move elements only: the
slots of an optimiser follow (`materialise.carry_slots`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from branchgraph.ir.graph import Graph, Location, Node, Scope, Value, at
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.state import State
from branchgraph.passes.share_weights.channel_halves import taken

#: Positions along axes that a new state takes from an old one.
Positions = tuple[tuple[int, tuple[int, ...]], ...]


class Origin:
    """The graph that gives new states their values from old ones."""

    def __init__(self, name: str) -> None:
        self.graph = Graph(f"{name}.origin")
        self._cuts: dict[tuple[State, Positions], Value] = {}

    def cut(self, new: State, old: State, positions: Positions) -> None:
        """`new` takes the elements of `old` at `positions`."""
        self.graph.update(new, self._cut(old, positions))

    def zero(self, new: State) -> None:
        """`new` starts at 0."""
        full = Full(value=0.0, shape=new.shape, dtype=new.dtype)
        self.graph.update(new, self.graph.emit(full))

    def _cut(self, old: State, positions: Positions) -> Value:
        if not positions:
            return self.graph.read(old)
        if (old, positions) not in self._cuts:
            *before, (axis, chosen) = positions
            value = self._cut(old, tuple(before))
            with at(()):
                self._cuts[old, positions] = taken(value, axis, chosen)
        return self._cuts[old, positions]


class BranchCopy:
    """One branch; subclasses change what a node becomes."""

    def __init__(
        self, graph: Graph, number: int, origin: Origin, mapped: dict[Value, Value], streams: int
    ) -> None:
        self.graph = graph
        self.number = number
        self.name = f"branch{number}"
        self.origin = origin
        self.mapped = mapped
        self.streams = streams
        #: States that only this branch has.
        self.states: list[State] = []
        self._own: dict[State, Value] = {}

    def run(self, nodes: Iterable[Node]) -> None:
        """Copy `nodes`; `mapped` takes their values to those of the branch."""
        for node in nodes:
            inputs = tuple(self.mapped.get(v, v) for v in node.inputs)
            with at(self.place(node.scope)):
                outputs = self.visit(node, inputs)
            self.mapped.update(zip(node.outputs, outputs))

    def place(self, location: Location = ()) -> Location:
        """`location` inside the branch."""
        return (Scope(self.name, branch=True), *location)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """The values of the branch for the outputs of `node`; by default the same op."""
        types = (v.type for v in node.outputs)
        op = self._with_own_stream(node.op)
        return self.graph.insert(op, inputs, types, node.name, self.place(node.scope))

    def applied(self, node: Node, *inputs: Value) -> tuple[Value, ...]:
        """The op of `node` over other operands."""
        return self.graph.apply(node.op, *inputs, name=node.name)

    def own(self, old: State, *orders: Sequence[int]) -> Value:
        """A state of this branch that starts as `old`, its first axes in `orders`."""
        if old not in self._own:
            shape = (*map(len, orders), *old.shape[len(orders) :])
            new = dataclasses.replace(old, name=f"{self.name}/{old.name}", shape=shape)
            kept = tuple((axis, tuple(order)) for axis, order in enumerate(orders))
            self.origin.cut(new, old, kept)
            self.states.append(new)
            self._own[old] = self.graph.read(new)
        return self._own[old]

    def _with_own_stream(self, op: Op) -> Op:
        stream = getattr(op, "stream", None)
        if stream is None or self.number == 1:
            return op
        return dataclasses.replace(op, stream=stream + (self.number - 1) * self.streams)  # type: ignore[call-arg]
