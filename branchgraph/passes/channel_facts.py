"""Which channels of a value are zero, or the same number everywhere, whatever the input.

A fact about a value x (channels on axis 1; a value without such an axis is one channel) says

    zero       x[:, c] = 0
    constant   x[:, c] = v[c] for all rows and positions; v is written over states when asked for

and follows from what the graph knows by itself, for finite states:

    full(a)                  zero if a = 0, else constant a
    select(x, g)             zero where g is known to be 0, x where it is known to be 1
    f(x), f of one element   zero where x is and f(0) = 0, else constant f(v)
    batch norm, inference    constant beta + gamma (v - mu) / sqrt(var + eps)
    conv, dense              where all channels that a group reads are zero: zero, or its bias
    pooling                  zero stays zero; constant where no window reads padding
    sum and other merges     zero where all operands are, constant where all are either
    concat, slice, flatten   channel by channel
    anything of known arrays what its elements say (`constant_arrays`)

In training a batch norm is not of this kind (its output at zero input is beta, in inference it is
not), so nothing is known behind a batch norm whose mode is not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import Shape
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.elementwise import Add, Binary, Cast, Unary
from branchgraph.ir.ops.gate import ScaleGradient, Select, StraightThrough
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNormInference, LocalResponseNorm
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Embed, Pad, Reshape, Slice, Transpose
from branchgraph.passes.constant_arrays import KnownArrays, write

Channels = frozenset[int]
_NONE: Channels = frozenset()
#: Writes v [C]; entries of channels that are neither zero nor constant are any numbers.
Vector = Callable[[], Value]


def channel_count(shape: Shape) -> int:
    """Channels of a value of this shape; 1 for values without a concrete channel axis."""
    return shape[1] if len(shape) > 1 and isinstance(shape[1], int) else 1


def has_channels(shape: Shape) -> bool:
    """Whether axis 1 is an axis of channels."""
    return len(shape) > 1 and isinstance(shape[1], int)


@dataclass(frozen=True)
class Fact:
    """What is known about a value: `size` channels, some zero, some constant."""

    size: int
    zero: Channels = _NONE
    constant: Channels = _NONE
    vector: Vector | None = None

    @property
    def known(self) -> Channels:
        return self.zero | self.constant

    @property
    def all_zero(self) -> bool:
        return len(self.zero) == self.size


class Knowledge:
    """Facts about the values of a graph; show it the nodes in their order."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.arrays = KnownArrays()
        self.facts: dict[Value, Fact] = {}
        for node in nodes:
            self.visit(node)

    def visit(self, node: Node) -> None:
        """Learn about the results of `node`."""
        self.arrays.visit(node)
        if len(node.outputs) != 1 or not node.output.dtype.is_float:
            return
        rule = _RULES.get(type(node.op)) or _family_rule(node.op)
        fact = rule(self, node) if rule else None
        if fact is None:
            fact = _elements(self, node)
        if fact is not None and fact.known:
            self.facts[node.output] = fact

    def of(self, value: Value) -> Fact:
        """What is known about `value`; nothing, if it is not known."""
        return self.facts.get(value) or Fact(channel_count(value.shape))

    def is_zero(self, value: Value) -> bool:
        """Whether every element is 0."""
        return self.of(value).all_zero

    def vector(self, value: Value) -> Value:
        """v of `value`, written into the graph."""
        fact = self.of(value)
        if fact.vector is not None:
            return fact.vector()
        return value.graph.emit(Full(value=0.0, shape=(fact.size,), dtype=value.dtype))


Rule = Callable[[Knowledge, Node], "Fact | None"]


def _elements(knowledge: Knowledge, node: Node) -> Fact | None:
    """What the elements say, where the graph knows them."""
    array = knowledge.arrays.get(node.output)
    if array is None or not has_channels(node.output.shape) or not array.size:
        return None
    columns = array.swapaxes(0, 1).reshape(len(array[0]), -1)
    v = columns[:, 0]
    same = np.isfinite(v) & (columns == v[:, None]).all(axis=1)
    zero = frozenset(np.flatnonzero(same & (v == 0)).tolist())
    constant = frozenset(np.flatnonzero(same & (v != 0)).tolist())
    graph, dtype = node.graph, node.output.dtype
    finite = np.where(same, v, 0)
    return Fact(len(v), zero, constant, lambda: write(graph, finite, dtype))


def _copied(knowledge: Knowledge, node: Node) -> Fact:
    """The channels of the first operand, zero where that is."""
    fact = knowledge.of(node.inputs[0])
    return Fact(fact.size, fact.zero)


def _moved(knowledge: Knowledge, node: Node) -> Fact | None:
    """Zero elements in another order, repeated, or among other zeros."""
    return _zeros(node) if knowledge.is_zero(node.inputs[0]) else None


def _zeros(node: Node) -> Fact:
    size = channel_count(node.output.shape)
    return Fact(size, frozenset(range(size)))


