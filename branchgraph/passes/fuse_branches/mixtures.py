"""Branches gated for each sample: their kernels are mixed instead of their results (R13).

    y[n] = sum_b g[n, b] (W_b * x[n] + b_b) = (sum_b g[n, b] W'_b) * x[n] + sum_b g[n, b] b_b

with W'_b in one frame (see `frame`): everything static is fused before, the mixture remains, since
g depends on x. A branch without gate counts with g = 1. Gates are one number a sample (PD-B;
CondConv, arXiv 1904.04971), or one a sample and output channel (squeeze and excitation):

    W[n, o] = sum_b g[n, b, o] W'_b[o]

Exact. A gate that varies over space is no kernel, and its multiplication stays. Mixing costs B
products an element of the kernel, less than the convolutions it saves unless maps are tiny; scaling
the kernel of a single branch saves nothing, so it waits for `grow=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from branchgraph.ir.functions import mixed_conv, sample_conv
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import Multiply
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.ir.ops.reshape import Reshape, Slice
from branchgraph.passes.fuse_branches.concats import bias_of
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, name_for, part_name, too_dear
from branchgraph.passes.fuse_branches.frame import Frame, frame_of, regroups
from branchgraph.passes.fuse_branches.layer import Layer, call, reshaped, spent_by, total
from branchgraph.passes.fuse_branches.reading import World, views


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
    mixing = len(layers) * (prod(whole.shape) + (whole.filters if biased else 0))
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
        if inner.type != value.type or world.fixed(gate) or not _for_samples(gate, value):
            continue
        for layer in views(inner, node, world):
            if layer.map is None and layer.nodes:
                found.append(Gated(index, layer, gate, node))
    return found


def _for_samples(gate: Value, value: Value) -> bool:
    """Whether a gate is one number a sample, or one a sample and channel."""
    if len(gate.shape) != len(value.shape) or gate.shape[0] != value.shape[0]:
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
    x = terms[0].layer.x
    graph = x.graph
    rows = [_row(frame.weight(e.layer)) for e in terms]
    weights = graph.emit(Concat(axis=0), *rows)
    biases = None
    if any(e.layer.bias for e in terms):
        listed = [_row(bias_of(e.layer)) for e in terms]
        biases = call(graph.emit(Concat(axis=0), *listed), f"{name}.bias")
    mixture = _together([e.gate for e in terms]) or graph.emit(
        Concat(axis=1), *(_gate(e, (x.shape[0], 1)) for e in terms)
    )
    mixed = mixed_conv(
        x, weights, mixture, biases, stride=frame.stride, pad=(*frame.begin, *frame.end),
        dilation=frame.dilation, groups=frame.groups,
    )  # fmt: skip
    for flat in weights.users:
        call(flat.output, f"{name}.weight")
    return mixed


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


def _together(gates: Sequence[Value | None]) -> Value | None:
    """The matrix [N, B] that the gates are the columns of, if they were cut from one."""
    source: Value | None = None
    for k, gate in enumerate(gates):
        cut = gate.producer if gate is not None else None
        if cut is None or cut.op != Slice(axis=1, start=k, size=1):
            return None
        if source is not None and cut.inputs[0] is not source:
            return None
        source = cut.inputs[0]
    if source is None or source.shape[1] != len(gates):
        return None
    return reshaped(source, source.shape[:2])
