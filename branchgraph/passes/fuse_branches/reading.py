"""Values read as linear layers: what feeds them, through how many nodes, under which rule.

    R1   batch norm with fixed statistics     a = gamma / sqrt(var + eps), t = beta - mean a
    R13  scales, shifts, gates                a and t fixed, a number or one a channel; a may be
                                              written for each sample, if it is the same for all
         y[n, c, ...] = a[c] x[n, c, ...] + t[c]: a depthwise 1x1 kernel
    R5   x itself                             ones in a depthwise 1x1 kernel; x[::s] has stride s,
                                              zero padding is its padding
    R9   average pooling                      a depthwise kernel 1 / (k_1 k_2 ...), if all windows
                                              have that divisor; sum pooling: ones
    R15  a fixed filter                       a convolution whose kernel is a constant
         a shift of x                         zero padding and a part of it: one tap of 1

    R3   a sum of layers on one input         the sum of their kernels (see `frame`)

A value that others read too is read as itself only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

from branchgraph.ir.dims import DimLike
from branchgraph.ir.functions import broadcast_to
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.elementwise import Add, Divide, Multiply, Negate, Subtract
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Mean, Sum
from branchgraph.ir.ops.norm import BatchNormInference
from branchgraph.ir.ops.pool import AveragePool
from branchgraph.ir.ops.reshape import Pad, Slice
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.passes.fuse_branches.compose import composed
from branchgraph.passes.fuse_branches.frame import side_by_side
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, once, placed, reshaped
from branchgraph.passes.fuse_branches.world import World

#: How many nodes one after another are read as one layer.
_DEEPEST = 8


def identity(x: Value) -> Layer | None:
    """x as a layer of itself (R5)."""
    channels = x.shape[1] if len(x.shape) > 1 else None
    if not isinstance(channels, int) or not x.dtype.is_float or channels < 1:
        return None
    return diagonal(x, None, None, frozenset({"R5"}), ())


def diagonal(
    x: Value, scale: Lazy | None, shift: Lazy | None, rules: frozenset[str],
    nodes: tuple[Node, ...],
) -> Layer:  # fmt: skip
    """The layer y[n, c] = scale[c] x[n, c] + shift[c]."""
    channels, axes = x.shape[1], len(x.shape) - 2
    assert isinstance(channels, int)
    shape = (channels, 1, *(1,) * axes)
    weight = _ones(x, shape) if scale is None else once(lambda: reshaped(scale(), shape))
    none, ones = (0,) * axes, (1,) * axes
    return Layer(
        x, weight, shape, ones, none, none, ones, channels, x.shape[2:],
        bias=shift, nodes=nodes, rules=rules, ones=scale is None,
    )  # fmt: skip


def _ones(x: Value, shape: tuple[int, ...], value: float = 1.0) -> Lazy:
    return once(lambda: x.graph.emit(make("full", value=value, shape=shape, dtype=x.dtype)))


# -- nodes as layers -------------------------------------------------------------------------------


def layer_of(node: Node, world: World) -> Layer | None:
    """One node as a layer of its first value that is not fixed."""
    read = _READERS.get(type(node.op))
    return read(node, world) if read else None


def _conv(node: Node, world: World) -> Layer | None:
    op = node.op
    x, weight, *bias = node.inputs
    if world.fixed(x) or not all(world.fixed(v) for v in (weight, *bias)):
        return None
    assert isinstance(op, Conv)
    shape = _integers(weight.shape)
    if shape is None:
        return None
    return Layer(
        x, lambda: weight, shape, op.stride, op.begin, op.end, op.dilation, op.groups,
        node.output.shape[2:], bias=(lambda: bias[0]) if bias else None, nodes=(node,),
        rules=frozenset({"R15"} if world.constant(weight) else ()),
    )  # fmt: skip


def _unvaried(node: Node, world: World) -> Layer | None:
    """A kernel for each sample that is the same for all of them."""
    op = node.op
    x, *kernels = node.inputs
    rows = [world.row(v) for v in kernels]
    shape = _integers(kernels[0].shape[1:])
    if world.fixed(x) or shape is None or rows[0] is None or not all(rows):
        return None
    assert isinstance(op, SampleConv)
    weight, *bias = (_first(row, v.shape[1:]) for row, v in zip(rows, kernels) if row)
    return Layer(
        x, weight, shape, op.stride, op.begin, op.end, op.dilation, op.groups,
        node.output.shape[2:], bias=bias[0] if bias else None, nodes=(node,),
        rules=frozenset({"R13"}),
    )  # fmt: skip


def _first(row: Lazy, shape: tuple[DimLike, ...]) -> Lazy:
    return once(lambda: reshaped(row(), shape))


def _dense(node: Node, world: World) -> Layer | None:
    x, weight, *bias = node.inputs
    shape = _integers(weight.shape)
    if world.fixed(x) or not all(world.fixed(v) for v in (weight, *bias)) or shape is None:
        return None
    return Layer(
        x, lambda: weight, shape, (), (), (), (), 1, (),
        bias=(lambda: bias[0]) if bias else None, nodes=(node,),
    )  # fmt: skip


def _norm(node: Node, world: World) -> Layer | None:
    op, (x, gamma, beta, mean, var) = node.op, node.inputs
    if world.fixed(x) or not all(world.fixed(v) for v in (gamma, beta, mean, var)):
        return None
    assert isinstance(op, BatchNormInference)
    scale = once(lambda: gamma / x.graph.emit(make("sqrt"), var + op.eps))
    shift = once(lambda: beta - mean * scale())
    return diagonal(x, scale, shift, frozenset({"R1"}), (node,))


def _scaled(node: Node, world: World) -> Layer | None:
    """x * s, s * x, x / s, or x where s is open."""
    divided = isinstance(node.op, Divide)
    ordered = divided or isinstance(node.op, Select)
    for x, factor in [node.inputs] if ordered else [node.inputs, node.inputs[::-1]]:
        if world.fixed(x) or x.type != node.output.type or identity(x) is None:
            continue
        vector = _factor(factor, x, world)
        if vector is not None:
            scale = _inverse(vector) if divided else vector
            return diagonal(x, scale, None, frozenset({"R13"}), (node,))
    return None


def _inverse(vector: Lazy) -> Lazy:
    return once(lambda: 1.0 / vector())


def _factor(value: Value, like: Value, world: World) -> Lazy | None:
    """What `like` is multiplied by as one number a channel, if it is that for all samples."""
    if world.fixed(value) and (len(value.shape) < len(like.shape) or value.shape[0] == 1):
        return channelwise(value, like)
    row = world.row(value) if len(value.shape) == len(like.shape) else None
    if row is None:
        return None
    return channelwise(value, like, row)


def _negated(node: Node, world: World) -> Layer | None:
    x = node.inputs[0]
    if world.fixed(x) or identity(x) is None:
        return None
    return scaled(diagonal(x, None, None, frozenset({"R13"}), (node,)), -1.0)


def scaled(layer: Layer, factor: float) -> Layer:
    """The layer times a number."""
    if factor == 1.0:
        return layer

    def times(make: Lazy) -> Lazy:
        return once(lambda: make() * factor)

    return replace(
        layer,
        weight=times(layer.weight),
        bias=times(layer.bias) if layer.bias else None,
        map=times(layer.map) if layer.map else None,
        rules=layer.rules | {"R13"},
        ones=False,
    )


def _shifted(node: Node, world: World) -> Layer | None:
    """x + t, t + x or x - t."""
    x, summand = node.inputs
    minus = isinstance(node.op, Subtract)
    if world.fixed(x) and not minus:
        x, summand = summand, x
    if world.fixed(x) or not world.fixed(summand) or x.type != node.output.type:
        return None
    if identity(x) is None:
        return None
    signed = once(lambda: -summand) if minus else (lambda: summand)
    vector = channelwise(summand, x)
    layer = diagonal(x, None, None, frozenset({"R13"}), (node,))
    if vector is not None:
        channels = (x.shape[1],)
        return replace(layer, bias=once(lambda: broadcast_to(_flat(signed(), x), channels)))
    shape = (1, *x.shape[1:])
    rows = len(summand.shape) == len(x.shape) and summand.shape[0] != 1
    if rows or _integers(shape) is None:
        return None
    return replace(layer, map=once(lambda: broadcast_to(signed(), shape)))


def channelwise(value: Value, like: Value, row: Lazy | None = None) -> Lazy | None:
    """A fixed operand of `like` as one number a channel, if it is that or a single number.

    `row` is what all rows of `value` equal, where it has several.
    """
    rank, channels = len(like.shape), like.shape[1] if len(like.shape) > 1 else None
    own = value.shape if row is None else (1, *value.shape[1:])
    shape = (*(1,) * (rank - len(own)), *own)
    if not isinstance(channels, int) or len(shape) != rank or not like.dtype.is_float:
        return None
    if any(d != 1 for a, d in enumerate(shape) if a != 1) or shape[1] not in (1, channels):
        return None
    make = row or (lambda: value)
    return once(lambda: broadcast_to(_flat(make(), like), (channels,)))


def _flat(value: Value, like: Value) -> Value:
    """A number, or one a channel, as a vector."""
    return reshaped(value, (like.shape[1] if value.type.size == like.shape[1] else 1,))


def _average(node: Node, world: World) -> Layer | None:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, AveragePool)
    if world.fixed(x) or uneven(node) or identity(x) is None:
        return None
    shape = (_channels(x), 1, *op.kernel)
    axes = len(op.kernel)
    slack = tuple(s - 1 if op.cover_all else 0 for s in op.stride)
    end = tuple(p + more for p, more in zip(op.pad[axes:], slack))
    value = 1.0 if op.divisor == "one" else 1.0 / prod(op.kernel)
    return Layer(
        x, _ones(x, shape, value), shape, op.stride, op.pad[:axes], end, (1,) * axes, shape[0],
        node.output.shape[2:], nodes=(node,), rules=frozenset({"R9"}),
    )  # fmt: skip


def uneven(node: Node) -> str:
    """Why the windows of an average pooling do not all have one divisor, or nothing."""
    op, x = node.op, node.inputs[0]
    assert isinstance(op, AveragePool)
    if op.divisor in ("kernel", "one"):
        return ""
    if op.divisor == "inside" and any(op.pad):
        return "the divisor leaves the padding out, so it depends on the position"
    overhangs = op.cover_all and any(s > 1 for s in op.stride)
    if overhangs and replace(op, cover_all=False).infer(x.type) != (node.output.type,):
        return "windows overhang the end and the divisor leaves that out"
    return ""


def _padded(node: Node, world: World) -> Layer | None:
    """Zero padding of the spatial axes: the padding of a 1x1 kernel of ones."""
    op, x = node.op, node.inputs[0]
    assert isinstance(op, Pad)
    spatial = not any((*op.begin[:2], *op.end[:2]))
    if world.fixed(x) or op.value != 0 or not spatial or len(x.shape) < 3 or identity(x) is None:
        return None
    layer = diagonal(x, None, None, frozenset({"R5"}), (node,))
    return replace(layer, begin=op.begin[2:], end=op.end[2:], size=node.output.shape[2:])


def _cut(node: Node, world: World) -> Layer | None:
    """Every s-th position of a spatial axis, or a part of it: one tap of 1, with stride s.

    A part is a kernel without padding that is as long as what is cut off, and one; a shift of x is
    zero padding and such a part of it.
    """
    op, x = node.op, node.inputs[0]
    assert isinstance(op, Slice)
    size = x.shape[op.axis] if op.axis < len(x.shape) else None
    if not isinstance(size, int) or world.fixed(x) or op.axis < 2 or identity(x) is None:
        return None
    whole = op.start == 0 and op.size == (size - 1) // op.step + 1
    if not whole and (op.step > 1 or op.size < 1):
        return None
    layer = diagonal(x, None, None, frozenset({"R5" if whole else "R15"}), (node,))
    stride = tuple(op.step if a + 2 == op.axis else 1 for a in range(layer.axes))
    layer = replace(layer, stride=stride, size=node.output.shape[2:])
    return layer if whole else _with_tap(layer, op.axis - 2, op.start, size - op.size + 1)


def _with_tap(layer: Layer, axis: int, tap: int, taps: int) -> Layer:
    """A layer of one tap as one of several along an axis, the others 0."""
    kernel = tuple(taps if a == axis else k for a, k in enumerate(layer.kernel))
    starts = tuple(tap if a == axis else 0 for a in range(layer.axes))
    weight = layer.weight
    return replace(
        layer, shape=(*layer.shape[:2], *kernel), tap=starts,
        weight=once(lambda: placed(weight(), starts, (1,) * layer.axes, kernel)),
    )  # fmt: skip


def _channels(x: Value) -> int:
    channels = x.shape[1]
    assert isinstance(channels, int)
    return channels


def _integers(shape: tuple[DimLike, ...]) -> tuple[int, ...] | None:
    known = tuple(d for d in shape if isinstance(d, int))
    return known if len(known) == len(shape) else None


_Reader = Callable[[Node, World], Layer | None]
_READERS: dict[type, _Reader] = {
    Conv: _conv,
    SampleConv: _unvaried,
    Dense: _dense,
    BatchNormInference: _norm,
    Multiply: _scaled,
    Divide: _scaled,
    Select: _scaled,
    Negate: _negated,
    Add: _shifted,
    Subtract: _shifted,
    AveragePool: _average,
    Pad: _padded,
    Slice: _cut,
}


# -- values as layers ------------------------------------------------------------------------------


def views(value: Value, reader: Node, world: World, depth: int = 0) -> Iterator[Layer]:
    """The value as a layer of itself, of what feeds it, of what feeds that, and so on."""
    itself = identity(value)
    if itself is None:
        return
    if world.allows(itself):
        yield itself
    node = value.producer
    if node is None or depth == _DEEPEST or not world.private(value, reader):
        return
    if factors(node) is not None:
        yield from _sum_views(node, world, depth)
        return
    top = layer_of(node, world)
    if top is None or not world.allows(top):
        return
    yield top
    for inner in views(top.x, node, world, depth + 1):
        if inner.nodes:
            both = composed(top, inner, bias_maps=world.bias_maps)
            if isinstance(both, Layer) and world.allows(both):
                yield both


# -- sums ------------------------------------------------------------------------------------------

#: Operands of a sum, by position, as layers of one input and stride.
Group = list[tuple[int, Layer]]


def factors(node: Node) -> list[float] | None:
    """What the operands of a sum are multiplied by; None for everything else."""
    count = len(node.inputs)
    known = {
        Sum: [1.0] * count,
        Mean: [1.0 / max(count, 1)] * count,
        Add: [1.0, 1.0],
        Subtract: [1.0, -1.0],
    }
    found = known.get(type(node.op))
    if found is None or count < 2 or not node.output.dtype.is_float:
        return None
    return found if all(v.type == node.output.type for v in node.inputs) else None


def common(node: Node, world: World, depth: int = 0) -> list[Group]:
    """For every input and stride that operands of a sum have in common: these, as its layers."""
    weights = factors(node) or []
    found: dict[tuple[Value, tuple[int, ...]], dict[int, Layer]] = {}
    for i, (value, weight) in enumerate(zip(node.inputs, weights)):
        for view in views(value, node, world, depth):
            by = found.setdefault((view.x, view.stride), {})
            by.setdefault(i, scaled(view, weight))
    return [list(by.items()) for by in found.values() if len(by) > 1]


def _sum_views(node: Node, world: World, depth: int) -> Iterator[Layer]:
    """A sum as one layer of each input that all its operands have in common."""
    for group in common(node, world, depth + 1):
        if len(group) == len(node.inputs):
            whole = side_by_side([layer for _, layer in group])
            whole = replace(whole, nodes=(node, *whole.nodes))
            if world.allows(whole):
                yield whole
