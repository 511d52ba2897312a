"""Parameter expressions made leaves: what a pass wrote over states is evaluated once, in float64.

A value is *static* when all its leaves are states that the graph does not update; what is computed
from a loss scale is not, since every training of the graph moves that. `materialise` cuts the graph
at the static values that other nodes read, puts a new state at each cut, and returns the origin: a
graph whose updates give every new state from the old ones. The origin is provenance, checkpoint
map, and the carrier of optimiser slots.

Origins compose. With s' = f(s) made by one step and s'' = g(s, s') by the next,

    composed(f, g):    s' = f(s),   s'' = g(s, f(s))

so a chain of steps has one origin over the states that were there before all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Embed, Reshape, Slice, Split, Transpose
from branchgraph.ir.rebuild import Rebuild, clone, clone_with_map
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.static import frontier, static_values
from branchgraph.ir.types import DType
from branchgraph.passes.clean import DeadCode, nodes_below

#: Ops that only move elements: an optimiser slot moves as its parameter does.
_MOVES = (Slice, Embed, Split, Concat, Reshape, Transpose)


def materialise(graph: Graph) -> tuple[Graph, Graph]:
    """(graph with new states in place of static expressions, origin).

    `evaluate_origin(origin, store)` gives the new states their values. A graph without static
    expressions comes back as a copy, with an origin that updates nothing.
    """
    new, mapped = clone_with_map(graph)
    static = {mapped[v] for v in static_values(graph)} - _scaled(new)
    states = {v: _state_for(v) for v in frontier(new, static) if v.producer is not None}
    origin = _origin(new, states)
    for value, state in states.items():
        new.replace(value, new.read(state))
    return DeadCode().apply(new), origin


def _scaled(graph: Graph) -> set[Value]:
    """Loss scales and what is computed from them."""
    found = {v for s, v in graph.reads.items() if s.role is Role.LOSS_SCALE}
    for node in graph.nodes:
        if any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _state_for(value: Value) -> State:
    node = value.producer
    assert node is not None
    shape = tuple(d for d in value.shape if isinstance(d, int))
    roles = {leaf.role for leaf in _states_below(node)}
    role = Role.PARAMETER if Role.PARAMETER in roles else sorted(roles, key=lambda r: r.value)[0]
    return State(node.path or node.op.opcode, shape, value.dtype, role, Zeros())


def _states_below(node: Node) -> set[State]:
    values = (v for n in nodes_below([node]) for v in n.inputs)
    return {v.state for v in values if v.state is not None}


def _origin(graph: Graph, states: Mapping[Value, State]) -> Graph:
    """The part of `graph` that computes `states`."""
    copy, mapped = clone_with_map(graph)
    copy.keep(output=lambda n: False, update=lambda s: False, gradient=lambda s: False)
    for value, state in states.items():
        copy.update(state, mapped[value])
    origin = DeadCode().apply(copy)
    origin.keep(input=lambda n: False)
    origin.name = f"{graph.name}.origin"
    return origin


def evaluate_origin(origin: Graph, store: Store) -> None:
    """Give the new states of `origin` their values, computed in float64 and cast once."""
    for state, value in interpret(origin, {}, store, precision=DType.F64).updates.items():
        store[state] = value


def composed(first: Graph, second: Graph) -> Graph:
    """One origin for two steps: what `second` reads of new states of `first`, written out.

    It gives the new states of both, those of `second` where both make the same one.
    """
    return _Behind(first, second).run()


class _Behind(Rebuild):
    """An origin written behind another one."""

    def __init__(self, first: Graph, second: Graph) -> None:
        super().__init__(second)
        self.new = clone(first)
        self.ready = dict(self.new.updates)

    def visit_state(self, state: State) -> Value:
        return self.ready[state] if state in self.ready else self.new.read(state)

    def finish(self) -> None:
        for state, value in self.old.updates.items():
            self.new.update(state, self.mapped[value])


def origin_of(states: Collection[State], origin: Graph) -> Graph:
    """The part of `origin` that gives `states`, as far as it does."""
    used, part = set(states), clone(origin)
    part.keep(update=used.__contains__)
    return DeadCode().apply(part)


def provenance(origin: Graph) -> dict[State, list[State]]:
    """For each new state of an origin, the states it is computed from, in order of first use."""
    found: dict[State, list[State]] = {}
    for state, value in origin.updates.items():
        below = nodes_below([value.producer]) if value.producer else set()
        reads = {v.state for n in below for v in n.inputs if v.state is not None}
        if value.state is not None:
            reads.add(value.state)
        found[state] = [s for s in origin.states if s in reads]
    return found


@dataclass
class Carried:
    """What became of optimiser slots: new slots by (state, name), and the states reset to zero."""

    slots: dict[tuple[State | None, str], State] = field(default_factory=dict)
    reset: list[State] = field(default_factory=list)


def carry_slots(
    origin: Graph, slots: Mapping[tuple[State | None, str], State], store: Store
) -> Carried:
    """Slots of the new states of `origin`, moved as their parameters were.

    Where an expression only moves elements (slices, concats, embeddings), a slot is the same
    expression over the old slots; elsewhere it starts at its initial value and is listed in
    `reset`. Slots of parameters that `origin` does not touch are kept.
    """
    carried = Carried(dict(slots))
    names = list(dict.fromkeys(name for state, name in slots if state is not None))
    for new_state, value in origin.updates.items():
        for name in names if new_state.role.trainable else ():
            moved = _moved_slot(origin, new_state, value, name, slots)
            if moved is None:
                carried.reset.append(new_state)
                continue
            slot, graph = moved
            evaluate_origin(graph, store)
            carried.slots[new_state, name] = slot
    return carried


def _moved_slot(
    origin: Graph,
    new_state: State,
    value: Value,
    name: str,
    slots: Mapping[tuple[State | None, str], State],
) -> tuple[State, Graph] | None:
    """A slot for `new_state` and the graph that computes it, if its expression only moves."""
    nodes = nodes_below([value.producer] if value.producer else [])
    below = {v.state for v in (value, *(v for n in nodes for v in n.inputs)) if v.state is not None}
    if not all(isinstance(n.op, _MOVES) for n in nodes) or any(
        (s, name) not in slots for s in below
    ):
        return None
    slot = State(f"{new_state.name}.{name}", new_state.shape, new_state.dtype, Role.SLOT, Zeros())
    only = clone(origin)
    only.keep(update=lambda s: s is new_state)
    only = DeadCode().apply(only)
    return slot, _OverSlots(only, {s: slots[s, name] for s in below}, {new_state: slot}).run()


class _OverSlots(Rebuild):
    """An origin graph read and written over slots instead of parameters."""

    def __init__(
        self, old: Graph, reads: Mapping[State, State], updates: Mapping[State, State]
    ) -> None:
        super().__init__(old)
        self.reads = reads
        self.updates = updates

    def visit_state(self, state: State) -> Value:
        if state not in self.reads:
            raise GraphError(f"{state.name} has no slot to read")
        return self.new.read(self.reads[state])

    def finish(self) -> None:
        for state, value in self.old.updates.items():
            self.new.update(self.updates[state], self.mapped[value])
