"""Horizontal fusion: layers side by side become one layer and a split.

One input (ParaDise, rule R10), convolutions of one stride, dilation, number of groups and size of
the output, or dense layers:

    y_b = layer(x; W_b) + b_b    ->    y_1, y_2, ... = split(layer(x; concat W_b) + concat b_b)

Kernels of several windows are embedded into a common one. Per axis, with leading pads p_b, kernel
sizes k_b and dilation d, where all (P - p_b) are multiples of d:

    P = max p_b,   delta_b = (P - p_b) / d,   K = max (delta_b + k_b),   W_b at taps delta_b + i

and the trailing pad is that of a layer that reaches K. With g groups, rows are interleaved: group q
of the wide layer holds group q of every layer.

Several inputs of one type, layers of one shape:

    conv     concat of the inputs, one convolution of sum g groups, split             channels
    dense    y[b] = x[b] W[b]^T + b[b]: one batched product over a stack, split       [B, N, K]

All are the same sums (R10 adds zeros), in an order that may differ. A missing bias is zero. What is
concatenated are parameter expressions; `materialise` makes them leaves.

Layers are independent if they stand at one level, the longest distance from the inputs of the graph
(what only reads states does not count): of two layers of which one is computed from the other, one
stands higher. Contracting layers of one level leaves levels as they are, so no cycle can arise.
Layers between which an exit takes samples away stay apart.

Whether it pays is predicted by `benefit`; measuring is the compiler's, which may object to families
that look worthwhile (`objection`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

from branchgraph.ir.cost import node_macs
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.graph import Graph, Node, Value, at, shared_scope
from branchgraph.ir.op import make
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Embed, Reshape, Split
from branchgraph.passes.base import Pass, Report

Fields = dict[str, Any]


@dataclass(frozen=True)
class FuseSiblings(Pass, spelling="fuse_siblings", claim="exact"):
    """Make layers that stand side by side one layer, where that is predicted to pay.

    `launch` and `move` say how many multiply-accumulates the start of a kernel, and moving one
    element, are worth; `batch` stands for symbolic sizes. `training` counts the assembling of
    kernels too, which every training step repeats. `stack` allows layers with different inputs.
    """

    launch: int = 250_000
    move: int = 40
    batch: int = 1
    training: bool = False
    stack: bool = True

    def rewrite(self, graph: Graph, report: Report) -> None:
        refusals: dict[Node, str] = {}
        while self._round(graph, report, refusals):
            refusals.clear()
        for node, reason in refusals.items():
            report.refused(node, reason)

    def _round(self, graph: Graph, report: Report, refusals: dict[Node, str]) -> bool:
        """Fuse what can be fused now; whether anything was."""
        layers, done = _layers(graph), set[Node]()
        for kind in (_SHARED, _STACKED) if self.stack else (_SHARED,):
            for family in self._families(layers, kind, refusals) if not done else ():
                done |= self._fused(graph, family, report, refusals)
        return bool(done)

    def _families(
        self, layers: Iterable[Layer], kind: _Kind, refusals: dict[Node, str]
    ) -> Iterator[Family]:
        """Groups of at least two layers that agree in all that their kind asks for."""
        near: dict[Any, list[Layer]] = {}
        for layer in layers:
            near.setdefault(kind.near(layer), []).append(layer)
        for candidates in near.values():
            groups: dict[Any, list[Layer]] = {}
            for layer in candidates if len(candidates) > 1 else ():
                groups.setdefault(tuple(kind.same(layer).items()), []).append(layer)
            for members in groups.values():
                if len(members) > 1:
                    yield from self._worthwhile(kind, members, refusals)
                else:
                    reason = _difference(kind, members[0], candidates)
                    refusals.setdefault(members[0].node, reason)

    def _worthwhile(
        self, kind: _Kind, members: list[Layer], refusals: dict[Node, str]
    ) -> Iterator[Family]:
        """Families of `members`: those of one window first, joined while that pays."""
        windows: dict[Any, list[Layer]] = {}
        for layer in members:
            windows.setdefault(layer.window, []).append(layer)
        found: list[Family] = []
        for group in sorted(windows.values(), key=lambda group: prod(group[0].kernel)):
            apart = Family(kind, tuple(group))
            joined = Family(kind, (*found[-1].layers, *group)) if found else apart
            if found and self.benefit(joined) >= self._gain(found[-1]) + self._gain(apart):
                found[-1] = joined
            else:
                found.append(apart)
        for family in found:
            reason = ""
            if self._gain(family):
                ordered = Family(kind, tuple(layer for layer in members if layer in family.layers))
                reason = self.objection(ordered)
                if not reason:
                    yield ordered
                    continue
            whole = family if len(family.layers) > 1 else Family(kind, tuple(members))
            reason = reason or f"it would not pay: {self._account(whole)}"
            for layer in family.layers:
                refusals.setdefault(layer.node, reason)

    def objection(self, family: Family) -> str:
        """Why a family that is predicted to pay stays apart; empty to fuse it. To be overridden."""
        return ""

    def _gain(self, family: Family) -> int:
        return max(0, self.benefit(family)) if len(family.layers) > 1 else 0

    def benefit(self, family: Family) -> int:
        """Predicted gain of fusing, in multiply-accumulates.

            launch (B - 1) - move (elements copied) - (multiplications by zero)

        Copied are the inputs, if there are several, and in training the kernels. A split is a view.
        """
        saved = self.launch * (len(family.layers) - 1)
        return saved - self.move * self.copied(family) - family.zero_macs(self.batch)

    def copied(self, family: Family) -> int:
        """Elements that are moved because `family` is fused."""
        layers = family.layers
        inputs = sum(_at(layer.x.type.size, self.batch) for layer in layers)
        kernels = sum(_at(v.type.size, 1) for layer in layers for v in layer.node.inputs[1:])
        return inputs * family.kind.stacked + kernels * self.training

    def _account(self, family: Family) -> str:
        return (
            f"{len(family.layers) - 1} kernel starts saved, {self.copied(family):,} elements "
            f"moved, {family.zero_macs(self.batch):,} multiplications by zero"
        )

    def _fused(
        self, graph: Graph, family: Family, report: Report, refusals: dict[Node, str]
    ) -> set[Node]:
        """Put one layer in the place of a family; the nodes that went."""
        nodes = [layer.node for layer in family.layers]
        old = [node.output for node in nodes]
        with at(reduce(shared_scope, (node.scope for node in nodes))):
            new = family.build(graph.unused_name("siblings"))
        report.matched(" + ".join(n.path or n.op.opcode for n in nodes), before=old, after=new)
        for node, value in zip(nodes, new):
            refusals.pop(node, None)
            graph.replace(node.output, value)
            graph.remove(node)
        return set(nodes)


# -- layers and what they must agree in ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or dense layer, where it stands, and the exits that it leads to."""

    node: Node
    level: int
    exits: int

    @property
    def x(self) -> Value:
        return self.node.inputs[0]

    @property
    def weight(self) -> Value:
        return self.node.inputs[1]

    @property
    def conv(self) -> Conv | None:
        return self.node.op if isinstance(self.node.op, Conv) else None

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(k for k in self.weight.shape[2:] if isinstance(k, int))

    @property
    def window(self) -> tuple[tuple[int, ...], ...]:
        return (self.kernel, self.conv.pad) if self.conv else ()

    @property
    def filters(self) -> int:
        return _at(self.weight.shape[0], 1)


