"""Inserting and removing early exits.

`insert_exits` puts a head (a small classifier) behind chosen values and marks its logits as a way
out; the network's own output becomes the last exit. `remove_exits` takes all early exits out again:
the network without branches. Both claim `different`: another network on purpose. Heads (C channels
at the tap, K classes):

    conv   pool 2/2, relu, conv 2C 3x3 pad 1, pool 2/2, relu, dense K      (BranchyNet's LeNet)
    pool   global average pool, dense K
    dense  dense K
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from branchgraph.ir.builder import (
    conv,
    dense,
    exit,
    flatten,
    global_average_pool,
    max_pool,
    relu,
)
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Graph, Node, Value, at, branch
from branchgraph.ir.ops.exit import RELATIONS, Exit
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.clean import DeadCode


def conv_head(tap: Value, classes: int) -> Value:
    """BranchyNet's branch: pool, relu, convolution to 2C channels, pool, relu, classifier."""
    channels = tap.shape[1]
    assert isinstance(channels, int)
    h = relu(max_pool(tap, 2, cover_all=True))
    h = conv(h, 2 * channels, 3, pad=1, name="conv")
    h = relu(max_pool(h, 2, cover_all=True))
    return dense(h, classes, name="fc")


def pool_head(tap: Value, classes: int) -> Value:
    """Global average pooling and a classifier."""
    return dense(global_average_pool(tap), classes, name="fc")


def dense_head(tap: Value, classes: int) -> Value:
    """A classifier on all features."""
    return dense(flatten(tap), classes, name="fc")


HEADS: dict[str, Callable[[Value, int], Value]] = {
    "conv": conv_head,
    "pool": pool_head,
    "dense": dense_head,
}


@dataclass(frozen=True)
class InsertExits(Pass, spelling="insert_exits", claim="different"):
    """Put early exits behind the nodes named in `after` (paths or names, joined by + in a spec)."""

    after: tuple[str, ...]
    head: str = "conv"
    criterion: str = "entropy"
    threshold: float = 0.5

    def check(self) -> None:
        if self.head not in HEADS:
            raise GraphError(f"unknown head {self.head!r}; known: {', '.join(HEADS)}")
        if self.criterion not in RELATIONS:
            raise GraphError(f"unknown criterion {self.criterion!r}; known: {', '.join(RELATIONS)}")

    def rewrite(self, graph: Graph, report: Report) -> None:
        taps = [graph.find(name) for name in self.after]
        missing = [n for n in taps if not self._has_exit(n)]
        for node in (n for n in taps if n not in missing):
            report.refused(node, "it has an exit already")
        if not missing:
            return
        name, logits = self._way_out(graph)
        graph.keep(output=lambda n: n != name)
        for node in sorted(missing, key=graph.nodes.index):
            report.matched(node)
            self._insert(graph, node, _classes(logits))
        self._close(graph, name, logits)

    def _has_exit(self, node: Node) -> bool:
        """Whether a branch that ends in an exit reads the node."""
        exits = (n.scope for n in node.graph.nodes if isinstance(n.op, Exit) and n.scope)
        branches = {s for s in exits if s[-1].branch}
        return any(u.scope in branches for v in node.outputs for u in v.users)

    def _way_out(self, graph: Graph) -> tuple[str, Value]:
        """Name and value of the output that takes what no early exit takes."""
        last = {n.output for n in graph.nodes if isinstance(n.op, Exit) and len(n.inputs) == 1}
        found = [(k, v) for k, v in graph.outputs.items() if v in last or not last]
        if len(found) != 1:
            raise RefusalError(
                "insert_exits needs one output, the logits; there are: " + ", ".join(graph.outputs)
            )
        return found[0]

    def _close(self, graph: Graph, name: str, logits: Value) -> None:
        """Mark the network's own output as the last exit, unless it is marked; list it last."""
        if logits.producer is not None and isinstance(logits.producer.op, Exit):
            graph.output(name, logits)
        else:
            exit(logits, f"exit{len(self.after) + 1}", criterion=self.criterion, last=True)

    def _insert(self, graph: Graph, node: Node, classes: int) -> None:
        before = set(graph.nodes)
        taken = {n.op.name for n in graph.nodes if isinstance(n.op, Exit)} | set(graph.outputs)
        name = next(n for k in count(1) if (n := f"exit{k}") not in taken)
        with at(node.scope), branch(name):
            logits = HEADS[self.head](node.output, classes)
            previous = self._previous(graph, node)
            exit(
                logits, name, criterion=self.criterion, threshold=self.threshold, previous=previous
            )
        graph.place_after(node, [n for n in graph.nodes if n not in before])

    def _previous(self, graph: Graph, node: Node) -> list[Value]:
        """Logits of the exits before `node`, which patience counts."""
        if self.criterion != "patience":
            return []
        order = {n: i for i, n in enumerate(graph.nodes)}
        return [
            n.inputs[0]
            for n in graph.nodes
            if isinstance(n.op, Exit) and len(n.inputs) > 1 and order[n] < order[node]
        ]


def _classes(logits: Value) -> int:
    if len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
        raise RefusalError(f"logits must be [N, classes], got {logits.type}")
    return logits.shape[1]


@dataclass(frozen=True)
class RemoveExits(Pass, spelling="remove_exits", claim="different"):
    """Take all early exits out; what is left computes `logits` with the last one."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        exits = [n for n in graph.nodes if isinstance(n.op, Exit)]
        early = {n.output for n in exits if len(n.inputs) > 1}
        if not exits:
            return
        last = [n for n in exits if len(n.inputs) == 1]
        if len(last) != 1:
            raise RefusalError(f"there must be one last exit, there are {len(last)}")
        for node in exits:
            report.matched(node)
        kept = {
            k: v for k, v in graph.outputs.items() if v not in early and v is not last[0].output
        }
        graph.keep(output=kept.__contains__)
        graph.output("logits", last[0].inputs[0])
        DeadCode().rewrite(graph, Report(self.name))
        thresholds = {n.inputs[1].name for n in exits if len(n.inputs) > 1}
        graph.keep(input=lambda name: name not in thresholds)