def _full(knowledge: Knowledge, node: Node) -> Fact:
    assert isinstance(node.op, Full)
    size, value, dtype = channel_count(node.output.shape), node.op.value, node.op.dtype
    everything = frozenset(range(size))
    if value == 0:
        return Fact(size, everything)
    if not np.isfinite(value):
        return Fact(size)
    graph = node.graph
    vector = Full(value=value, shape=(size,), dtype=dtype)
    return Fact(size, _NONE, everything, lambda: graph.emit(vector))


def _applied(fact: Fact, at_zero: float, write: Vector) -> Fact | None:
    """A function of one element: `at_zero` is what it makes of 0, `write` applies it to v."""
    if not np.isfinite(at_zero):
        return None
    if at_zero == 0:
        return Fact(fact.size, fact.zero, fact.constant, write if fact.constant else None)
    return Fact(fact.size, _NONE, fact.known, write)


def _unary(knowledge: Knowledge, node: Node) -> Fact | None:
    (x,) = node.inputs
    op, fact = node.op, knowledge.of(x)
    with np.errstate(all="ignore"):
        (y,) = op.evaluate(np.zeros(1))
    return _applied(fact, float(y[0]), lambda: node.graph.emit(op, knowledge.vector(x)))


def _binary(knowledge: Knowledge, node: Node) -> Fact | None:
    """A known single number beside x, or a sum of two values of one type."""
    a, b = node.inputs
    if isinstance(node.op, Add) and a.type == b.type:
        return _merge(knowledge, node)
    left, right = knowledge.arrays.get(a), knowledge.arrays.get(b)
    if (left is None) == (right is None):
        return None
    x, number = (a, right) if left is None else (b, left)
    if number is None or number.size != 1 or x.shape != node.output.shape:
        return None
    one, op = Full(value=float(number.reshape(-1)[0]), shape=(), dtype=x.dtype), node.op
    zero = np.zeros(1)
    with np.errstate(all="ignore"):
        (y,) = op.evaluate(*((zero, number) if left is None else (number, zero)))

    def write() -> Value:
        pair = (knowledge.vector(x), node.graph.emit(one))
        return node.graph.emit(op, *(pair if left is None else pair[::-1]))

    return _applied(knowledge.of(x), float(y.reshape(-1)[0]), write)


def _batch_norm(knowledge: Knowledge, node: Node) -> Fact:
    x, *rest = node.inputs
    fact, graph = knowledge.of(x), node.graph

    def write() -> Value:
        row = graph.emit(Reshape(shape=(1, fact.size)), knowledge.vector(x))
        return graph.emit(Reshape(shape=(fact.size,)), graph.emit(node.op, row, *rest))

    return Fact(fact.size, _NONE, fact.known, write)


def _linear(knowledge: Knowledge, node: Node) -> Fact:
    x, _, *bias = node.inputs
    groups = node.op.groups if isinstance(node.op, Conv) else 1
    filters = channel_count(node.output.shape)
    fact = knowledge.of(x)
    read, made = fact.size // groups, filters // groups
    idle = [g for g in range(groups) if fact.zero.issuperset(range(g * read, (g + 1) * read))]
    channels = frozenset(c for g in idle for c in range(g * made, (g + 1) * made))
    if bias:
        return Fact(filters, _NONE, channels, lambda: bias[0])
    return Fact(filters, channels)


def _merge(knowledge: Knowledge, node: Node) -> Fact:
    facts = [knowledge.of(v) for v in node.inputs]
    zero = frozenset.intersection(*(f.zero for f in facts))
    known = frozenset.intersection(*(f.known for f in facts))

    def write() -> Value:
        return node.graph.emit(node.op, *map(knowledge.vector, node.inputs))

    return Fact(facts[0].size, zero, known - zero, write if known - zero else None)


def _concat(knowledge: Knowledge, node: Node) -> Fact | None:
    assert isinstance(node.op, Concat)
    if node.op.axis != 1 or not has_channels(node.output.shape):
        return _zeros(node) if all(map(knowledge.is_zero, node.inputs)) else None
    zero, constant, start = set(), set(), 0
    for fact in map(knowledge.of, node.inputs):
        zero |= {start + c for c in fact.zero}
        constant |= {start + c for c in fact.constant}
        start += fact.size

    def write() -> Value:
        return node.graph.emit(Concat(axis=0), *map(knowledge.vector, node.inputs))

    return Fact(start, frozenset(zero), frozenset(constant), write if constant else None)


def _slice(knowledge: Knowledge, node: Node) -> Fact | None:
    op, (x,) = node.op, node.inputs
    assert isinstance(op, Slice)
    fact = knowledge.of(x)
    if not has_channels(x.shape):
        return _moved(knowledge, node)
    if op.axis != 1:
        return fact
    read = [op.start + i * op.step for i in range(op.size)]
    zero = frozenset(i for i, c in enumerate(read) if c in fact.zero)
    constant = frozenset(i for i, c in enumerate(read) if c in fact.constant)
    cut = Slice(axis=0, start=op.start, size=op.size, step=op.step)
    write = (lambda: node.graph.emit(cut, knowledge.vector(x))) if constant else None
    return Fact(op.size, zero, constant, write)


