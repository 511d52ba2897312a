"""Cutting a part out of a graph: what computes some values from a boundary, by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from branchgraph.ir.graph import Graph, Node, Value


def extract(values: Iterable[Value], boundary: Collection[Value], name: str = "part") -> Graph:
    """A graph with outputs `y0`, `y1`, ... that computes `values`.

    Values of `boundary` become inputs `x0`, `x1`, ... in their order (`x0_` where an input of the
    graph is called `x0`); where the walk back reaches none of them it ends at inputs, which keep
    their names and defaults, and at states.
    """
    wanted = list(values)
    new = Graph(name)
    taken = {n for v in (*wanted, *boundary) for n in v.graph.inputs}
    mapped = {v: _boundary(new, f"x{i}", v, taken) for i, v in enumerate(boundary)}
    for node in nodes_between(wanted, mapped):
        for value in node.inputs:
            if value not in mapped:
                mapped[value] = _leaf(new, value)
        inputs = tuple(mapped[v] for v in node.inputs)
        types = (v.type for v in node.outputs)
        made = new.insert(node.op, inputs, types, node.name, node.scope)
        for old, fresh in zip(node.outputs, made):
            mapped.setdefault(old, fresh)
    for i, value in enumerate(wanted):
        if value not in mapped:
            mapped[value] = _leaf(new, value)
        new.output(f"y{i}", mapped[value])
    return new


def nodes_between(values: Iterable[Value], boundary: Collection[Value]) -> list[Node]:
    """The nodes that compute `values` from `boundary`, producers first."""
    done: dict[Node, None] = {}
    entered: set[Node] = set()
    pending: list[tuple[Node, bool]] = [(p, False) for p in _producers(values, boundary)]
    while pending:
        node, ready = pending.pop()
        if ready:
            done[node] = None
        elif node not in entered:
            entered.add(node)
            pending.append((node, True))
            pending += [(p, False) for p in _producers(node.inputs, boundary)]
    return list(done)


def _producers(values: Iterable[Value], boundary: Collection[Value]) -> list[Node]:
    return [v.producer for v in values if v.producer is not None and v not in boundary]


def _boundary(graph: Graph, name: str, value: Value, taken: set[str]) -> Value:
    while name in taken:
        name += "_"
    return graph.input(name, value.shape, value.dtype)


def _leaf(graph: Graph, value: Value) -> Value:
    """The value of `graph` for an input or a state of another one."""
    if value.state is not None:
        return graph.read(value.state)
    known = graph.inputs.get(value.name)
    return known or graph.input(value.name, value.shape, value.dtype, value.default)
