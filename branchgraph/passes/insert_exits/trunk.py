"""The trunk of a network: its way to the last result, the places every sample passes, and names.

The trunk is what the way out depends on. A value v of it that has a row for every sample is a
*passage* when every path from the inputs to the way out crosses it. With nodes in topological order
1 ... n and last(u) the last node of the trunk that reads u:

    v, made by node i, is a passage   iff   last(u) <= i for every other u with rows made before i

since a value that is read behind v although it was made before is a way around v. The share of v is
the multiply-accumulates of the nodes 1 ... i over those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from branchgraph.ir.cost import node_macs
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.passes.clean import nodes_below

#: What makes a name a pattern.
_WILD = "*?"


@dataclass(frozen=True)
class Passage:
    """A value that every sample passes, and the work that is done when it is known."""

    node: Node
    macs: int


class Trunk:
    """What computes `way_out` in `graph`."""

    def __init__(self, graph: Graph, way_out: Value) -> None:
        below = nodes_below([way_out.producer] if way_out.producer else [])
        self.batch = way_out.shape[0] if way_out.shape else 1
        self.nodes = [n for n in graph.nodes if n in below]
        self._macs = [_at_one(node_macs(n)) for n in self.nodes]
        self._position = {n: i for i, n in enumerate(self.nodes)}
        self._inputs = [v for v in graph.inputs.values() if self.carries(v)]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(self._macs)

    def carries(self, value: Value) -> bool:
        """Whether `value` has a row for every sample."""
        return bool(value.shape) and value.shape[0] == self.batch

    def share(self, node: Node) -> float:
        """The part of the trunk's MACs that `node` and what it depends on take."""
        before = nodes_below([node])
        done = sum(m for n, m in zip(self.nodes, self._macs) if n in before)
        return done / self.macs if self.macs else 0.0

    def passages(self) -> Iterator[Passage]:
        """Passages in order, the way out itself left out."""
        reach = max((self._last(v) for v in self._inputs), default=-1)
        done = 0
        for i, node in enumerate(self.nodes[:-1]):
            done += self._macs[i]
            last = max((self._last(v) for v in node.outputs if self.carries(v)), default=-1)
            if reach <= i and last > i and len(node.outputs) == 1:
                yield Passage(node, done)
            reach = max(reach, last)

    def _last(self, value: Value) -> int:
        """Position of the last node of the trunk that reads `value`."""
        return max((self._position.get(user, -1) for user in value.users), default=-1)

    def at(self, share: float, fits: Callable[[Value], bool] = lambda v: True) -> Node:
        """The last passage that fits and whose MACs do not exceed `share` of the trunk's."""
        passages = [p for p in self.passages() if fits(p.node.output)]
        found = [p for p in passages if p.macs <= share * self.macs]
        if not found:
            known = "there is none"
            if passages and self.macs:
                first = passages[0]
                known = f"the first is {first.node.output.label}, at {first.macs / self.macs:.3g}"
            raise GraphError(
                "no value that every sample passes and that a head can read is known at "
                f"{share:g} of the MACs; {known}"
            )
        return found[-1].node

    def matching(self, pattern: str) -> list[Node]:
        """Named nodes of the trunk whose path, part by part, or name matches `pattern`."""
        found = [n for n in self.nodes if n.name and matches(pattern, n)]
        if not found:
            known = sorted({n.path for n in self.nodes if n.name})
            raise GraphError(f"no node matches {pattern!r}; there are: {', '.join(known)}")
        return found


def is_pattern(name: str) -> bool:
    """Whether `name` has wildcards."""
    return any(c in name for c in _WILD)


def matches(pattern: str, node: Node) -> bool:
    """Whether the path of `node`, part by part, or its name fits; `*` stays within a part."""
    wanted, parts = pattern.split("/"), node.path.split("/")
    whole = len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted))
    return whole or fnmatchcase(node.name, pattern)


def _at_one(macs: DimLike) -> int:
    """MACs for a batch of one."""
    if isinstance(macs, Dim):
        macs = macs.substitute(dict.fromkeys(macs.symbols, 1))
    assert isinstance(macs, int)
    return macs


def node_cost(node: Node) -> int:
    """MACs of `node` for one sample."""
    return _at_one(node_macs(node))
