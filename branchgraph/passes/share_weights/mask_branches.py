"""Branches that keep their own part of the channels of common layers (arXiv 1803.05872).

A layer keeps its d channels and its weights exist once. With the overlap r, B branches have

    x = d / (1 + B (1/r - 1))  channels in common,      x = 0 where r = 0
    m = x (1/r - 1)            of each branch alone,    m = d / B where r = 0

each rounded, halves up. Branch b keeps channels 0 to x - 1 and x + b m to x + (b + 1) m - 1, the
last branch all that are left; where a channel is not kept, `select(y, mask_b)` is 0 behind every
layer, every batch norm and every op that does not keep zeros. A concatenation has the masks of its
parts. Running statistics exist once a branch, so that those of a channel that it does not keep are
never used.

The last layers, the heads, exist once a branch and keep all their outputs. If they are `wide` there
is one of B n units for all, of which a branch has those that it keeps (an embedding of 128 B). If
`all` layers are wide, each has B times its channels, channel k with the weights of channel k mod n,
and branches read what comes before them whole: without overlap each starts as the plain network.

    W_wide[o, i] = W[o mod n, source(i)]        source(i): the plain channel that channel i repeats

A `tile`d layer reads the k channels that are kept, g, repeated to fill the zeros, each part of a
concatenation by itself: channel j is g[j mod k].

A weight is connected if some branch keeps both channels; only these have weight decay
(`connections`, `ConnectedDecay`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import floor, prod

import numpy as np

from branchgraph.ir.builder import concat, gate
from branchgraph.ir.errors import GraphError, RefusalError, ShapeError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.hooks import Hook, weight_decay
from branchgraph.ir.ops.activation import Elu, LeakyRelu, Relu, Tanh
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Multiply
from branchgraph.ir.ops.gate import ScaleGradient, Select
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Pad, Reshape
from branchgraph.ir.state import State
from branchgraph.passes.clean import nodes_below
from branchgraph.passes.constant_arrays import write
from branchgraph.passes.share_weights.branch_copies import BranchCopy, Origin
from branchgraph.passes.share_weights.channel_halves import LAYERS, NORMS, refuse, taken

#: Who keeps a channel: the number of a branch from 0, or ALL.
Owners = tuple[int, ...]
ALL = -1

#: Ops that give 0 in a channel in which all their operands are 0.
_KEEP_ZEROS = (
    Relu, LeakyRelu, Elu, Tanh, Multiply, Select, ScaleGradient, Sum, Mean, Product, Maximum,
    MaxPool, AveragePool, Dropout, ReduceSum, ReduceMean, ReduceMax, Reshape, Pad, Concat,
)  # fmt: skip


def owners(channels: int, branches: int, overlap: float) -> Owners:
    """Who keeps each channel of a layer."""
    if overlap == 0:
        common, own = 0, _rounded(channels / branches)
    else:
        exact = channels / (1 + branches * (1 / overlap - 1))
        common, own = _rounded(exact), _rounded(exact * (1 / overlap - 1))
    if own == 0:
        if common < channels:
            raise RefusalError(
                f"{channels} channels are too few for {branches} branches that overlap {overlap}"
            )
        return (ALL,) * channels
    rest = (min(k // own, branches - 1) for k in range(channels - common))
    found = (*(ALL,) * common, *rest)
    if not common and len(set(found)) < branches:
        raise RefusalError(f"{channels} channels are too few for {branches} branches")
    return found


def _rounded(x: float) -> int:
    """To the nearest integer, halves up."""
    return floor(x + 0.5)


def heads(nodes: Sequence[Node]) -> set[Node]:
    """Layers that no other layer depends on."""
    layers = [n for n in nodes if isinstance(n.op, LAYERS)]
    inner = {n for layer in layers for n in nodes_below([layer]) if n is not layer}
    return set(layers) - inner


@dataclass(frozen=True)
class Kept:
    """The channels of a value: who keeps each, which plain one it repeats, what was joined."""

    owners: Owners
    source: tuple[int, ...]
    parts: tuple[int, ...]

    @staticmethod
    def of(found: Owners, plain: int) -> Kept:
        """A layer's output; channels from `plain` on repeat the first ones."""
        return Kept(found, tuple(k % plain for k in range(len(found))), (len(found),))

    def by(self, branch: int) -> tuple[int, ...]:
        """The channels that branch number `branch` (from 0) keeps."""
        return tuple(k for k, o in enumerate(self.owners) if o in (ALL, branch))

    def repeated(self, times: int) -> Kept:
        """Every channel as a block of `times`, as flattening makes it."""
        return Kept(
            tuple(o for o in self.owners for _ in range(times)),
            tuple(k * times + j for k in self.source for j in range(times)),
            tuple(p * times for p in self.parts),
        )