def flattened(node: Node) -> int:
    """Positions of a channel where a reshape is [N, C, ...] to [N, C * positions], else 0."""
    old, new = node.inputs[0].shape, node.output.shape
    sizes = [d for d in old[1:] if isinstance(d, int)]
    fits = len(new) == 2 and len(old) > 1 and len(sizes) == len(old) - 1 and old[0] == new[0]
    if not fits or not isinstance(new[1], int) or not sizes[0]:
        return 0
    return new[1] // sizes[0]


def _reshape(knowledge: Knowledge, node: Node) -> Fact | None:
    (x,) = node.inputs
    positions, fact = flattened(node), knowledge.of(x)
    if not positions:
        return _moved(knowledge, node)
    graph, size = node.graph, fact.size * positions

    def write() -> Value:
        column = graph.emit(Reshape(shape=(fact.size, 1)), knowledge.vector(x))
        wide = graph.emit(BroadcastTo(shape=(fact.size, positions)), column)
        return graph.emit(Reshape(shape=(size,)), wide)

    zero, constant = (spread(channels, positions) for channels in (fact.zero, fact.constant))
    return Fact(size, zero, constant, write if constant else None)


def spread(channels: Iterable[int], positions: int) -> Channels:
    """The features of `channels` after flattening."""
    return frozenset(c * positions + i for c in channels for i in range(positions))


def _reduce(knowledge: Knowledge, node: Node) -> Fact | None:
    (x,) = node.inputs
    op, fact = node.op, knowledge.of(x)
    assert isinstance(op, (ReduceSum, ReduceMean, ReduceMax))
    if not op.axes or op.axes[0] < 2 or not has_channels(x.shape):
        return _moved(knowledge, node)
    if isinstance(op, ReduceSum):
        return Fact(fact.size, fact.zero)
    return fact


def _pool(knowledge: Knowledge, node: Node) -> Fact:
    fact = knowledge.of(node.inputs[0])
    op = node.op
    assert isinstance(op, (MaxPool, AveragePool))
    alone = not any(op.pad) and not op.cover_all
    if isinstance(op, MaxPool) and alone:
        return fact
    if isinstance(op, AveragePool):
        whole = alone and op.divisor != "one"
        return fact if whole else Fact(fact.size, fact.zero)
    reach = [s - 1 if op.cover_all else 0 for s in op.stride]
    n = len(op.kernel)
    inside = all(op.pad[a] < k and op.pad[n + a] + reach[a] < k for a, k in enumerate(op.kernel))
    return fact if inside else Fact(fact.size)


def gate_channels(gate: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """The entries of a gate for each channel of a value of `shape`."""
    rank = len(shape)
    full = np.asarray(gate)[(None,) * (rank - gate.ndim)]
    size = channel_count(shape)
    if not has_channels(shape) or np.size(full, 1) == 1:
        return [full.reshape(-1)] * size
    return [full[:, c].reshape(-1) for c in range(size)]


def _select(knowledge: Knowledge, node: Node) -> Fact | None:
    x, gate = node.inputs
    array, fact = knowledge.arrays.get(gate), knowledge.of(x)
    if array is None or not np.isfinite(array).all():
        return None
    entries = list(enumerate(gate_channels(array, x.shape)))
    closed = frozenset(c for c, e in entries if not e.any())
    opened = frozenset(c for c, e in entries if (e == 1).all())
    constant = fact.constant & opened
    if not constant:
        return Fact(fact.size, fact.zero | closed)

    def masked() -> Value:
        """v of x with zeros where the gate is closed."""
        mask = np.array([float(c not in closed) for c in range(fact.size)])
        graph = node.graph
        return graph.emit(Select(), knowledge.vector(x), write(graph, mask, x.dtype))

    return Fact(fact.size, fact.zero | closed, constant, masked if closed else fact.vector)


def _pad(knowledge: Knowledge, node: Node) -> Fact | None:
    assert isinstance(node.op, Pad)
    return _moved(knowledge, node) if node.op.value == 0 else None


def _family_rule(op: Op) -> Rule | None:
    if isinstance(op, Unary):
        return _unary
    return _binary if isinstance(op, Binary) else None


_RULES: dict[type[Op], Rule] = {
    Full: _full,
    Select: _select,
    BatchNormInference: _batch_norm,
    Conv: _linear,
    Dense: _linear,
    MaxPool: _pool,
    AveragePool: _pool,
    ReduceSum: _reduce,
    ReduceMean: _reduce,
    ReduceMax: _reduce,
    Concat: _concat,
    Slice: _slice,
    Reshape: _reshape,
    Pad: _pad,
    **dict.fromkeys((Sum, Mean, Product, Maximum), _merge),
    **dict.fromkeys((Dropout, StraightThrough, ScaleGradient, LocalResponseNorm), _copied),
    **dict.fromkeys((Transpose, BroadcastTo, Embed, Cast, ConvTranspose), _moved),
}  # fmt: skip
