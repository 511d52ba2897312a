"""Branches gated for each sample: their kernels are mixed instead of their results (R13).

    y[n] = sum_b g[n, b] (W_b * x[n] + b_b) = (sum_b g[n, b] W'_b) * x[n] + sum_b g[n, b] b_b

with W'_b in one frame (see `frame`): everything static is fused before, the mixture remains, since
g depends on x. A branch without gate counts with g = 1. Gates are one number a sample (PD-B;
CondConv, arXiv 1904.04971), or one a sample and output channel (squeeze and excitation):

    W[n, o] = sum_b g[n, b, o] W'_b[o]

Where the gates are all parts of one softmax over branches 1..B they sum to 1, and

    W[n] = W'_B + sum_{b < B} g[n, b] (W'_b - W'_B)

saves a product an element (ParaDise 3.3 (iv)); the differences are static. Gates that are the same
for all samples are no matter of this module: they are scales (`reading`).

Exact. A gate that varies over space is no kernel, and its multiplication stays. Mixing costs B or
B - 1 products an element of the kernel, less than the convolutions it saves unless maps are tiny;
scaling the kernel of a single branch saves nothing, so it waits for `grow=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from branchgraph.ir.dims import product
from branchgraph.ir.functions import sample_conv
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.activation import Softmax
from branchgraph.ir.ops.elementwise import Multiply
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.ir.ops.reshape import Reshape, Slice
from branchgraph.passes.fuse_branches.concats import bias_of
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, name_for, part_name, too_dear
from branchgraph.passes.fuse_branches.frame import Frame, frame_of, regroups
from branchgraph.passes.fuse_branches.layer import Layer, call, reshaped, spent_by, total
from branchgraph.passes.fuse_branches.reading import views
from branchgraph.passes.fuse_branches.world import World


@dataclass(frozen=True, eq=False)
class Gated:
    """A branch and its gate [N, 1] or [N, O], none where it counts as it is."""

    index: int
    layer: Layer
    gate: Value | None
    node: Node | None


def mixtures(node: Node, world: World) -> Fusion | Refusal | None:
    """R13: a sum of gated layers on one input."""
    if not isinstance(node.op, Sum) or not node.output.dtype.is_float:
        return None
    read = [e for i, v in enumerate(node.inputs) for e in _gated(i, v, node, world)]
    best: list[Gated] = []
    for x, stride in dict.fromkeys((e.layer.x, e.layer.stride) for e in read):
        same = [e for e in read if e.layer.x is x and e.layer.stride == stride]
        terms = list({e.index: e for e in reversed(same)}.values())[::-1]
        paid = sum(1 for e in terms if e.layer.spent)
        if len(terms) > max(1, len(best)) and paid and any(e.gate for e in terms):
            best = terms
    return _mixture(node, best, world) if best else None


def single(node: Node, world: World) -> Fusion | Refusal | None:
    """R13: a gate for each sample and channel on one layer."""
    if not isinstance(node.op, (Multiply, Select)) or not node.output.dtype.is_float:
        return None
    found = [e for e in _branches(0, node.output, node, world) if e.layer.spent]
    return _mixture(node, found[:1], world) if found else None


def _mixture(node: Node, terms: Sequence[Gated], world: World) -> Fusion | Refusal | None:
    layers = [e.layer for e in terms]
    frame = frame_of(layers)
    whole = frame.around(layers[0], layers[0].filters, layers[0].channels)
    rules = frozenset({"R13"}).union(*(v.rules for v in layers), regroups(layers, frame))
    if not rules <= world.enabled:
        return None
    if not frame.stride:
        return Refusal("R13", "a product for each sample costs as much as the dense layers")
    spent = spent_by(layers)
    biased = any(layer.bias for layer in layers)
    products = len(layers) - (1 if _softmax(terms) else 0)
    mixing = products * (prod(whole.shape) + (whole.filters if biased else 0))
    if whole.macs + mixing > spent and not world.grow:
        return Refusal("R13", too_dear(spent, whole.macs + mixing))
    name, where = name_for(node, layers)
    gates = [e.node for e in terms if e.node is not None]
    inside = dict.fromkeys((node, *gates, *(n for v in layers for n in v.nodes)))
    return Fusion(
        node, tuple(inside), rules, whole.macs + mixing - spent,
        partial(_build, node, terms, frame, name), where, any(v.for_size for v in layers),
    )  # fmt: skip


# -- reading ---------------------------------------------------------------------------------------


def _gated(index: int, value: Value, reader: Node, world: World) -> list[Gated]:
    """An operand of a sum as gated layers, or as layers without gate."""
    plain = [Gated(index, v, None, None) for v in views(value, reader, world) if v.map is None]
    node = value.producer
    if node is None or not world.private(value, reader):
        return plain
    return [*_branches(index, value, node, world), *plain]


def _branches(index: int, value: Value, node: Node, world: World) -> list[Gated]:
    """`gate * layer` as that layer, deep or shallow."""
    if not isinstance(node.op, (Multiply, Select)) or len(node.inputs) != 2:
        return []
    ways = [node.inputs] if isinstance(node.op, Select) else [node.inputs, node.inputs[::-1]]
    found = []
    for inner, gate in ways:
        if inner.type != value.type or not _for_samples(gate, value):
            continue
        if world.fixed(gate) or world.row(gate):
            continue
        for layer in views(inner, node, world):
            if layer.map is None and layer.nodes:
                found.append(Gated(index, layer, gate, node))
    return found


def _for_samples(gate: Value, value: Value) -> bool:
    """Whether a gate is one number a sample, or one a sample and channel."""
    if len(value.shape) < 2 or len(gate.shape) != len(value.shape):
        return False
    if gate.shape[0] != value.shape[0]:
        return False
    return gate.shape[1] in (1, value.shape[1]) and all(d == 1 for d in gate.shape[2:])


# -- building --------------------------------------------------------------------------------------


def _build(node: Node, terms: Sequence[Gated], frame: Frame, name: str) -> Value:
    wide = any(e.gate is not None and e.gate.shape[1] != 1 for e in terms)
    taken = {e.index for e in terms}
    rest = [v for i, v in enumerate(node.inputs) if i not in taken]
    partly = isinstance(node.op, Sum) and bool(rest)
    called = part_name(node, name) if partly else name or node.graph.unused_name("fused")
    fused = call(
        _by_channel(terms, frame) if wide else _by_sample(terms, frame, called), called
    )  # fmt: skip
    return node.graph.emit(Sum(), fused, *rest, name=node.name) if partly else fused


def _by_sample(terms: Sequence[Gated], frame: Frame, name: str) -> Value:
    """One number a sample and branch: kernels are mixed by a matrix product."""
    terms = _in_order(terms)
    x = terms[0].layer.x
    rows = [_row(frame.weight(e.layer)) for e in terms]
    biases = [_row(bias_of(e.layer)) for e in terms] if any(e.layer.bias for e in terms) else []
    softmax, mix = _softmax(terms), _mixed
    if softmax is None:
        mixture = _together(terms) or x.graph.emit(
            Concat(axis=1), *(_gate(e, (x.shape[0], 1)) for e in terms)
        )
    else:
        # Made anew: that its rows sum to 1 belongs to what is replaced.
        gates = x.graph.emit(softmax.op, softmax.inputs[0], name=softmax.name)
        cut = Slice(axis=1, start=0, size=len(terms) - 1)
        mixture = x.graph.emit(cut, reshaped(gates, gates.shape[:2]))
        mix = _mixed_around_last
    return sample_conv(
        x, mix(mixture, rows, f"{name}.weight"),
        mix(mixture, biases, f"{name}.bias") if biases else None,
        stride=frame.stride, pad=(*frame.begin, *frame.end), dilation=frame.dilation,
        groups=frame.groups,
    )  # fmt: skip


def _mixed(mixture: Value, rows: Sequence[Value], name: str) -> Value:
    """sum_b mixture[n, b] rows[b]: [N, *rows[0].shape[1:]]."""
    shape = rows[0].shape[1:]
    listed = mixture.graph.emit(Concat(axis=0), *rows) if len(rows) > 1 else rows[0]
    flat = call(reshaped(listed, (len(rows), product(shape))), name)
    mixed = mixture.graph.emit(MatMul(), mixture, flat)
    return reshaped(mixed, (mixture.shape[0], *shape))


def _mixed_around_last(mixture: Value, rows: Sequence[Value], name: str) -> Value:
    """The same where `mixture` lacks its last column, and with that each row sums to 1."""
    *others, last = rows
    return last + _mixed(mixture, [row - last for row in others], name)


def _by_channel(terms: Sequence[Gated], frame: Frame) -> Value:
    """One number a sample, branch and channel: kernels are scaled and added."""
    x = terms[0].layer.x
    kernels, biases = [], []
    for e in terms:
        row = _row(frame.weight(e.layer))
        rank = len(row.shape)
        width = 1 if e.gate is None else e.gate.shape[1]
        kernels.append(row * _gate(e, (x.shape[0], width, *(1,) * (rank - 2))))
        if e.layer.bias is not None:
            biases.append(_row(bias_of(e.layer)) * _gate(e, (x.shape[0], width)))
    return sample_conv(
        x, total(kernels), total(biases) if biases else None, stride=frame.stride,
        pad=(*frame.begin, *frame.end), dilation=frame.dilation, groups=frame.groups,
    )  # fmt: skip


def _row(value: Value) -> Value:
    return reshaped(value, (1, *value.shape))


def _gate(entry: Gated, shape: tuple[object, ...]) -> Value:
    """The gate of a branch under a shape, ones if it has none."""
    if entry.gate is not None:
        return entry.gate.graph.emit(Reshape(shape=shape), entry.gate)  # type: ignore[arg-type]
    x = entry.layer.x
    return x.graph.emit(make("full", value=1.0, shape=shape, dtype=x.dtype))


def _cut(entry: Gated) -> tuple[Value, int] | None:
    """What a gate is one channel of, and which."""
    cut = entry.gate.producer if entry.gate is not None else None
    if cut is None or not isinstance(cut.op, Slice) or (cut.op.axis, cut.op.size) != (1, 1):
        return None
    return cut.inputs[0], cut.op.start


def _source(terms: Sequence[Gated]) -> Value | None:
    """What the gates are the channels of, each of one, if there is one such value."""
    cuts = [cut for cut in map(_cut, terms) if cut]
    if len(cuts) < len(terms) or len({source for source, _ in cuts}) > 1:
        return None
    (source, _), *_ = cuts
    channels = sorted(channel for _, channel in cuts)
    return source if [*channels] == [*range(len(terms))] and source.shape[1] == len(terms) else None


def _in_order(terms: Sequence[Gated]) -> Sequence[Gated]:
    """Branches in the order of the channels that their gates are, if these are of one value."""
    if _source(terms) is None:
        return terms
    return sorted(terms, key=lambda e: (_cut(e) or (None, 0))[1])


def _together(terms: Sequence[Gated]) -> Value | None:
    """The matrix [N, B] that the gates are the columns of, if they were cut from one."""
    source = _source(terms)
    return None if source is None else reshaped(source, source.shape[:2])


def _softmax(terms: Sequence[Gated]) -> Node | None:
    """The softmax over the branches that the gates are, so that they sum to 1, if they are one."""
    value = _source(terms)
    while value is not None and value.producer is not None:
        node = value.producer
        if isinstance(node.op, Softmax):
            return node if node.op.axis == 1 and len(terms) > 1 else None
        before = node.inputs[0] if isinstance(node.op, Reshape) else None
        value = before if before is not None and before.shape[:2] == value.shape[:2] else None
    return None