class Masks:
    """Who keeps the channels of every value, the same in all branches."""

    def __init__(
        self, nodes: Sequence[Node], branches: int, overlap: float, wide: str = "none"
    ) -> None:
        self.branches = branches
        self.overlap = overlap
        self.wide = wide
        self.heads = heads(nodes)
        self.kept: dict[Value, Kept | None] = {}
        #: What the heads make, where they are wide.
        self.units: dict[Node, Kept] = {}
        inside = set(nodes)
        for node in nodes:
            for value in node.inputs:
                if value.producer is not None and value.producer not in inside:
                    self.kept[value] = self._of_trunk(value)
            self.kept[node.outputs[0]] = self._of_node(node)

    def _of_trunk(self, value: Value) -> Kept | None:
        size = value.shape[1] if len(value.shape) > 1 else None
        if not isinstance(size, int) or self.wide == "all":
            return None
        return Kept.of(owners(size, self.branches, self.overlap), size)

    def _of_node(self, node: Node) -> Kept | None:
        x = self.kept.get(node.inputs[0]) if node.inputs else None
        if isinstance(node.op, LAYERS):
            return self._of_layer(node)
        if isinstance(node.op, NORMS):
            return x
        if isinstance(node.op, Concat) and node.op.axis == 1:
            return self._joined(node)
        if isinstance(node.op, Reshape):
            return self._reshaped(node, x)
        return self._common(node)

    def _of_layer(self, node: Node) -> Kept | None:
        if node.op.attributes().get("groups", 1) != 1:
            refuse(node, "masks of a grouped convolution would cut groups")
        n = node.output.shape[1]
        assert isinstance(n, int)
        head = node in self.heads
        width = n * self.branches if self.wide == "all" or (self.wide == "heads" and head) else n
        if head and self.wide == "none":
            return None
        kept = Kept.of(owners(width, self.branches, self.overlap), n)
        if not head:
            return kept
        self.units[node] = kept
        return None

    def _joined(self, node: Node) -> Kept | None:
        parts = [(v, self.kept.get(v)) for v in node.inputs]
        if all(p is None for _, p in parts):
            return None
        start, joined = 0, Kept((), (), ())
        for value, part in parts:
            n = value.shape[1]
            assert isinstance(n, int)
            p = part or Kept.of((ALL,) * n, n)
            joined = Kept(
                joined.owners + p.owners,
                joined.source + tuple(start + k for k in p.source),
                joined.parts + p.parts,
            )
            start += n
        return joined

    def _reshaped(self, node: Node, x: Kept | None) -> Kept | None:
        old, new = node.inputs[0].shape, node.output.shape
        if x is None:
            return None
        n, inner = old[1], prod(d for d in old[2:] if isinstance(d, int))
        assert isinstance(n, int)
        if old[0] == new[0] and new[1] == n:
            return x
        if old[0] == new[0] and new[1] == n * inner:
            return x.repeated(inner)
        return refuse(node, "a reshape other than flattening cannot be masked")

    def _common(self, node: Node) -> Kept | None:
        """Operands with as many channels as the result agree on who keeps them."""
        y = node.outputs[0].shape
        masked = [(v, k) for v in node.inputs if (k := self.kept.get(v)) is not None]
        if not masked:
            return None
        if any(len(v.shape) < 2 or y[1:2] != v.shape[1:2] for v, _ in masked):
            refuse(node, "it mixes channels that different branches keep")
        beside = [v for v in node.inputs if self.kept.get(v) is None and v.shape[1:2] == y[1:2]]
        if len({(k.owners, k.source) for _, k in masked}) > 1 or beside:
            refuse(node, "its operands have different masks")
        # Operands that were joined differently are tiled as one part.
        first = masked[0][1]
        same = all(k.parts == first.parts for _, k in masked)
        return first if same else dataclasses.replace(first, parts=(len(first.owners),))