def _layers(graph: Graph) -> list[Layer]:
    """The layers of `graph`, but for those that compute parameters."""
    levels: dict[Node, int] = {}
    nodes = graph.nodes
    for node in nodes:
        below = (0 if v.state else levels[v.producer] if v.producer else 1 for v in node.inputs)
        highest = max(below, default=0)
        levels[node] = highest + 1 if highest else 0
    exits = _exits(nodes)
    return [
        Layer(n, levels[n], exits[n])
        for n in nodes
        if isinstance(n.op, (Conv, Dense)) and levels[n] and _concrete(n.inputs[1:])
    ]


def _exits(nodes: Sequence[Node]) -> dict[Node, int]:
    """The exits that each node leads to, one bit each."""
    found: dict[Node, int] = {}
    bit = 1
    for node in reversed(nodes):
        found[node] = reduce(int.__or__, (found[u] for v in node.outputs for u in v.users), 0)
        if node.op.opcode == "exit":
            found[node] |= bit
            bit <<= 1
    return found


def _concrete(values: Iterable[Value]) -> bool:
    return all(isinstance(d, int) for v in values for d in v.shape)


def _at(size: DimLike, batch: int) -> int:
    """`size` with `batch` for every symbol."""
    bound = size.substitute(dict.fromkeys(size.symbols, batch)) if isinstance(size, Dim) else size
    assert isinstance(bound, int)
    return bound


