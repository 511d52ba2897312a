"""Wider and deeper networks of the same function (Net2Net, Chen et al., arXiv 1511.05641).

`widen` gives a layer C' > C channels. With a map g from {0 ... C'-1} onto {0 ... C-1}, g(j) = j for
j < C, and n(c) the number of j with g(j) = c:

    W'[j, ...] = W[g(j), ...],  b'[j] = b[g(j)]                the layer, and layers tied to it
    z'[:, j]   = z[:, g(j)]                                    so its channels are repeated
    V'[o, j]   = V[o, g(j)] / n(g(j))                          a layer that reads them
    sum_j V'[o, j] z'[:, j] = sum_c n(c) V[o, c] / n(c) z[:, c] = sum_c V[o, c] z[:, c]

What treats channels alike passes repeated channels on: activations, pooling, batch norm and
depthwise convolutions (whose parameters are repeated as well), flattening (g becomes
g(j) S + k for S positions k), concatenation (maps side by side), padding. Merges need all their
operands repeated alike, so the layers that make the others are widened too. Batch statistics of
equal channels are equal, so batch norm stays exact in training; dropout draws for every channel by
itself and is exact in inference only. Repeated channels have equal gradients until something tells
them apart, dropout for example.

New weights are expressions over the old ones (slices and concatenations, quotients for readers).
A declared batch norm needs states for its running statistics: `materialise` before training.

`deepen` puts an identity layer behind a value v (W the identity kernel, b = 0) and the activation
that made v once more. Exact where that is idempotent, f(f(x)) = f(x), as ReLU and clipping are, or
where v is made without one. With `norm`, batch norm stands in between with gamma = 1, beta = 0,
running mean 0 and running variance 1 - eps: the identity in inference, not in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from branchgraph.ir.builder import batch_norm, conv, dense
from branchgraph.ir.dims import product
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.initialisers import Constant, IdentityKernel
from branchgraph.ir.op import Op, make
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.deep import ClippedRelu, Resize
from branchgraph.ir.ops.elementwise import Add, Binary, Cast, Clip, Subtract, Unary
from branchgraph.ir.ops.gate import ScaleGradient, Select, StraightThrough
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNorm, BatchNormInference
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Pad, Reshape, Slice
from branchgraph.ir.static import static_values
from branchgraph.passes.base import Pass, Report

#: Where each new channel comes from.
Map = tuple[int, ...]

_NORMS = (BatchNorm, BatchNormInference)
#: Ops on the first operand that treat channels alike and by themselves, where axes permit.
_EACH = (
    Unary, Cast, Dropout, MaxPool, AveragePool, ScaleGradient, ReduceMean, ReduceMax, ReduceSum,
    Slice, Pad, Reshape, Resize,
)  # fmt: skip
#: Ops whose operands line up channel by channel.
_MERGES = (Sum, Mean, Product, Maximum, Binary, Select, StraightThrough)
#: Most operands of one concatenation.
_MOST_PARTS = 512


@dataclass(frozen=True)
class Widen(Pass, spelling="widen", claim="exact"):
    """Give the convolution or dense layer `layer` `to` channels without changing the function.

    New channels repeat old ones: chosen at `random` with `seed`, or in turn (`cyclic`).
    """

    layer: str
    to: int
    mapping: str = "random"
    seed: int = 0

    def check(self) -> None:
        if self.mapping not in ("random", "cyclic"):
            raise GraphError(f"unknown mapping {self.mapping!r}; known: random, cyclic")

    def rewrite(self, graph: Graph, report: Report) -> None:
        layer = graph.find(self.layer)
        try:
            widening = _Widening(graph, layer, self._map(layer))
        except RefusalError as error:
            report.refused(layer, str(error))
            return
        before, after = widening.emit()
        report.matched(layer, before=before, after=after)
        widening.commit(before, after)
        tied = [n.path for n in widening.made if n is not layer]
        readers = ", ".join(v.label for v in after)
        report.noted(
            f"{layer.path} has {self.to} channels; "
            + (f"so have, tied to it: {', '.join(tied)}; " if tied else "")
            + f"they are read by {readers}"
        )
        for node in (n for n in widening.nodes if isinstance(n.op, Dropout)):
            report.noted(f"{_called(node)} draws for every channel: exact in inference only")

    def _map(self, layer: Node) -> Map:
        if not _is_layer(layer):
            raise RefusalError("only convolutions in one group and dense layers are widened")
        channels = layer.inputs[1].shape[0]
        assert isinstance(channels, int)
        if self.to <= channels:
            raise RefusalError(f"it has {channels} channels, which is not less than {self.to}")
        if self.mapping == "cyclic":
            return tuple(j % channels for j in range(self.to))
        rng = np.random.default_rng(self.seed)
        extra = sorted(int(c) for c in rng.integers(0, channels, self.to - channels))
        return (*range(channels), *extra)


def _is_layer(node: Node) -> bool:
    """Whether every channel of the result reads every channel of the operand."""
    return isinstance(node.op, Dense) or (isinstance(node.op, Conv) and node.op.groups == 1)


def _is_depthwise(node: Node) -> bool:
    return isinstance(node.op, Conv) and node.op.groups == node.inputs[0].shape[1]


class _Widening:
    """The values that one widening reaches, and the map of each. Raises `RefusalError`."""

    def __init__(self, graph: Graph, layer: Node, chosen: Map) -> None:
        self.graph = graph
        self.layer = layer
        self.chosen = chosen
        self.static = static_values(graph)
        self.reached = self._reach()
        self.nodes = [n for n in graph.nodes if self._touches(n)]
        self.maps: dict[Value, Map] = {}
        for node in self.nodes:
            self._map(node)
        self.new: dict[Value, Value] = {}
        #: The layers that are widened.
        self.made = [n for n in self.nodes if _is_layer(n) and n.output in self.reached]

    def _touches(self, node: Node) -> bool:
        return any(v in self.reached for v in (*node.inputs, *node.outputs))

    # -- what is reached -----------------------------------------------------------------------

    def _reach(self) -> set[Value]:
        """All values whose channels are repeated."""
        reached: set[Value] = set()
        pending = [self.layer.output]
        roots = set(self.graph.roots)
        while pending:
            value = pending.pop()
            if value in reached:
                continue
            if value in roots:
                raise RefusalError(f"{value.label} is a result of the network")
            if value.producer is None:
                raise RefusalError(f"{value.label} is an input and cannot be widened alike")
            reached.add(value)
            pending += self._before(value.producer)
            for user in value.users:
                pending += self._behind(user, value)
        return reached

    def _before(self, node: Node) -> list[Value]:
        """Operands that are repeated when the result is."""
        if _is_layer(node) or isinstance(node.op, Concat):
            return []
        if isinstance(node.op, _MERGES):
            return self._tied(node)
        if isinstance(node.op, (*_NORMS, *_EACH)) or _is_depthwise(node):
            return [node.inputs[0]]
        raise RefusalError(f"{_called(node)} cannot be widened alike")

    def _behind(self, node: Node, value: Value) -> list[Value]:
        """Results (and other operands) that are repeated when an operand is."""
        if any(v is value for v in node.inputs[1:]) and not isinstance(node.op, (Concat, *_MERGES)):
            raise RefusalError(f"{_called(node)} reads its channels as a parameter")
        if _is_layer(node):
            return []
        if isinstance(node.op, _MERGES):
            return [node.output, *self._tied(node)]
        if isinstance(node.op, (*_NORMS, *_EACH, Concat)) or _is_depthwise(node):
            return [node.output]
        raise RefusalError(f"{_called(node)} does not treat channels one by one")

    def _tied(self, node: Node) -> list[Value]:
        """Operands of a merge that have channels and are no parameters."""
        found = []
        for value in node.inputs:
            if self._axis(node, value) is not None and value not in self.static:
                if len(value.shape) != len(node.output.shape):
                    raise RefusalError(f"{_called(node)} lines up operands of different ranks")
                found.append(value)
        return found

    def _axis(self, node: Node, value: Value) -> int | None:
        """The axis of a merge's operand that holds channels, if it has more than one."""
        axis = 1 - len(node.output.shape) + len(value.shape)
        return axis if axis >= 0 and value.shape[axis] != 1 else None

    # -- maps ----------------------------------------------------------------------------------

    def _map(self, node: Node) -> None:
        """The map of the result of `node`, from those of its operands."""
        if node.output not in self.reached:
            return
        self.maps[node.output] = (
            self._of_layer(node)
            if _is_layer(node)
            else self._of_merge(node)
            if isinstance(node.op, _MERGES)
            else self._of_concat(node)
            if isinstance(node.op, Concat)
            else self._of_each(node)
        )

    def _of_layer(self, node: Node) -> Map:
        channels, wanted = node.inputs[1].shape[0], self.layer.inputs[1].shape[0]
        if channels != wanted:
            raise RefusalError(f"{_called(node)}, tied to it, has {channels} channels")
        return self.chosen

    def _of_merge(self, node: Node) -> Map:
        first, *others = (self._known(v) for v in self._tied(node))
        if any(m != first for m in others):
            raise RefusalError(f"operands of {_called(node)} cannot be widened alike")
        return first

    def _of_concat(self, node: Node) -> Map:
        assert isinstance(node.op, Concat)
        if node.op.axis != 1:
            maps = [self._known(v) for v in node.inputs]
            if any(m != maps[0] for m in maps):
                raise RefusalError(f"operands of {_called(node)} cannot be widened alike")
            return maps[0]
        found: list[int] = []
        start = 0
        for value in node.inputs:
            found += (start + c for c in self._known(value))
            start += _channels(value)
        return tuple(found)

    def _of_each(self, node: Node) -> Map:
        """The map behind an op that treats channels alike."""
        x, op = node.inputs[0], node.op
        known = self._known(x)
        if isinstance(op, Conv):
            times = _channels(node.output) // _channels(x)
            return tuple(c * times + k for c in known for k in range(times))
        if isinstance(op, Reshape):
            return self._of_reshape(node, op, known)
        if isinstance(op, Pad):
            begin, end, size = op.begin[1], op.end[1], _channels(x)
            rest = range(begin + size, begin + size + end)
            return (*range(begin), *(begin + c for c in known), *rest)
        axes = op.axes if isinstance(op, (ReduceMean, ReduceMax, ReduceSum)) else ()
        if {0, 1} & set(axes) or (isinstance(op, Slice) and op.axis < 2):
            raise RefusalError(f"{_called(node)} does not treat channels one by one")
        return known

    def _of_reshape(self, node: Node, op: Reshape, known: Map) -> Map:
        """[N, C, ...] to [N, C, ...] or to [N, C S]."""
        x = node.inputs[0]
        if len(op.shape) > 1 and op.shape[0] == x.shape[0]:
            if op.shape[1] == x.shape[1]:
                return known
            area = product(x.shape[2:])
            if len(op.shape) == 2 and isinstance(area, int):
                return tuple(c * area + k for c in known for k in range(area))
        raise RefusalError(f"{_called(node)} mixes channels with other axes")

    def _known(self, value: Value) -> Map:
        return self.maps.get(value) or tuple(range(_channels(value)))

    # -- emission ------------------------------------------------------------------------------

    def emit(self) -> tuple[list[Value], list[Value]]:
        """Emit the wide part; the values at its end, old and new."""
        ends: list[tuple[Value, Value]] = []
        for node in self.nodes:
            with at(node.scope):
                inputs = tuple(self._operand(node, i, v) for i, v in enumerate(node.inputs))
                made = self.graph.emit(self._op(node), *inputs, name=node.name)
            self.new[node.output] = made
            if node.output not in self.reached:
                ends.append((node.output, made))
        return [old for old, _ in ends], [new for _, new in ends]

    def commit(self, before: list[Value], after: list[Value]) -> None:
        """Let the rest of the network read the wide part, and take the old one out."""
        for old, new in zip(before, after):
            self.graph.replace(old, new)
        for node in reversed(self.nodes):
            self.graph.remove(node)
        self.graph.touch()

    def _op(self, node: Node) -> Op:
        """The op of `node` where its attributes tell the number of channels."""
        if isinstance(node.op, Reshape):
            count = len(self.maps[node.output])
            return Reshape(shape=(node.op.shape[0], count, *node.op.shape[2:]))
        if isinstance(node.op, Conv) and not _is_layer(node):
            return replace(node.op, groups=len(self._known(node.inputs[0])))
        return node.op

    def _operand(self, node: Node, i: int, value: Value) -> Value:
        """Operand `i` of the wide form of `node`."""
        if value in self.new:
            return self.new[value]
        if isinstance(node.op, _MERGES):
            axis = self._axis(node, value)
            if axis is None or value not in self.static:
                return value
            return taken(value, axis, self.maps[node.output])
        if i == 0 or isinstance(node.op, Concat):
            return value
        return self._parameter(node, i, value)

    def _parameter(self, node: Node, i: int, value: Value) -> Value:
        """Weights, biases and the vectors of batch norm, repeated as the channels are."""
        if not isinstance(node.op, (Conv, Dense, *_NORMS)):
            return value
        known = self.maps.get(node.output)
        name = f"{node.name}.{node.op.operands[i].rstrip('?')}" if node.name else ""
        if i == 1 and _is_layer(node) and node.inputs[0] in self.maps:
            reads = self.maps[node.inputs[0]]
            value = taken(_shared_out(value, reads), 1, reads, "" if known else name)
        return taken(value, 0, known, name) if known else value


