"""The verifier: every contract of the graph, checked; run after every pass.

Raises `GraphError` naming the first node or root that breaks a rule.
"""

from __future__ import annotations

from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.ops.rows import Compact
from branchgraph.ir.types import TensorType


def verify(graph: Graph) -> None:
    """Raise `GraphError` unless `graph` is well formed."""
    defined: set[Value] = {*graph.inputs.values(), *graph.reads.values()}
    symbols = {s for v in graph.inputs.values() for s in _symbols(v.type)}
    introduced: dict[str, Node] = {}
    for node in graph.nodes:
        _check_operands(node, defined)
        _check_types(node)
        _check_symbols(node, symbols, introduced)
        defined.update(node.outputs)
    _check_roots(graph, defined)


def _check_operands(node: Node, defined: set[Value]) -> None:
    for value in node.inputs:
        if value not in defined:
            raise GraphError(f"{node} reads {value.label}, which is not defined before it")
        if node not in value.users:
            raise GraphError(f"{value.label} does not list its user {node}")


def _check_types(node: Node) -> None:
    node.op.check_arity(len(node.inputs))
    inferred = node.op.infer(*(v.type for v in node.inputs))
    recorded = tuple(v.type for v in node.outputs)
    if inferred != recorded:
        raise GraphError(f"{node}: inference gives {inferred}, recorded is {recorded}")


def _check_symbols(node: Node, known: set[str], introduced: dict[str, Node]) -> None:
    for symbol in node.op.introduces:
        first = introduced.setdefault(symbol, node)
        same_mask = isinstance(first.op, Compact) and first.inputs[0] is node.inputs[0]
        if (symbol in known and first is node) or not same_mask:
            raise GraphError(f"{node} introduces the symbol {symbol}, which exists already")
        known.add(symbol)
    for value in node.outputs:
        for symbol in _symbols(value.type):
            if symbol not in known:
                raise GraphError(f"{node}: symbol {symbol} comes from no input and no compaction")


def _symbols(type: TensorType) -> list[str]:
    return [s for d in type.shape if isinstance(d, Dim) for s in d.symbols]


def _check_roots(graph: Graph, defined: set[Value]) -> None:
    for name, value in graph.outputs.items():
        if value not in defined:
            raise GraphError(
                f"output {name!r} reads {value.label}, which the graph does not define"
            )
    for kind, roots in (("update", graph.updates), ("gradient", graph.gradients)):
        for state, value in roots.items():
            if value not in defined:
                raise GraphError(f"{kind} of {state.name} reads a value the graph does not define")
            if value.type != state.type:
                raise GraphError(f"{kind} of {state.name}: {value.type} is not {state.type}")


def declared_ops(graph: Graph) -> list[Node]:
    """Nodes whose mode has not been chosen."""
    return [n for n in graph.nodes if n.op.declared]
