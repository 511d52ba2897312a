"""Graph, Node and Value: a network in static single assignment form.

A value comes from an input, from a state, or from a node; it knows its users. A graph has named
inputs and outputs, `updates` (states and the values they take, all committed together) and
`gradients` (states and their cotangents). Nodes are listed in topological order.

Branches are said, not inferred: `with branch("left"):` labels the nodes created inside, adds
nothing to the graph, and sibling branches go on reading the same value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import islice
from typing import NamedTuple

from branchgraph.ir.dims import DimLike, as_shape
from branchgraph.ir.errors import DimensionError, GraphError, ShapeError
from branchgraph.ir.op import Op, make
from branchgraph.ir.state import State
from branchgraph.ir.types import DType, DTypeLike, TensorType


class Scope(NamedTuple):
    """One component of a location; `branch` marks a declared branch."""

    name: str
    branch: bool = False


Location = tuple[Scope, ...]

_LOCATION: ContextVar[Location] = ContextVar("location", default=())


@contextlib.contextmanager
def at(location: Location) -> Iterator[None]:
    """Nodes created inside stand at `location`, whatever surrounds it."""
    token = _LOCATION.set(location)
    try:
        yield
    finally:
        _LOCATION.reset(token)


def scope(name: str) -> contextlib.AbstractContextManager[None]:
    """Nodes created inside stand in the part `name` of the network."""
    return at((*_LOCATION.get(), *(Scope(part) for part in name.split("/"))))


def branch(name: str) -> contextlib.AbstractContextManager[None]:
    """Nodes created inside belong to the branch `name`."""
    return at((*_LOCATION.get(), Scope(name, branch=True)))


def here() -> Location:
    """The location that new nodes get."""
    return _LOCATION.get()


def path(location: Location) -> str:
    """`res2/block1/left`."""
    return "/".join(part.name for part in location)


def shared_scope(a: Location, b: Location) -> Location:
    """The longest location that contains both."""
    depth = 0
    while depth < min(len(a), len(b)) and a[depth] == b[depth]:
        depth += 1
    return a[:depth]


class Value:
    """One array-valued edge of the graph.

    Exactly one of these holds: `producer` is a node, `state` is a state, or the value is an input.
    """

    __slots__ = ("_users", "default", "graph", "index", "name", "producer", "state", "type")

    def __init__(
        self,
        graph: Graph,
        type: TensorType,
        *,
        name: str = "",
        producer: Node | None = None,
        index: int = 0,
        state: State | None = None,
        default: float | None = None,
    ) -> None:
        self.graph = graph
        self.type = type
        self.name = name
        self.producer = producer
        self.index = index
        self.state = state
        self.default = default
        self._users: dict[Node, None] = {}

    @property
    def shape(self) -> tuple[DimLike, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def is_input(self) -> bool:
        """Whether the value is fed by the caller."""
        return self.producer is None and self.state is None

    @property
    def users(self) -> list[Node]:
        """Nodes that read this value, each once."""
        return list(self._users)

    def __repr__(self) -> str:
        return f"<{self.label}: {self.type}>"

    @property
    def label(self) -> str:
        """A name for people and messages."""
        if self.producer is None:
            return self.name
        suffix = f".{self.index}" if len(self.producer.outputs) > 1 else ""
        return (self.producer.path or self.producer.op.opcode) + suffix

    def __add__(self, other: Value | float) -> Value:
        return _binary("add", self, other)

    def __radd__(self, other: float) -> Value:
        return _binary("add", other, self)

    def __sub__(self, other: Value | float) -> Value:
        return _binary("subtract", self, other)

    def __rsub__(self, other: float) -> Value:
        return _binary("subtract", other, self)

    def __mul__(self, other: Value | float) -> Value:
        return _binary("multiply", self, other)

    def __rmul__(self, other: float) -> Value:
        return _binary("multiply", other, self)

    def __truediv__(self, other: Value | float) -> Value:
        return _binary("divide", self, other)

    def __rtruediv__(self, other: float) -> Value:
        return _binary("divide", other, self)

    def __neg__(self) -> Value:
        return self.graph.emit(make("negate"), self)


def _binary(opcode: str, a: Value | float, b: Value | float) -> Value:
    """Arithmetic between values; a Python number takes the dtype of the value beside it."""
    beside = a if isinstance(a, Value) else b
    assert isinstance(beside, Value)
    graph = beside.graph
    left = a if isinstance(a, Value) else graph.constant(a, beside.dtype)
    right = b if isinstance(b, Value) else graph.constant(b, beside.dtype)
    return graph.emit(make(opcode), left, right)


class Node:
    """One application of an op."""

    __slots__ = ("graph", "inputs", "name", "op", "outputs", "scope")

    def __init__(
        self, graph: Graph, op: Op, inputs: tuple[Value, ...], name: str, scope: Location
    ) -> None:
        self.graph = graph
        self.op = op
        self.inputs = inputs
        self.name = name
        self.scope = scope
        self.outputs: tuple[Value, ...] = ()

    @property
    def path(self) -> str:
        """Scope and name, for people."""
        return path((*self.scope, Scope(self.name))) if self.name else path(self.scope)

    @property
    def output(self) -> Value:
        """The only output."""
        if len(self.outputs) != 1:
            raise GraphError(f"{self} has {len(self.outputs)} outputs")
        return self.outputs[0]

    def __repr__(self) -> str:
        return f"<{self.op.opcode} {self.path!r}>" if self.path else f"<{self.op.opcode}>"


class Graph:
    """A network: inputs, nodes in topological order, outputs, updates and gradients."""

    def __init__(self, name: str = "graph") -> None:
        self.name = name
        self.inputs: dict[str, Value] = {}
        self._outputs: dict[str, Value] = {}
        self._updates: dict[State, Value] = {}
        self._gradients: dict[State, Value] = {}
        self._reads: dict[State, Value] = {}
        self._nodes: dict[Node, None] = {}
        self._ordered = True
        self._names: set[tuple[Location, str]] = set()

    # -- declaration ---------------------------------------------------------------------------

    def input(
        self,
        name: str,
        shape: Iterable[DimLike | str] = (),
        dtype: DTypeLike = DType.F32,
        default: float | None = None,
    ) -> Value:
        """A value fed by the caller. `default` is what a 0-d input is when it is not fed."""
        if name in self.inputs:
            raise GraphError(f"input {name!r} exists already; names of inputs are unique")
        type = TensorType(as_shape(shape), DType.of(dtype))
        if default is not None and type.shape != ():
            raise GraphError(f"input {name!r}: only a 0-d input may have a default")
        value = Value(self, type, name=name, default=default)
        self.inputs[name] = value
        return value

    def read(self, state: State) -> Value:
        """The value of `state` at the beginning of a run; one value however often it is read."""
        value = self._reads.get(state)
        if value is None:
            value = Value(self, state.type, name=state.name, state=state)
            self._reads[state] = value
        return value

    def constant(self, number: float, dtype: DTypeLike = DType.F32) -> Value:
        """A 0-d constant."""
        return self.emit(make("full", value=float(number), shape=(), dtype=DType.of(dtype)))

    def apply(self, op: Op, *inputs: Value, name: str = "") -> tuple[Value, ...]:
        """Add a node at the current scope and return its outputs."""
        for i, value in enumerate(inputs):
            if value.graph is not self:
                raise GraphError(
                    f"{op.opcode}: operand {i} ({value.label}) belongs to graph "
                    f"{value.graph.name!r}, not to {self.name!r}"
                )
        location = here()
        try:
            op.check_arity(len(inputs))
            types = op.infer(*(v.type for v in inputs))
        except (ShapeError, DimensionError) as error:
            where = path((*location, Scope(name))) if name else path(location)
            seen = ", ".join(f"{v.label}: {v.type}" for v in inputs)
            place = f" at {where}" if where else ""
            raise type(error)(f"{op.opcode}{place}: {error} (operands: {seen})") from None
        return self.insert(op, inputs, types, name, location)

    def insert(
        self,
        op: Op,
        inputs: tuple[Value, ...],
        types: Iterable[TensorType],
        name: str = "",
        location: Location = (),
    ) -> tuple[Value, ...]:
        """Add a node whose output types are known already (copies, parsed text)."""
        node = Node(self, op, inputs, name, location)
        node.outputs = tuple(Value(self, t, producer=node, index=i) for i, t in enumerate(types))
        for value in inputs:
            value._users[node] = None
        self._nodes[node] = None
        self._names.add((location, name))
        return node.outputs

    def unused_name(self, kind: str) -> str:
        """The first of `kind`, `kind_1`, ... that no node at the current scope carries."""
        location, k, name = here(), 0, kind
        while (location, name) in self._names:
            k += 1
            name = f"{kind}_{k}"
        return name

    def emit(self, op: Op, *inputs: Value, name: str = "") -> Value:
        """Add a node with one output and return that."""
        outputs = self.apply(op, *inputs, name=name)
        if len(outputs) != 1:
            raise GraphError(f"{op.opcode} has {len(outputs)} outputs; use graph.apply")
        return outputs[0]

    def output(self, name: str, value: Value) -> Value:
        """Name `value` as an output."""
        if name in self._outputs:
            raise GraphError(f"output {name!r} exists already")
        self._own(value, f"output {name!r}")
        self._outputs[name] = value
        return value

    def update(self, state: State, value: Value) -> None:
        """Let `state` take `value` when the run commits."""
        self._own(value, f"update of {state.name}")
        if value.type != state.type:
            raise ShapeError(f"update of {state.name}: expected {state.type}, got {value.type}")
        self._updates[state] = value

    def set_gradient(self, state: State, value: Value) -> None:
        """Record `value` as the cotangent of `state`."""
        self._own(value, f"gradient of {state.name}")
        if value.type != state.type:
            raise ShapeError(f"gradient of {state.name}: expected {state.type}, got {value.type}")
        self._gradients[state] = value

    def _own(self, value: Value, what: str) -> None:
        if value.graph is not self:
            raise GraphError(f"{what}: the value belongs to another graph")

    # -- reading -------------------------------------------------------------------------------

    @property
    def outputs(self) -> Mapping[str, Value]:
        return self._outputs

    @property
    def updates(self) -> Mapping[State, Value]:
        return self._updates

    @property
    def gradients(self) -> Mapping[State, Value]:
        return self._gradients

    @property
    def nodes(self) -> list[Node]:
        """Nodes in topological order, as close to the order of creation as that allows."""
        if not self._ordered:
            self._sort()
        return list(self._nodes)

    @property
    def states(self) -> list[State]:
        """States the graph mentions: first those its nodes read, in their order, then the rest."""
        used = (v.state for n in self.nodes for v in n.inputs if v.state is not None)
        rest = (*self._reads, *self._updates, *self._gradients)
        return list(dict.fromkeys([*used, *rest]))

    @property
    def reads(self) -> Mapping[State, Value]:
        """States the graph reads, and the values that stand for them."""
        return self._reads

    @property
    def roots(self) -> list[Value]:
        """Values that keep nodes alive: outputs, updates and gradients."""
        return [*self._outputs.values(), *self._updates.values(), *self._gradients.values()]

    def branches(self) -> dict[str, list[Node]]:
        """Declared branches by path, each with its nodes (inner branches included)."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for depth, part in enumerate(node.scope):
                if part.branch:
                    found.setdefault(path(node.scope[: depth + 1]), []).append(node)
        return found

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def latest(self, count: int) -> list[Node]:
        """The `count` nodes that were made last, the first of them first."""
        return list(islice(reversed(self._nodes), count))[::-1]

    @property
    def size(self) -> int:
        """How many nodes there are, which `nodes` would have to list."""
        return len(self._nodes)

    def find(self, name: str) -> Node:
        """The node with path or name `name`, or `GraphError` listing near names.

        No node is called the empty name: what has neither name nor scope is not found by name.
        """
        if not name:
            raise GraphError(
                f"expected the path or name of a node in {self.name}, got an empty one"
            )
        nodes = self.nodes
        exact = [n for n in nodes if n.path == name] or [n for n in nodes if n.name == name]
        if len(exact) == 1:
            return exact[0]
        known = sorted({n.path for n in nodes if n.name})
        if len(exact) > 1:
            raise GraphError(f"{len(exact)} nodes are named {name!r}; give the whole path")
        raise GraphError(f"no node {name!r} in {self.name}; there are: {', '.join(known)}")

    # -- editing (passes work on a copy) -------------------------------------------------------

    def replace(self, old: Value, new: Value) -> None:
        """Let every user and root of `old` read `new` instead."""
        if old.type != new.type:
            raise ShapeError(f"replacing {old.label}: expected {old.type}, got {new.type}")
        for node in old.users:
            self.set_inputs(node, tuple(new if v is old else v for v in node.inputs))
        for roots in (self._outputs, self._updates, self._gradients):
            _replace_in(roots, old, new)

    def set_inputs(self, node: Node, inputs: tuple[Value, ...]) -> None:
        """Change what `node` reads."""
        for value in node.inputs:
            value._users.pop(node, None)
        node.inputs = inputs
        for value in inputs:
            value._users[node] = None
        self._ordered = False

    def remove(self, node: Node) -> None:
        """Take a node out; nothing may read it."""
        for value in node.outputs:
            if value._users:
                raise GraphError(f"{node} cannot be removed: {value.users[0]} reads it")
        for value in node.inputs:
            value._users.pop(node, None)
        del self._nodes[node]

    def keep(
        self,
        node: Callable[[Node], bool] = lambda n: True,
        output: Callable[[str], bool] = lambda n: True,
        update: Callable[[State], bool] = lambda s: True,
        gradient: Callable[[State], bool] = lambda s: True,
        input: Callable[[str], bool] = lambda n: True,
        read: Callable[[State], bool] = lambda s: True,
    ) -> None:
        """Drop every item whose predicate is false; nodes are dropped users first."""
        self._outputs = {k: v for k, v in self._outputs.items() if output(k)}
        self._updates = {k: v for k, v in self._updates.items() if update(k)}
        self._gradients = {k: v for k, v in self._gradients.items() if gradient(k)}
        for n in reversed(self.nodes):
            if not node(n):
                self.remove(n)
        self.inputs = {k: v for k, v in self.inputs.items() if input(k)}
        self._reads = {k: v for k, v in self._reads.items() if read(k)}

    def place_after(self, anchor: Node, nodes: Iterable[Node]) -> None:
        """Move `nodes`, in their order, to where `anchor` stands in the listing."""
        moved = dict.fromkeys(nodes)
        order: dict[Node, None] = {}
        for node in self.nodes:
            if node not in moved:
                order[node] = None
            if node is anchor:
                order.update(moved)
        self._nodes = order
        self._ordered = False

    def touch(self) -> None:
        """Say that nodes were added out of order; the next reading sorts them."""
        self._ordered = False

    def _sort(self) -> None:
        """Stable depth-first topological sort; `GraphError` on a cycle."""
        done: dict[Node, None] = {}
        active: set[Node] = set()
        for start in self._nodes:
            stack = [] if start in done else [(start, iter(start.inputs))]
            active.update(n for n, _ in stack)
            while stack:
                node, pending = stack[-1]
                producer = next(
                    (v.producer for v in pending if v.producer and v.producer not in done), None
                )
                if producer is None:
                    stack.pop()
                    active.discard(node)
                    done[node] = None
                elif producer in active:
                    raise GraphError(f"{self.name}: cycle through {producer} and {node}")
                else:
                    active.add(producer)
                    stack.append((producer, iter(producer.inputs)))
        self._nodes = done
        self._ordered = True

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self._nodes)} nodes, {len(self.states)} states>"


def _replace_in(roots: dict, old: Value, new: Value) -> None:  # type: ignore[type-arg]
    for key, value in roots.items():
        if value is old:
            roots[key] = new
