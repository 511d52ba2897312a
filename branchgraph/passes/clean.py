"""Housekeeping passes: dead code, common sub-expressions, constants, canonical form.

All four claim `equal`: the same values at every root, NaN in the same places.

    dead code      a node no output, update or gradient needs is removed (updates are roots; so is
                   a declared batch norm that in training moves statistics which stay)
    common         two nodes with one op and the same inputs become one
    constants      full(c) through data movement and scalar arithmetic is evaluated once
    canonical      add(a, b) of one type -> sum(a, b);  sum(sum(a, b), c) -> sum(a, b, c)
                   sum(x), mean(x), product(x), maximum(x), concat(x) -> x
                   cast to its own dtype -> x
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import Dim
from branchgraph.ir.graph import Graph, Node, Value, at, shared_scope
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Add, Cast
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.ops.reduce import BroadcastTo
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.passes.base import Pass, Report


@dataclass(frozen=True)
class DeadCode(Pass, spelling="dead_code", claim="equal"):
    """Remove what no root needs; inputs stay, since they are the signature."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        alive = living(graph)
        for node in graph.nodes:
            if node not in alive:
                report.matched(node)
        keep_only(graph, alive)


def keep_only(graph: Graph, nodes: set[Node]) -> None:
    """Remove all nodes but `nodes`, and the states that nothing reads then."""
    graph.keep(node=nodes.__contains__)
    rooted = set(graph.roots)
    reads = {s for s, v in graph.reads.items() if v.users or v in rooted}
    graph.keep(read=reads.__contains__)


def drop_inputs(graph: Graph, idle: Callable[[Value], bool]) -> None:
    """Remove inputs that are `idle`, but those that alone bring a symbol that a node has still."""
    inputs = graph.inputs.values()
    wanted = {s for n in graph.nodes for v in n.outputs for s in _symbols(v)}
    wanted -= {s for v in inputs if not idle(v) for s in _symbols(v)}
    kept = set()
    for value in inputs:
        brought = wanted.intersection(_symbols(value))
        if brought or not idle(value):
            kept.add(value.name)
            wanted -= brought
    graph.keep(input=kept.__contains__)


def _symbols(value: Value) -> list[str]:
    return [s for size in value.shape if isinstance(size, Dim) for s in size.symbols]


def living(graph: Graph) -> set[Node]:
    """What outputs, updates and gradients need, those that the mode will bring among them.

    In training a declared batch norm moves its running statistics, whether its result is read or
    not. Where anything that lives reads them too (a second application, an output), it lives.
    """
    found = needed(graph.roots)
    norms = [n for n in graph.nodes if isinstance(n.op, BatchNorm) and n not in found]
    while norms:
        read = {*graph.roots, *(v for n in found for v in n.inputs)}
        moving = [n for n in norms if any(v in read for v in n.inputs[3:] if v.state)]
        if not moving:
            break
        found |= nodes_below(moving)
        norms = [n for n in norms if n not in found]
    return found


def needed(values: Iterable[Value]) -> set[Node]:
    """The nodes that `values` depend on."""
    return nodes_below(v.producer for v in values if v.producer)


def nodes_below(tops: Iterable[Node]) -> set[Node]:
    """`tops` and every node they depend on."""
    found: set[Node] = set()
    pending = list(tops)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += (v.producer for v in node.inputs if v.producer)
    return found


@dataclass(frozen=True)
class CommonSubexpressions(Pass, spelling="common_subexpressions", claim="equal"):
    """Compute each thing once. Ops that introduce a symbol or have no mode yet stay apart.

    What two branches share stands in the scope they share: it belongs to neither of them.
    """

    def rewrite(self, graph: Graph, report: Report) -> None:
        seen: dict[tuple[Op, tuple[Value, ...]], Node] = {}
        for node in graph.nodes:
            if node.op.introduces or node.op.declared:
                continue
            first = seen.setdefault((node.op, node.inputs), node)
            if first is not node:
                report.matched(node)
                first.scope = shared_scope(first.scope, node.scope)
                for old, new in zip(node.outputs, first.outputs):
                    graph.replace(old, new)
                graph.remove(node)


@dataclass(frozen=True)
class Constants(Pass, spelling="constants", claim="equal"):
    """Fold ops whose operands are all filled constants and whose result is one too."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        for node in graph.nodes:
            value = _folded(node)
            if value is None:
                continue
            report.matched(node)
            with at(node.scope):
                full = Full(value=value, shape=node.output.shape, dtype=node.output.dtype)
                graph.replace(node.output, graph.emit(full))
            graph.remove(node)
        graph.touch()


def _folded(node: Node) -> float | None:
    """The one number that fills the result of `node`, if that can be known."""
    moves = isinstance(node.op, (Reshape, BroadcastTo))
    if len(node.outputs) != 1 or node.op.declared or (node.op.symbolic and not moves):
        return None
    constants = [v.producer.op if v.producer else None for v in node.inputs]
    fills = [op for op in constants if isinstance(op, Full)]
    if len(fills) != len(constants) or not fills:
        return None
    if moves:
        return fills[0].value
    if any(f.shape for f in fills) or node.output.shape:
        return None
    arrays = (np.array(f.value, f.dtype.numpy) for f in fills)
    with np.errstate(all="ignore"):
        (result,) = node.op.evaluate(*arrays)
    return float(result)


@dataclass(frozen=True)
class Canonical(Pass, spelling="canonical", claim="equal"):
    """One spelling for one thing, so that patterns and hashes need to know only that."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        for node in graph.nodes:
            replacement = self._replacement(graph, node)
            if replacement is not None:
                report.matched(node)
                first = node.inputs[0].producer
                graph.replace(node.output, replacement)
                graph.remove(node)
                if first is not None and _is_dead_sum(first):
                    graph.remove(first)
        graph.touch()

    def _replacement(self, graph: Graph, node: Node) -> Value | None:
        op = node.op
        if isinstance(op, (Sum, Mean, Product, Maximum, Concat)) and len(node.inputs) == 1:
            return node.inputs[0]
        if isinstance(op, Cast) and node.inputs[0].dtype == op.dtype:
            return node.inputs[0]
        if isinstance(op, (Add, Sum)) and _same_types(node):
            terms = _terms(node)
            if isinstance(op, Add) or len(terms) != len(node.inputs):
                with at(node.scope):
                    return graph.emit(Sum(), *terms, name=node.name)
        return None


def _is_dead_sum(node: Node) -> bool:
    """Whether `node` is a sum whose operands were spliced into its only reader."""
    dead = not node.outputs[0].users and node.outputs[0] not in node.graph.roots
    return isinstance(node.op, Sum) and dead


def _same_types(node: Node) -> bool:
    return all(v.type == node.output.type for v in node.inputs)


def _terms(node: Node) -> list[Value]:
    """Operands of a sum whose first operand, when a sum only this node reads, is spliced in.

    Only the left operand: sums are added from left to right, so the order of additions stays.
    """
    first, *rest = node.inputs
    inner = first.producer
    spliced = (
        inner is not None
        and isinstance(inner.op, Sum)
        and first.users == [node]
        and first not in node.graph.roots
        and first not in rest
    )
    return [*inner.inputs, *rest] if spliced and inner is not None else list(node.inputs)