@dataclass(frozen=True)
class _Kind:
    """A way to fuse: what makes layers candidates, and what they must agree in besides."""

    near: Callable[[Layer], Any]
    same: Callable[[Layer], Fields]
    stacked: bool


def _of_one_input(layer: Layer) -> Fields:
    common: Fields = {"depth": layer.level, "exits": layer.exits}
    op = layer.conv
    if op is None:
        return common
    phase = tuple(p % d for p, d in zip(op.begin, op.dilation))
    return {
        **common,
        **{name: getattr(op, name) for name in ("stride", "dilation", "groups")},
        "size of the output": layer.node.output.shape[2:],
        "pads between the taps": phase,
    }


def _of_one_shape(layer: Layer) -> Fields:
    # Behind an exit rows are thinned out on axis 0, where a stack has its layers.
    alone = layer.exits and layer.conv is None
    return {
        "dtype": layer.x.dtype,
        "rows": layer.x.shape[0],
        "attributes": layer.node.op,
        "exits": layer.exits,
        "axis": layer.node if alone else None,
    }


_SHARED = _Kind(lambda layer: (layer.node.op.opcode, layer.x), _of_one_input, stacked=False)
_STACKED = _Kind(
    lambda layer: (layer.node.op.opcode, layer.level, layer.x.shape[1:], layer.weight.shape),
    _of_one_shape,
    stacked=True,
)
_REASONS = {
    "depth": "one of them is computed from another, or from values as deep",
    "exits": "an exit stands between them",
    "axis": "a stack has layers on axis 0, where exits thin out rows",
}


def _difference(kind: _Kind, layer: Layer, candidates: Iterable[Layer]) -> str:
    """Why `layer` agrees with none of `candidates`."""
    mine = kind.same(layer)
    others = [kind.same(other) for other in candidates if other is not layer]
    nearest = min(others, key=lambda o: sum(o[k] != v for k, v in mine.items()))
    name = next(k for k, v in mine.items() if nearest[k] != v)
    if name in _REASONS:
        return _REASONS[name]
    return f"it differs in {name}: {_text(mine[name])}, beside {_text(nearest[name])}"


def _text(value: Any) -> str:
    return str([str(v) for v in value]).replace("'", "") if isinstance(value, tuple) else str(value)


