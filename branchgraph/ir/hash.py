"""The structural hash: equal for graphs that compute the same thing in the same way.

It is taken over typed canonical text of what the roots need, in depth-first order from the roots.
Names, locations and initial values do not enter; states, symbols and random streams are numbered
by first use; inputs by their order of declaration. 2 is not 2.0, and 1 is not True.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

from branchgraph.ir.attributes import format_value
from branchgraph.ir.dims import Dim, Shape
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.state import State
from branchgraph.ir.types import TensorType


class _Numbers:
    """Numbers given by first use."""

    def __init__(self) -> None:
        self._seen: dict[object, int] = {}

    def __getitem__(self, key: object) -> int:
        return self._seen.setdefault(key, len(self._seen))

    def __contains__(self, key: object) -> bool:
        return key in self._seen

    def __iter__(self) -> Iterator[object]:
        return iter(self._seen)


class _Canonical:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = _Numbers()
        self.states = _Numbers()
        self.symbols = _Numbers()
        self.streams = _Numbers()

    def lines(self) -> Iterator[str]:
        for value in self.graph.inputs.values():
            yield f"input {self.values[value]} {self.type(value.type)} {value.default!r}"
        for value in self.graph.outputs.values():
            yield from self.define(value)
            yield f"output {self.values[value]}"
        for kind, roots in (("update", self.graph.updates), ("gradient", self.graph.gradients)):
            for state, value in roots.items():
                yield from self.define(value)
                yield f"{kind} {self.state(state)} {self.values[value]}"

    def define(self, root: Value) -> Iterator[str]:
        """Lines of everything `root` needs that has not been written yet."""
        stack = [root]
        while stack:
            value = stack[-1]
            if value in self.values:
                stack.pop()
            elif value.producer is None:
                stack.pop()
                assert value.state is not None
                state = self.state(value.state)
                yield f"read {self.values[value]} {state}"
            else:
                missing = [v for v in value.producer.inputs if v not in self.values]
                if missing:
                    stack.extend(reversed(missing))
                else:
                    stack.pop()
                    yield self.node(value.producer)

    def node(self, node: Node) -> str:
        operands = ",".join(str(self.values[v]) for v in node.inputs)
        outputs = ",".join(f"{self.values[v]}:{self.type(v.type)}" for v in node.outputs)
        return f"{node.op.opcode}({operands}){self.attributes(node.op)}->{outputs}"

    def attributes(self, op: Op) -> str:
        parts = []
        for f in dataclasses.fields(op):
            if f.metadata.get("label"):
                continue
            value = getattr(op, f.name)
            if f.metadata.get("stream"):
                value = self.streams[value]
            parts.append(f"{f.name}={self.value(value)}")
        return "{" + ",".join(parts) + "}"

    def value(self, value: object) -> str:
        if isinstance(value, tuple):
            return "[" + ",".join(self.value(v) for v in value) + "]"
        if isinstance(value, Dim):
            terms = sorted((self.symbols[s], c) for s, c in value.terms)
            return "+".join(f"{c}*s{s}" for s, c in terms) + f"+{value.constant}"
        return f"{type(value).__name__}:{format_value(value)}"

    def shape(self, shape: Shape) -> str:
        return self.value(shape)

    def type(self, type: TensorType) -> str:
        return f"{type.dtype}{self.shape(type.shape)}"

    def state(self, state: State) -> str:
        return f"state{self.states[state]}:{self.type(state.type)}:{state.role.value}"


def structural_hash(graph: Graph) -> str:
    """Hexadecimal digest of the structure of `graph`."""
    digest = hashlib.blake2b(digest_size=20)
    for line in _Canonical(graph).lines():
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def canonical_states(graph: Graph) -> list[State]:
    """States that the roots of `graph` need, in the order in which the hash numbers them."""
    canonical = _Canonical(graph)
    for _ in canonical.lines():
        pass
    return [s for s in canonical.states if isinstance(s, State)]
