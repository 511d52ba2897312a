"""Fusing the averaging maps of merge-and-run where nothing but sums lies between them.

The map of K streams to their mean, M = (1/K) [[I ... I] ... [I ... I]], is idempotent, M M = M:

    mean(m, ..., m)                    = m                                    equal means being one
    mean(mean(a, b), mean(c, d))       = mean(a, b, c, d)                     equally many operands
    mean(m + r_1, ..., m + r_K)        = m + mean(r_1, ..., r_K)

so behind merge-and-run without activation, y_i = m + r_i, the next mean needs m only once.

All are linear and exact (arXiv 1611.07718).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from branchgraph.ir.builder import merge_mean, merge_sum
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.ops.elementwise import Add
from branchgraph.ir.ops.merge import Mean, Sum
from branchgraph.passes.base import Pass, Report


@dataclass(frozen=True)
class FuseMeans(Pass, spelling="fuse_means", claim="exact"):
    """Take what all operands of a mean share out of it, and flatten means of means."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        known = {n for n in graph.nodes if isinstance(n.op, Mean)}
        while self._sweep(graph, report, known):
            graph.touch()

    def _sweep(self, graph: Graph, report: Report, known: set[Node]) -> bool:
        """Rewrite every mean once; whether there was anything to do."""
        seen: dict[tuple[Value, ...], Node] = {}
        before = len(report.matches)
        for node in graph.nodes:
            if not isinstance(node.op, Mean):
                continue
            twin = seen.get(node.inputs)
            if twin is not None and twin in graph:
                report.matched(node)
                self._replace(graph, node, twin.output)
                continue
            with at(node.scope):
                new = _idempotent(node) or _nested(node) or _shared(node)
            if new is None:
                seen[node.inputs] = node
                continue
            old, made = ([node.output], [new]) if node in known else ([], [])
            report.matched(node, before=old, after=made)
            self._replace(graph, node, new)
        return len(report.matches) > before

    def _replace(self, graph: Graph, node: Node, new: Value) -> None:
        """Let `new` stand for the mean, and take out what was there for it alone."""
        graph.replace(node.output, new)
        operands = [v.producer for v in node.inputs]
        graph.remove(node)
        _remove_dead(graph, [n for n in operands if n is not None])


def _idempotent(node: Node) -> Value | None:
    """mean(m, ..., m) = m."""
    return node.inputs[0] if len(set(node.inputs)) == 1 else None


def _nested(node: Node) -> Value | None:
    """mean(mean(a, b), mean(c, d)) = mean(a, b, c, d), unless the inner means are needed anyway."""
    inner = [v.producer for v in node.inputs if v.producer and isinstance(v.producer.op, Mean)]
    alone = all(n.output.users == [node] and n.output not in n.graph.roots for n in inner)
    if len(inner) < len(node.inputs) or not alone or len({len(n.inputs) for n in inner}) > 1:
        return None
    return merge_mean(*(v for n in inner for v in n.inputs), name=node.name)


def _terms(value: Value) -> tuple[Value, ...]:
    """The summands of a sum."""
    node = value.producer
    if node is None or not isinstance(node.op, (Sum, Add)):
        return (value,)
    return node.inputs if all(v.type == value.type for v in node.inputs) else (value,)


def _shared(node: Node) -> Value | None:
    """mean(m + r_1, ..., m + r_K) = m + mean(r_1, ..., r_K)."""
    terms = [_terms(v) for v in node.inputs]
    counts = [Counter(found) for found in terms]
    common = counts[0]
    for found in counts[1:]:
        common = common & found
    kept = _split(terms[0], common)[0]
    rests = [_split(found, common)[1] for found in terms]
    if not kept or not all(rests):
        return None
    parts = [merge_sum(*rest) if len(rest) > 1 else rest[0] for rest in rests]
    return merge_sum(*kept, merge_mean(*parts, name=node.name))


def _split(terms: Sequence[Value], common: Counter[Value]) -> tuple[list[Value], list[Value]]:
    """Terms that are among the common ones, each as often as it is there, and the others."""
    left = Counter(common)
    shared: list[Value] = []
    rest: list[Value] = []
    for value in terms:
        inside = left[value] > 0
        left[value] -= inside
        (shared if inside else rest).append(value)
    return shared, rest


def _remove_dead(graph: Graph, nodes: list[Node]) -> None:
    """Take out merges that nobody reads any more."""
    roots = set(graph.roots)
    for node in dict.fromkeys(nodes):
        merges = node in graph and isinstance(node.op, (Mean, Sum, Add))
        if merges and not any(v.users or v in roots for v in node.outputs):
            graph.remove(node)