# -- building --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Layers that are to become one."""

    kind: _Kind
    layers: tuple[Layer, ...]

    def over(self, nodes: Iterable[Node]) -> Family:
        """The same family in a copy of its graph, where its layers are `nodes`."""
        there = (replace(layer, node=node) for layer, node in zip(self.layers, nodes))
        return replace(self, layers=tuple(there))

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def graph(self) -> Graph:
        return self.first.x.graph

    def zero_macs(self, batch: int) -> int:
        """Multiplications by zeros of embedded kernels."""
        window = prod(self._window()[0]) if self.first.conv else 1
        macs = ((node_macs(layer.node), prod(layer.kernel)) for layer in self.layers)
        return sum(_at(m, batch) // size * (window - size) for m, size in macs)

    def build(self, name: str) -> list[Value]:
        """One value for each layer, cut out of what the wide layer gives."""
        if self.kind.stacked:
            return self._grouped(name) if self.first.conv else self._batched(name)
        return self._wide(name)

    def _wide(self, name: str) -> list[Value]:
        """All layers as one of their common input."""
        op, groups = self.first.node.op, 1
        if isinstance(op, Conv):
            kernel, pad = self._window()
            groups = op.groups
            weights = [self._embedded(layer, kernel, pad) for layer in self.layers]
            op = Conv(**{**op.geometry(), "pad": pad})
        else:
            weights = [layer.weight for layer in self.layers]
        operands = [_interleaved(weights, groups, f"{name}.weight")]
        if self._biased:
            operands.append(_interleaved(self._biases(), groups, f"{name}.bias"))
        y = self.graph.emit(op, self.first.x, *operands, name=name)
        return _parted(y, [layer.filters for layer in self.layers], groups)

    def _grouped(self, name: str) -> list[Value]:
        """Convolutions of several inputs as one with a group for each group of each."""
        op = self.first.conv
        assert op is not None
        x = self.graph.emit(Concat(axis=1), *(layer.x for layer in self.layers))
        weights = [layer.weight for layer in self.layers]
        operands = [_interleaved(weights, 1, f"{name}.weight")]
        if self._biased:
            operands.append(_interleaved(self._biases(), 1, f"{name}.bias"))
        wide = Conv(**{**op.geometry(), "groups": op.groups * len(self.layers)})
        y = self.graph.emit(wide, x, *operands, name=name)
        return _parted(y, [layer.filters for layer in self.layers], 1)

    def _batched(self, name: str) -> list[Value]:
        """Dense layers of several inputs as one batched product."""
        x = _stacked([layer.x for layer in self.layers])
        weight = _stacked([layer.weight for layer in self.layers], f"{name}.weight")
        y = self.graph.emit(MatMul(transpose_b=True), x, weight, name=name)
        if self._biased:
            bias = _stacked(self._biases())
            column = Reshape(shape=(bias.shape[0], 1, bias.shape[1]))
            y = y + self.graph.emit(column, bias, name=f"{name}.bias")
        parts = self.graph.apply(Split(axis=0, sizes=(1,) * len(self.layers)), y)
        return [self.graph.emit(Reshape(shape=part.shape[1:]), part) for part in parts]

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel size and pads of the smallest window that holds every kernel."""
        kernel, begin, end = [], [], []
        for a in range(len(self.first.kernel)):
            ways = [(conv.begin[a], layer.kernel[a], conv.dilation[a], conv.end[a])
                    for layer in self.layers if (conv := layer.conv)]  # fmt: skip
            pad = max(p for p, *_ in ways)
            reach, trailing = max(((pad - p) // d + k, e) for p, k, d, e in ways)
            kernel.append(reach)
            begin.append(pad)
            end.append(trailing)
        return tuple(kernel), (*begin, *end)

    def _embedded(self, layer: Layer, kernel: Sequence[int], pad: Sequence[int]) -> Value:
        """The kernel of `layer` in the common window."""
        conv, weight = layer.conv, layer.weight
        assert conv is not None
        for a, size in enumerate(kernel):
            start = (pad[a] - conv.begin[a]) // conv.dilation[a]
            if size != layer.kernel[a]:
                weight = self.graph.emit(Embed(axis=2 + a, start=start, size=size), weight)
        return weight

    @property
    def _biased(self) -> bool:
        return any(len(layer.node.inputs) > 2 for layer in self.layers)

    def _biases(self) -> list[Value]:
        return [self._bias(layer) for layer in self.layers]

    def _bias(self, layer: Layer) -> Value:
        given = layer.node.inputs[2:]
        if given:
            return given[0]
        zeros = make("full", value=0.0, shape=(layer.filters,), dtype=layer.x.dtype)
        return self.graph.emit(zeros)


def _interleaved(values: Sequence[Value], groups: int, name: str) -> Value:
    """`values` one after another along axis 0, group by group."""
    graph = values[0].graph
    if groups == 1:
        return graph.emit(Concat(axis=0), *values, name=name)
    rest = values[0].shape[1:]
    apart = [
        graph.emit(Reshape(shape=(groups, _at(v.shape[0], 1) // groups, *rest)), v) for v in values
    ]
    joined = graph.emit(Concat(axis=1), *apart)
    filters = groups * _at(joined.shape[1], 1)
    return graph.emit(Reshape(shape=(filters, *rest)), joined, name=name)


def _parted(y: Value, sizes: Sequence[int], groups: int) -> list[Value]:
    """The channels of each layer out of those of the wide one, the inverse of `_interleaved`."""
    graph = y.graph
    if groups == 1:
        return list(graph.apply(Split(axis=1, sizes=tuple(sizes)), y))
    rows, spatial = y.shape[0], y.shape[2:]
    grouped = graph.emit(Reshape(shape=(rows, groups, sum(sizes) // groups, *spatial)), y)
    parts = graph.apply(Split(axis=2, sizes=tuple(s // groups for s in sizes)), grouped)
    return [graph.emit(Reshape(shape=(rows, s, *spatial)), p) for s, p in zip(sizes, parts)]


def _stacked(values: Sequence[Value], name: str = "") -> Value:
    """[B, ...] from B values of one shape."""
    graph = values[0].graph
    rows = [graph.emit(Reshape(shape=(1, *v.shape)), v) for v in values]
    return graph.emit(Concat(axis=0), *rows, name=name)
