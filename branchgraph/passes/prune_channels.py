"""Channels that carry nothing, removed from the layers that make and read them.

After the rules of `prune_gates`, for layers over channels c of x (facts v from `channel_facts`):

    concat slimming    conv(x; W, b), x[c] = 0          -> conv(x without c; W[:, without c], b)
                       conv(x; W, b), x[c] = v[c]       -> the same, b + sum_{c, i} W[:, c, i] v[c]
    filter slimming    conv(x; W, b), y[o] not needed   -> conv(x; W[without o], b[without o])
    group slimming     a grouped convolution loses whole groups, with what they read
    constant gate      select(y, c), c != 0             -> c goes into W and b, or gamma and beta,
                                                           of the layer that makes y (relu: c > 0)

A channel is *needed* when some reader needs it, walking back from the roots: mixing layers need
what is not known, channel-wise ops (activations, pooling, batch norm with fixed statistics, gates,
merges, flattening) need what is needed of their result, everything else needs all. What is not
needed is cut along the whole way, concat and batch norm included; where an op makes more than is
needed of it, the rest is sliced off behind it.

v != 0 leaves a layer only where no window reads padding: at a border of zeros the sum runs over
fewer taps. With `bias_maps` it leaves all the same, and the bias becomes one for each position h,

    padded             conv(x; W, b), x[c] = v[c]       -> conv(x without c; W[:, without c], b) + B
                       B[o, h] = sum_{c, i: h s + i d - p is in x} W[o, c, i] v[c]

(the bias map of rule R2 of `fuse_branches`): fewer multiplications for a number per filter and
position, exact for the size of the graph, which must be known. What stands behind a bias map is
slimmed with it, but batch norm no longer folds into the layer: fold before.

Weights that several layers read are not cut. New weights are slices of the old ones, so
`materialise` and `carry_slots` follow them. Exact for all finite states; not bit-equal, because
shorter sums may be added up in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from branchgraph.ir.builder import concat
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.elementwise import Add, Binary, Cast, Unary
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNorm, BatchNormInference
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Reshape, Slice
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.channel_facts import (
    Channels,
    Knowledge,
    channel_count,
    flattened,
    gate_channels,
    has_channels,
    spread,
)
from branchgraph.passes.clean import living
from branchgraph.passes.constant_arrays import write
from branchgraph.passes.fuse_branches.compose import composed
from branchgraph.passes.fuse_branches.layer import Layer, call
from branchgraph.passes.fuse_branches.reading import identity
from branchgraph.passes.prune_gates import Pruning


@dataclass(frozen=True)
class PruneChannels(Pass, spelling="prune_channels", claim="exact"):
    """Cut channels that are zero, constant or unread out of layers; absorb constant gates.

    `bias_maps` cuts constant channels in front of zero padding too, for a bias for each position.
    """

    bias_maps: bool = False

    def rewrite(self, graph: Graph, report: Report) -> None:
        if graph.gradients:
            report.refused(graph.name, "it has gradients; prune before differentiating")
            return
        pruning = Pruning(graph, report)
        pruning.fold()
        while _Slimming(graph, pruning, self.bias_maps).run() or _absorb_gates(graph, pruning):
            pruning.fold()
        pruning.finish()


# -- who needs which channels ----------------------------------------------------------------------


class _Slimming:
    """One walk back that finds the channels that are needed, and one forth that cuts the others."""

    def __init__(self, graph: Graph, pruning: Pruning, bias_maps: bool = False) -> None:
        self.graph = graph
        self.pruning = pruning
        self.bias_maps = bias_maps
        self.alive = living(graph)
        self.order = [n for n in graph.nodes if n in self.alive]
        self.knowledge = Knowledge(self.order)
        self.roots = set(graph.roots)
        self.needs: dict[Value, Channels] = {}
        self.cut: dict[Value, Value] = {}

    def run(self) -> bool:
        """Whether anything was cut."""
        for value in (*self.roots, *self._unread()):
            self.need(value, everything(value))
        for node in reversed(self.order):
            self._ask(node)
        matches = len(self.pruning.report.matches)
        for node in self.order:
            self._build(node)
        self.graph.touch()
        return len(self.pruning.report.matches) > matches

    def _unread(self) -> Iterator[Value]:
        """Results that nobody reads of what lives all the same."""
        for node in self.order:
            if not any(v in self.roots or self.alive.intersection(v.users) for v in node.outputs):
                yield from node.outputs

    def need(self, value: Value, channels: Channels) -> None:
        """Say that somebody reads these channels."""
        if value.producer is None:
            channels = everything(value)
        self.needs[value] = self.needs.get(value, frozenset()) | channels

    def kept(self, value: Value) -> Channels:
        """The channels that `value` will have."""
        return self.needs.get(value, frozenset())

    def owns(self, *values: Value) -> bool:
        """Whether each is read by one layer alone, and never updated."""
        return all(
            sum(user in self.alive for user in v.users) == 1
            and v not in self.roots
            and (v.state is None or v.state not in self.graph.updates)
            for v in values
        )

    def _ask(self, node: Node) -> None:
        """Pass the needs of the results of `node` on to its operands."""
        if not any(map(self.kept, node.outputs)):
            return
        part = _part(self, node)
        if part is None:
            for value in (*node.outputs, *node.inputs):
                self.need(value, everything(value))
            return
        self.need(node.output, part.rounded(self, node, self.kept(node.output)))
        part.ask(self, node, self.kept(node.output))
        for value in node.inputs:
            if value not in part.cuts(node):
                self.need(value, everything(value))

    def _build(self, node: Node) -> None:
        part = _part(self, node)
        if part is None or not self.kept(node.output):
            return
        whole = self.kept(node.output) == everything(node.output)
        same = all(self.kept(v) == everything(v) for v in part.cuts(node))
        if whole and same:
            return
        with at(node.scope):
            value = part.build(self, node)
        if whole:
            # What is known of a channel may follow from further back than any part holds.
            self.pruning.replaced("slimmed layer", node, value, compare=False)
            self.needs[value] = everything(value)
        else:
            self.cut[node.output] = value

    def read(self, value: Value, channels: Channels) -> Value:
        """These channels of `value`; what its producer could not leave out is sliced off."""
        have = sorted(self.kept(value))
        found = self.cut.get(value, value)
        return taken(found, 1, (i for i, c in enumerate(have) if c in channels))


def everything(value: Value) -> Channels:
    """All channels."""
    return frozenset(range(channel_count(value.shape)))


def taken(value: Value, axis: int, indices: Iterable[int]) -> Value:
    """Positions of `value` along an axis: one slice for each run of neighbours."""
    wanted = sorted(indices)
    if wanted == list(range(int(str(value.shape[axis])))):
        return value
    starts = [i for k, i in enumerate(wanted) if not k or wanted[k - 1] != i - 1]
    sizes = np.diff([wanted.index(i) for i in starts] + [len(wanted)])
    parts = [
        value.graph.emit(Slice(axis=axis, start=start, size=int(size)), value)
        for start, size in zip(starts, sizes)
    ]
    return parts[0] if len(parts) == 1 else concat(*parts, axis=axis)


# -- how the ops pass needs on ---------------------------------------------------------------------


class _Part:
    """How one kind of op takes part: what it can leave out, reads, and becomes."""

    def cuts(self, node: Node) -> Sequence[Value]:
        """Operands that carry channels."""
        return node.inputs[:1]

    def rounded(self, slim: _Slimming, node: Node, channels: Channels) -> Channels:
        """The channels that the op must make so as to make `channels`."""
        return channels

    def ask(self, slim: _Slimming, node: Node, channels: Channels) -> None:
        """Need what `channels` of the result are made of."""
        for value in self.cuts(node):
            slim.need(value, channels)

    def build(self, slim: _Slimming, node: Node) -> Value:
        """The op over what is left of its operands."""
        left, cuts = slim.kept(node.output), self.cuts(node)
        inputs = (slim.read(v, left) if v in cuts else v for v in node.inputs)
        return slim.graph.emit(node.op, *inputs, name=node.name)


class _Merge(_Part):
    def cuts(self, node: Node) -> Sequence[Value]:
        return node.inputs


class _BesideNumber(_Part):
    """Arithmetic with a single known number."""

    def cuts(self, node: Node) -> Sequence[Value]:
        return [v for v in node.inputs if v.shape == node.output.shape]


class _BesideMap(_Part):
    """A bias for each position: its channels go with those of the value."""

    def cuts(self, node: Node) -> Sequence[Value]:
        return [v for v in node.inputs if v is not _map_of(node)]

    def build(self, slim: _Slimming, node: Node) -> Value:
        left, bias = slim.kept(node.output), _map_of(node)
        inputs = (taken(v, 1, left) if v is bias else slim.read(v, left) for v in node.inputs)
        return slim.graph.emit(node.op, *inputs, name=node.name)


class _Norm(_Part):
    def rounded(self, slim: _Slimming, node: Node, channels: Channels) -> Channels:
        return channels if slim.owns(*node.inputs[1:]) else everything(node.output)

    def build(self, slim: _Slimming, node: Node) -> Value:
        x, *vectors = node.inputs
        left = slim.kept(node.output)
        cut = (taken(v, 0, left) for v in vectors)
        return slim.graph.emit(node.op, slim.read(x, left), *cut, name=node.name)


class _Gate(_Part):
    def build(self, slim: _Slimming, node: Node) -> Value:
        x, gate = node.inputs
        left, axis = slim.kept(node.output), len(gate.shape) - len(x.shape) + 1
        if axis >= 0 and gate.shape[axis] != 1:
            array = slim.knowledge.arrays.get(gate)
            assert array is not None
            array = np.take(array, sorted(left), axis=axis)
            gate = write(slim.graph, array, gate.dtype)
        return slim.graph.emit(node.op, slim.read(x, left), gate, name=node.name)


class _Flatten(_Part):
    def rounded(self, slim: _Slimming, node: Node, channels: Channels) -> Channels:
        positions = flattened(node)
        return spread({f // positions for f in channels}, positions)

    def ask(self, slim: _Slimming, node: Node, channels: Channels) -> None:
        positions = flattened(node)
        slim.need(node.inputs[0], frozenset(f // positions for f in channels))

    def build(self, slim: _Slimming, node: Node) -> Value:
        left, positions = slim.kept(node.output), flattened(node)
        shape = (node.output.shape[0], len(left))
        x = slim.read(node.inputs[0], frozenset(f // positions for f in left))
        return slim.graph.emit(Reshape(shape=shape), x, name=node.name)


class _Concat(_Part):
    def cuts(self, node: Node) -> Sequence[Value]:
        return node.inputs

    def ask(self, slim: _Slimming, node: Node, channels: Channels) -> None:
        for value, own in self.shares(node, channels):
            slim.need(value, own)

    def shares(self, node: Node, channels: Channels) -> Iterator[tuple[Value, Channels]]:
        """Every operand, with what `channels` of the result are in it."""
        start = 0
        for value in node.inputs:
            size = channel_count(value.shape)
            yield value, frozenset(c - start for c in channels if 0 <= c - start < size)
            start += size

    def build(self, slim: _Slimming, node: Node) -> Value:
        shares = self.shares(node, slim.kept(node.output))
        operands = [slim.read(v, own) for v, own in shares if own]
        return slim.graph.emit(node.op, *operands, name=node.name)


class _Layer(_Part):
    """A convolution in one group or a dense layer: every result reads every channel."""

    def rounded(self, slim: _Slimming, node: Node, channels: Channels) -> Channels:
        return channels if slim.owns(*node.inputs[1:]) else everything(node.output)

    def ask(self, slim: _Slimming, node: Node, channels: Channels) -> None:
        x = node.inputs[0]
        fact = slim.knowledge.of(x)
        idle = fact.zero
        reason = _border(node, slim.bias_maps)
        if not reason:
            idle = idle | fact.constant
        elif fact.constant:
            slim.pruning.refused(node, reason)
        if not slim.owns(*node.inputs[1:]):
            if idle:
                slim.pruning.refused(node, "its weight is read elsewhere too")
            idle = frozenset()
        # A layer reads one channel at least.
        slim.need(x, (everything(x) - idle) or frozenset({0}))

    def build(self, slim: _Slimming, node: Node) -> Value:
        x, weight, *bias = node.inputs
        left, read = slim.kept(node.output), slim.kept(x)
        filters = taken(weight, 0, left)
        vector = taken(bias[0], 0, left) if bias else None
        dropped = everything(x) - read
        shift = None
        if dropped & slim.knowledge.of(x).constant:
            shift = _response(node, filters, dropped, slim.knowledge.vector(x))
        if shift is not None and shift.bias is not None:
            vector = shift.bias() if vector is None else vector + shift.bias()
        operands = [
            slim.read(x, read),
            taken(filters, 1, read),
            *([] if vector is None else [vector]),
        ]
        made = slim.graph.emit(node.op, *operands, name=node.name)
        if shift is None or shift.map is None:
            return made
        slim.pruning.counts["bias map"] += 1
        name = node.name or slim.graph.unused_name("slimmed")
        bias_map = call(shift.map(), f"{name}.bias_map")
        return slim.graph.emit(Add(), made, bias_map, name=f"{name}.biased")


def _border(node: Node, bias_maps: bool) -> str:
    """Why a constant cannot go into the bias of a layer, or nothing."""
    if not isinstance(node.op, Conv) or not any(node.op.pad):
        return ""
    if not all(isinstance(d, int) for d in (*node.inputs[0].shape[2:], *node.output.shape[2:])):
        return (
            "constant channels stay: its padding is 0, and the size is not known for a bias map; "
            "bind it"
        )
    if not bias_maps:
        return (
            "constant channels stay: its padding is 0, not constant; bias_maps=true repairs it "
            "with a bias for each position"
        )
    return ""


def _response(node: Node, filters: Value, channels: Channels, vector: Value) -> Layer:
    """What a layer makes of v[c] in `channels`, a bias or a bias map: it reads 0 x[c] + v[c]."""
    weight, v = taken(filters, 1, channels), taken(vector, 0, channels)
    shape = tuple(int(str(d)) for d in weight.shape)
    x = identity(node.inputs[0])
    assert x is not None
    constants = replace(
        x, shape=(len(channels), 1, *(1,) * x.axes), groups=len(channels), bias=lambda: v
    )
    op = node.op if isinstance(node.op, Conv) else None
    reader = replace(
        constants,
        weight=lambda: weight,
        shape=shape,
        stride=op.stride if op else (),
        begin=op.begin if op else (),
        end=op.end if op else (),
        dilation=op.dilation if op else (),
        groups=1,
        size=node.output.shape[2:],
        bias=None,
        ones=False,
    )
    both = composed(reader, constants, bias_maps=True)
    assert isinstance(both, Layer)
    return both


class _Groups(_Part):
    """A grouped convolution: only whole groups go."""

    def rounded(self, slim: _Slimming, node: Node, channels: Channels) -> Channels:
        if not slim.owns(*node.inputs[1:]):
            return everything(node.output)
        return spread(_groups(node, channels), channel_count(node.output.shape) // _count(node))

    def ask(self, slim: _Slimming, node: Node, channels: Channels) -> None:
        x = node.inputs[0]
        size = channel_count(x.shape) // _count(node)
        slim.need(x, spread(_groups(node, channels), size))

    def build(self, slim: _Slimming, node: Node) -> Value:
        x, weight, *bias = node.inputs
        assert isinstance(node.op, Conv)
        left = slim.kept(node.output)
        vectors = (taken(v, 0, left) for v in (weight, *bias))
        groups = _groups(node, left)
        op = Conv(**{**node.op.geometry(), "groups": len(groups)})
        read = spread(groups, channel_count(x.shape) // node.op.groups)
        return slim.graph.emit(op, slim.read(x, read), *vectors, name=node.name)


def _count(node: Node) -> int:
    assert isinstance(node.op, Conv)
    return node.op.groups


def _groups(node: Node, channels: Channels) -> set[int]:
    size = channel_count(node.output.shape) // _count(node)
    return {c // size for c in channels}


_CHANNEL_WISE = _Part()
_PARTS: dict[type[Op], _Part] = {
    Concat: _Concat(),
    Dense: _Layer(),
    BatchNormInference: _Norm(),
    Select: _Gate(),
    Reshape: _Flatten(),
    **dict.fromkeys((Sum, Mean, Product, Maximum), _Merge()),
    **dict.fromkeys((MaxPool, AveragePool, ReduceSum, ReduceMean, ReduceMax, Cast), _CHANNEL_WISE),
}
_GROUPS, _WHOLE, _NUMBER, _MAP = _Groups(), _Layer(), _BesideNumber(), _BesideMap()


def _part(slim: _Slimming, node: Node) -> _Part | None:
    """How `node` takes part; None where it needs all of its operands."""
    op = node.op
    if len(node.outputs) != 1 or not has_channels(node.output.shape):
        return None
    if isinstance(op, BatchNorm) and slim.kept(node.output) != everything(node.output):
        slim.pruning.refused(node, "its statistics are not fixed; specialise(training=False)")
    if isinstance(op, Conv):
        return _WHOLE if op.groups == 1 else _GROUPS
    if isinstance(op, Unary):
        return _CHANNEL_WISE
    if isinstance(op, Binary):
        return _arithmetic(slim, node)
    return _PARTS.get(type(op)) if _fits(slim, node) else None


def _arithmetic(slim: _Slimming, node: Node) -> _Part | None:
    a, b = node.inputs
    if isinstance(node.op, Add) and a.type == b.type:
        return _PARTS[Sum]
    if _map_of(node) is not None:
        return _MAP
    arrays = [slim.knowledge.arrays.get(v) for v in (a, b)]
    alone = [v for v, array in zip((a, b), arrays) if array is None or array.size != 1]
    single = len(alone) == 1 and alone[0].shape == node.output.shape
    other = b if single and alone[0] is a else a
    return _NUMBER if single and other.shape != node.output.shape else None


def _map_of(node: Node) -> Value | None:
    """The bias map that a node adds to a value of the type of its result, if it does."""
    if not isinstance(node.op, Add) or len(node.output.shape) < 3:
        return None
    shape = (1, *node.output.shape[1:])
    for x, bias in (node.inputs, node.inputs[::-1]):
        if x.type == node.output.type and bias.type != x.type and bias.shape == shape:
            return bias
    return None


def _fits(slim: _Slimming, node: Node) -> bool:
    """Whether an op of a channel-wise kind is channel-wise here."""
    op = node.op
    if isinstance(op, Concat):
        return op.axis == 1
    if isinstance(op, (ReduceSum, ReduceMean, ReduceMax)):
        return bool(op.axes) and op.axes[0] >= 2
    if isinstance(op, Reshape):
        return flattened(node) > 0
    if isinstance(op, Select):
        x, gate = node.inputs
        axis = len(gate.shape) - len(x.shape) + 1
        return axis < 0 or gate.shape[axis] == 1 or slim.knowledge.arrays.get(gate) is not None
    return True


# -- gates that are neither open nor closed --------------------------------------------------------


def _absorb_gates(graph: Graph, pruning: Pruning) -> bool:
    """Multiply constant gates into the layers before them; whether any was."""
    slim = _Slimming(graph, pruning)
    done = False
    for node in slim.order:
        gate = slim.knowledge.arrays.get(node.inputs[1]) if isinstance(node.op, Select) else None
        if gate is None or (gate == 1).all():
            continue
        factors = _factors(gate, node)
        reason = "its gate is not one number a channel" if factors is None else ""
        chain = [] if factors is None else _chain(slim, node, factors)
        if factors is None or not chain:
            pruning.refused(node, reason or "no layer takes up its gate")
            continue
        with at(node.scope):
            pruning.replaced("constant gate", node, _scaled(chain, factors))
        done = True
    return done


def _factors(gate: np.ndarray, node: Node) -> np.ndarray | None:
    """The factor of each channel, if no channel is closed or mixed."""
    entries = gate_channels(gate, node.output.shape)
    if not has_channels(node.output.shape) or not all((e == e[0]).all() for e in entries):
        return None
    factors = np.array([e[0] for e in entries])
    return factors if (factors != 0).all() and np.isfinite(factors).all() else None


_SCALABLE = (Conv, Dense, BatchNorm, BatchNormInference)


def _chain(slim: _Slimming, node: Node, factors: np.ndarray) -> list[Node]:
    """The layer before a gate and what is between, outermost first; empty if none can be scaled."""
    chain: list[Node] = []
    value = node.inputs[0]
    while value.producer is not None and slim.owns(value):
        chain.append(value.producer)
        if isinstance(value.producer.op, _SCALABLE):
            return chain if slim.owns(*value.producer.inputs[1:3]) else []
        bias_map = _map_of(value.producer)
        positive = isinstance(value.producer.op, Relu) and (factors > 0).all()
        if bias_map is None and not positive:
            return []
        (value,) = (v for v in value.producer.inputs if v is not bias_map)
    return []


def _scaled(chain: list[Node], factors: np.ndarray) -> Value:
    """The chain with its layer's results multiplied by `factors`."""
    *between, layer = chain
    graph = layer.graph
    x, *parameters = layer.inputs
    count = 2 if isinstance(layer.op, (BatchNorm, BatchNormInference)) else len(parameters)

    def times(value: Value, axis: int = 0) -> Value:
        shape = (*(1,) * axis, len(factors), *(1,) * (len(value.shape) - axis - 1))
        return value * write(graph, factors.reshape(shape), value.dtype)

    scaled = map(times, parameters[:count])
    made = graph.emit(layer.op, x, *scaled, *parameters[count:], name=layer.name)
    for node in reversed(between):
        bias_map = _map_of(node)
        rest = () if bias_map is None else (times(bias_map, 1),)
        made = graph.emit(node.op, made, *rest, name=node.name)
    return made
