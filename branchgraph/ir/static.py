"""Static values: what only states decide, and so is known before any input comes."""

from __future__ import annotations

from branchgraph.ir.graph import Graph, Value


def static_values(graph: Graph) -> set[Value]:
    """Values whose leaves are states that `graph` does not update (and at least one state)."""
    static = {v for s, v in graph.reads.items() if s not in graph.updates}
    fixed = set(static)
    for node in graph.nodes:
        if node.op.declared or node.op.introduces or node.op.symbolic:
            continue
        if all(v in fixed for v in node.inputs):
            fixed.update(node.outputs)
            if node.inputs and any(v in static for v in node.inputs):
                static.update(node.outputs)
    return static


def frontier(graph: Graph, static: set[Value]) -> list[Value]:
    """The static values that something else reads: states first, then results of nodes."""
    values = [*graph.reads.values(), *(v for node in graph.nodes for v in node.outputs)]
    roots = set(graph.roots)
    return [
        v for v in values
        if v in static
        and (v in roots or any(out not in static for user in v.users for out in user.outputs))
    ]  # fmt: skip