class WideStates:
    """States of layers that are wider than in the plain network, for all branches."""

    def __init__(self, graph: Graph, origin: Origin) -> None:
        self.graph = graph
        self.origin = origin
        self._values: dict[State, tuple[Value, tuple[tuple[int, ...], ...]]] = {}

    def read(self, node: Node, value: Value, *sources: tuple[int, ...]) -> Value:
        """The state `value` whose axes, from the first on, repeat the positions `sources`."""
        old = value.state
        if old is None:
            refuse(node, f"{value.label} is no state but an expression; materialise it first")
        if old not in self._values:
            self._values[old] = self._widened(old, sources), sources
        new, before = self._values[old]
        if before != sources:
            refuse(node, f"another layer reads {old.name} too, but is widened otherwise")
        return new

    def _widened(self, old: State, sources: tuple[tuple[int, ...], ...]) -> Value:
        """The state itself, if nothing is repeated."""
        if all(s == tuple(range(old.shape[axis])) for axis, s in enumerate(sources)):
            return self.graph.read(old)
        shape = (*map(len, sources), *old.shape[len(sources) :])
        new = dataclasses.replace(old, shape=shape)
        self.origin.cut(new, old, tuple(enumerate(sources)))
        return self.graph.read(new)


class MaskedBranch(BranchCopy):
    """One branch of common layers."""

    def __init__(
        self, graph: Graph, number: int, origin: Origin, mapped: dict[Value, Value], streams: int,
        masks: Masks, wide: WideStates, tile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(graph, number, origin, mapped, streams)
        self.masks = masks
        self.wide = wide
        self.tile = tile
        self._tiled: dict[Value, Value] = {}

    def trunk(self, value: Value) -> None:
        """Let the branch read its part of a value of the trunk."""
        self.mapped[value] = self._masked(self.mapped.get(value, value), self.masks.kept[value])

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        operands = list(inputs)
        if isinstance(node.op, LAYERS):
            operands = self._of_layer(node, inputs)
        elif isinstance(node.op, NORMS):
            x = self.masks.kept.get(node.inputs[0])
            if x is not None:
                operands[1:3] = [self.wide.read(node, v, x.source) for v in inputs[1:3]]
            order = x.source if x is not None else None
            operands[3:] = [self._own_whole(v, order) for v in node.inputs[3:]]
        first, *rest = self._result(node, tuple(operands))
        if not isinstance(node.op, _KEEP_ZEROS):
            first = self._masked(first, self.masks.kept.get(node.outputs[0]))
        return (first, *rest)

    def _of_layer(self, node: Node, inputs: tuple[Value, ...]) -> list[Value]:
        """The input, tiled perhaps, and the weights: of all branches or of this one."""
        x = self.masks.kept.get(node.inputs[0])
        y = self.masks.kept.get(node.outputs[0]) or self.masks.units.get(node)
        value = inputs[0] if x is None or not self.tile else self._filled(inputs[0], x)
        if y is None:
            head = node in self.masks.heads
            return [value, *(self._own_whole(v) if head else v for v in inputs[1:])]
        columns = tuple(range(int(inputs[1].shape[1]))) if x is None else x.source  # type: ignore[arg-type]
        read = [self.wide.read(node, inputs[1], y.source, columns)]
        read += [self.wide.read(node, bias, y.source) for bias in inputs[2:]]
        if node in self.masks.heads:
            read = [taken(v, 0, y.by(self.number - 1)) for v in read]
        return [value, *read]

    def _result(self, node: Node, operands: tuple[Value, ...]) -> tuple[Value, ...]:
        """The node over its operands, whose channels may be more than in the plain network."""
        if all(a.type == b.type for a, b in zip(operands, node.inputs)):
            return super().visit(node, operands)
        op = self._with_own_stream(node.op)
        kept = self.masks.kept.get(node.outputs[0])
        if isinstance(op, Reshape) and kept is not None:
            op = Reshape(shape=(op.shape[0], len(kept.owners), *op.shape[2:]))
        try:
            return self.graph.apply(op, *operands, name=node.name)
        except ShapeError as error:
            refuse(node, f"it cannot be widened: {error}")

    def _own_whole(self, value: Value, order: Sequence[int] | None = None) -> Value:
        assert value.state is not None
        return self.own(value.state, range(value.state.shape[0]) if order is None else order)

    def _masked(self, value: Value, kept: Kept | None) -> Value:
        if kept is None or len(kept.by(self.number - 1)) == len(kept.owners):
            return value
        tail = (1,) * (len(value.shape) - 2)
        parts = [
            self.graph.emit(Full(float(is_open), (len(list(run)), *tail), value.dtype))
            for is_open, run in groupby(o in (ALL, self.number - 1) for o in kept.owners)
        ]
        mask = concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        name = value.producer.name if value.producer else ""
        return gate(value, mask, name=f"{name}.mask" if name else "mask")

    # -- tiling ------------------------------------------------------------------------------------

    def _filled(self, value: Value, kept: Kept) -> Value:
        """Zeros filled by the channels that are kept; alike parts in a row at once."""
        if value not in self._tiled:
            filled, start = [], 0
            for own, run in groupby(self._patterns(kept)):
                times = len(list(run))
                size = times * len(own)
                part = (
                    taken(value, 1, range(start, start + size))
                    if size < len(kept.owners)
                    else value
                )
                filled.append(self._filled_parts(part, times, own))
                start += size
            self._tiled[value] = filled[0] if len(filled) == 1 else concat(*filled)
        return self._tiled[value]

    def _patterns(self, kept: Kept) -> list[tuple[bool, ...]]:
        """Whether the branch keeps each channel, part by part."""
        mine = iter([o in (ALL, self.number - 1) for o in kept.owners])
        return [tuple(next(mine) for _ in range(size)) for size in kept.parts]

    def _filled_parts(self, value: Value, times: int, own: tuple[bool, ...]) -> Value:
        """`times` parts of one pattern, each filled by what it keeps."""
        chosen = [k for k, is_open in enumerate(own) if is_open]
        if len(chosen) == len(own):
            return value
        positions = [chosen[k % len(chosen)] for k in range(len(own))]
        if times == 1:
            return taken(value, 1, positions)
        batch, _, *rest = value.shape
        apart = self.graph.emit(Reshape(shape=(batch, times, len(own), *rest)), value)
        return self.graph.emit(Reshape(shape=value.shape), taken(apart, 2, positions))


# -- weight decay ----------------------------------------------------------------------------------


#: Who keeps the output channels and the input channels of a weight.
Ends = tuple[Owners, Owners]


def connections(nodes: Sequence[Node], masks: Masks) -> dict[str, Ends]:
    """Who keeps the ends of each weight, by the name that its state has behind the pass.

    A layer that reads channels which nobody masks has the inputs of all branches.
    """
    found: dict[str, Ends] = {}
    for node in nodes:
        if not isinstance(node.op, LAYERS) or node.inputs[1].state is None:
            continue
        state, x = node.inputs[1].state, masks.kept.get(node.inputs[0])
        into = (ALL,) * state.shape[1] if x is None else x.owners
        y = masks.kept.get(node.outputs[0]) or masks.units.get(node)
        if y is not None:
            found[state.name] = y.owners, into
            continue
        for b in range(masks.branches):
            found[f"branch{b + 1}/{state.name}"] = (b,) * state.shape[0], into
    return found


@dataclass(frozen=True)
class ConnectedDecay(Hook):
    """g + rate p on a weight [out, in, ...] where some branch keeps both channels, else g.

    `ends` says who keeps them, by the name of the state. Weights that it does not name are decayed
    throughout; biases and norms never are. Keras' `l2(r)` is the rate 2 r.
    """

    rate: float
    ends: Mapping[str, Ends]

    def change(self, p: Value, g: Value, t: Value) -> Value:
        if len(p.shape) < 2:
            return g
        rate = p.graph.constant(self.rate, g.dtype)
        known = self.ends.get(p.name)
        return weight_decay(p if known is None else p * _connected(p, known), g, rate)


def _connected(p: Value, ends: Ends) -> Value:
    """1 where a branch keeps both channels: max over branches of out_b in_b."""
    if tuple(map(len, ends)) != p.shape[:2]:
        raise GraphError(
            f"{p.label}: expected {len(ends[0])} output and {len(ends[1])} input channels, got "
            f"{p.type}; take the decay from the pass that made the branches"
        )
    tail = (1,) * (len(p.shape) - 2)
    branches = sorted({o for end in ends for o in end} - {ALL}) or [ALL]

    def kept(end: Owners, branch: int, *shape: int) -> Value:
        array = np.isin(end, (ALL, branch)).astype(np.float64).reshape(*shape, *tail)
        return write(p.graph, array, p.dtype)

    both = [kept(ends[0], b, -1, 1) * kept(ends[1], b, 1, -1) for b in branches]
    return both[0] if len(both) == 1 else p.graph.emit(Maximum(), *both)
