"""Forms: what a part of a network looks like from inside, with all names left out.

Two parts have one form when they apply the same ops with the same attributes to values of the same
types, wired in the same way, in scopes nested in the same way. States that only the part reads
count by type and role; what others read too (shared weights) counts as itself. Random streams are
numbered by first use, and where a slice starts is kept apart, so that parts which each take their
own share of a value can be told to do so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from branchgraph.ir.attributes import format_value
from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Role


@dataclass(frozen=True, eq=False)
class Form:
    """The form of a part: its `nodes` in order (folded ones too), and what they look like.

    `outside` are the values that come in, by first use; `starts` says where slices start;
    `sharing` says whether others read its parameters as well.
    """

    nodes: tuple[Node, ...]
    tokens: tuple[object, ...]
    starts: tuple[int, ...]
    outside: tuple[Value, ...]
    sharing: str

    def like(self, other: Form) -> bool:
        """Whether both parts look alike, up to where their slices start."""
        return self.tokens == other.tokens


class Forms:
    """Forms of parts of the drawn `nodes`; nodes in `folded` count to those that need them."""

    def __init__(self, graph: Graph, nodes: Iterable[Node], folded: frozenset[Node]) -> None:
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.folded = folded
        self._attributes: dict[Node, tuple[object, ...]] = {}
        self._needs: dict[Node, list[Node]] = {}
        self._readers: dict[Value, set[Node]] = {}
        for node in nodes:
            for reading in (node, *self.needs(node)):
                for value in filter(_is_leaf, reading.inputs):
                    self._readers.setdefault(value, set()).add(node)

    def needs(self, node: Node) -> list[Node]:
        """Folded nodes that `node` depends on through folded ones."""
        if node not in self._needs:
            found: dict[Node, None] = {}
            pending = [v.producer for v in node.inputs]
            while pending:
                before = pending.pop()
                if before in self.folded and before not in found:
                    found[before] = None
                    pending += (v.producer for v in before.inputs)
            self._needs[node] = list(found)
        return self._needs[node]

    def of(self, part: Iterable[Node], depth: int) -> Form:
        """The form of a part that stands in a scope of `depth` components."""
        own = set(part)
        whole = own.union(*(self.needs(n) for n in own))
        nodes = tuple(sorted(whole, key=self.order.__getitem__))
        return _Reading(self, own, nodes).form(depth)

    def read_by_others(self, value: Value, own: set[Node]) -> bool:
        """Whether a node outside `own` reads the leaf `value`."""
        return not self._readers.get(value, set()) <= own

    def attributes(self, node: Node) -> tuple[object, ...]:
        """Opcode, attributes but for labels, streams and starts, and types of the outputs."""
        if node not in self._attributes:
            types = tuple(v.type for v in node.outputs)
            self._attributes[node] = (node.op.opcode, *_fixed(node.op), types)
        return self._attributes[node]


class _Reading:
    """One part while its form is taken."""

    def __init__(self, forms: Forms, own: set[Node], nodes: tuple[Node, ...]) -> None:
        self.forms = forms
        self.own = own
        self.nodes = nodes
        self.index = {n: i for i, n in enumerate(nodes)}
        self.numbers: dict[object, int] = {}
        self.outside: dict[Value, int] = {}
        self.shared = self.unshared = False

    def form(self, depth: int) -> Form:
        tokens = tuple(self._node(n, depth) for n in self.nodes)
        starts = tuple(n.op.start for n in self.nodes if isinstance(n.op, Slice))
        return Form(self.nodes, tokens, starts, tuple(self.outside), self._sharing())

    def _sharing(self) -> str:
        if not self.shared:
            return ""
        return "partly shared weights" if self.unshared else "shared weights"

    def _node(self, node: Node, depth: int) -> tuple[object, ...]:
        operands = tuple(map(self._operand, node.inputs))
        streams = tuple(self._number(("stream", s)) for s in _streams(node.op))
        scope = self._scope(node.scope[depth:]) if node in self.own else ()
        return (self.forms.attributes(node), operands, streams, scope)

    def _operand(self, value: Value) -> tuple[object, ...]:
        if value.producer in self.index:
            return ("inside", self.index[value.producer], value.index)
        if not _is_leaf(value):
            return ("outside", self.outside.setdefault(value, len(self.outside)), value.type)
        if self.forms.read_by_others(value, self.own):
            self.shared |= _is_parameter(value)
            return ("shared", value)
        self.unshared |= _is_parameter(value)
        if value.state is None:
            return ("scalar", value.type, value.default)
        return ("state", self._number(value), value.type, value.state.role)

    def _scope(self, inner: Location) -> tuple[object, ...]:
        """Which scopes a node stands in, as numbers, and which of them are branches."""
        places = (inner[: k + 1] for k in range(len(inner)))
        return tuple((self._number(place), place[-1].branch) for place in places)

    def _number(self, key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


def _is_leaf(value: Value) -> bool:
    """Whether `value` is a state or a 0-d input: nothing that data flows in by."""
    return value.state is not None or (value.is_input and value.shape == ())


def _is_parameter(value: Value) -> bool:
    return value.state is not None and value.state.role is Role.PARAMETER


def _fixed(op: Op) -> tuple[object, ...]:
    """Values of the fields that must agree."""
    start = isinstance(op, Slice)
    return tuple(
        format_value(getattr(op, f.name))
        for f in dataclasses.fields(op)
        if not {"label", "stream"} & set(f.metadata) and not (start and f.name == "start")
    )


def _streams(op: Op) -> tuple[int, ...]:
    fields = (f for f in dataclasses.fields(op) if f.metadata.get("stream"))
    return tuple(getattr(op, f.name) for f in fields)