def _called(node: Node) -> str:
    return f"{node.op.opcode} {node.path}".rstrip()


def _channels(value: Value) -> int:
    size = value.shape[1] if len(value.shape) > 1 else None
    if not isinstance(size, int):
        raise RefusalError(f"{value.label} has no concrete number of channels: {value.type}")
    return size


def taken(value: Value, axis: int, index: Map, name: str = "") -> Value:
    """The positions `index` of `value` along `axis`, as slices and concatenations."""
    size = value.shape[axis]
    parts: list[Value] = []
    for start, count in _runs(index):
        whole = (start, count) == (0, size)
        cut = Slice(axis=axis, start=start, size=count)
        parts.append(value if whole else value.graph.emit(cut, value))
    while len(parts) > _MOST_PARTS:
        groups = (parts[i : i + _MOST_PARTS] for i in range(0, len(parts), _MOST_PARTS))
        parts = [value.graph.emit(Concat(axis=axis), *group) for group in groups]
    return parts[0] if len(parts) == 1 else value.graph.emit(Concat(axis=axis), *parts, name=name)


def _runs(index: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and length of the stretches of consecutive numbers."""
    for _, group in groupby(enumerate(index), key=lambda pair: pair[1] - pair[0]):
        found = [c for _, c in group]
        yield found[0], len(found)


def _shared_out(weight: Value, index: Map) -> Value:
    """weight[o, c, ...] / n(c), n(c) the number of times that c is in `index`."""
    graph, size = weight.graph, weight.shape[1]
    assert isinstance(size, int)
    times = np.bincount(index, minlength=size).tolist()
    ones = (1,) * (len(weight.shape) - 2)
    parts = [
        graph.emit(Full(value=float(n), shape=(1, len(list(same)), *ones), dtype=weight.dtype))
        for n, same in groupby(times)
    ]
    divisor = parts[0] if len(parts) == 1 else graph.emit(Concat(axis=1), *parts)
    return graph.emit(make("divide"), weight, divisor)


# -- deeper ----------------------------------------------------------------------------------------

#: f(f(x)) = f(x).
_IDEMPOTENT = (Relu, ClippedRelu, Clip)
#: What is no activation: an identity layer behind it needs none.
_LINEAR = (
    Conv, Dense, *_NORMS, Sum, Mean, Add, Subtract, Concat, MaxPool, AveragePool, ReduceMean,
    ReduceMax, ReduceSum, Reshape, Pad, Dropout,
)  # fmt: skip
#: A power of two, so that 1 - eps has no rounding in float32.
_EPS = 2.0**-16


@dataclass(frozen=True)
class Deepen(Pass, spelling="deepen", claim="exact"):
    """Put an identity layer behind the node `after`: a convolution or, on a matrix, a dense layer.

    `norm` puts batch norm behind it, which is the identity in inference only.
    """

    after: str
    kernel: int = 3
    norm: bool = False

    def check(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise GraphError(f"an identity convolution has an odd kernel, got {self.kernel}")

    def rewrite(self, graph: Graph, report: Report) -> None:
        node = graph.find(self.after)
        reason = self._reason(graph, node)
        if reason:
            report.refused(node, reason)
            return
        old = node.output
        with at(node.scope):
            copy = graph.emit(node.op, *node.inputs, name=node.name)
            new = self._layer(copy, node)
        report.matched(node, before=[old], after=[new])
        if self.norm:
            report.noted(
                "the new batch norm is the identity in inference; in training it normalises by "
                "the batch"
            )
        graph.replace(old, new)
        graph.remove(node)
        graph.touch()

    def _reason(self, graph: Graph, node: Node) -> str:
        """Why no layer can stand behind `node`, or nothing."""
        if len(node.outputs) != 1 or node.output in static_values(graph):
            return "it makes no single value of samples"
        type = node.output.type
        if len(type.shape) < 2 or not isinstance(type.shape[1], int) or not type.dtype.is_float:
            return f"a layer needs [N, C, ...], got {type}"
        users = node.output.users
        layer = users[0] if len(users) == 1 else None
        weight = layer.inputs[1].state if layer and isinstance(layer.op, (Conv, Dense)) else None
        if weight is not None and isinstance(weight.init, IdentityKernel):
            return f"the identity layer {layer.path if layer else ''} stands behind it already"
        if not isinstance(node.op, (*_IDEMPOTENT, *_LINEAR)):
            return f"{node.op.opcode} is not idempotent: applied twice it is another function"
        return ""

    def _layer(self, x: Value, node: Node) -> Value:
        """The identity layer on `x`, with batch norm if asked for, and the activation of `node`."""
        graph, channels = x.graph, _channels(x)
        name = graph.unused_name(f"{node.name or node.op.opcode}_identity")
        if len(x.shape) == 2:
            h = dense(x, channels, init=IdentityKernel(), name=name)
        else:
            size = (self.kernel,) * (len(x.shape) - 2)
            pad = tuple(k // 2 for k in size)
            h = conv(x, channels, size, pad=pad, init=IdentityKernel(), name=name)
        if self.norm:
            h = _identity_norm(h, f"{name}_norm")
        if isinstance(node.op, _IDEMPOTENT):
            again = graph.unused_name(f"{node.name or node.op.opcode}_again")
            h = graph.emit(node.op, h, name=again)
        return h


def _identity_norm(x: Value, name: str) -> Value:
    """Batch norm that gives back its input as long as its running statistics are new."""
    return batch_norm(x, eps=_EPS, var_init=Constant(1.0 - _EPS), name=name)
