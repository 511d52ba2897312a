"""Layers with a kernel for each sample, as `mixtures` leaves them and `mixed_conv` makes them.

A batch norm or scale behind one is folded into the kernels that it mixes, and into its bias
(R1 and R13, the static part of ParaDise 3.3):

    a[o] (W[n, o] * x[n] + B[n, o]) + t[o] = (a[o] W[n, o]) * x[n] + (a[o] B[n, o] + t[o])
    W[n] = sum_b g[n, b] K_b   ->   a W[n] = sum_b g[n, b] (a K_b)

a reaches the fixed K_b through reshapes, sums, and products with gates; nothing is left to do for
each sample. Where the gates are the same for all samples, so are the kernels, and the layer is a
convolution (`reading`): `settled` writes it as one.
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.ir.functions import broadcast_to
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.elementwise import Add, Multiply
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, fused_into
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, call, once, reshaped
from branchgraph.passes.fuse_branches.reading import layer_of
from branchgraph.passes.fuse_branches.world import World

#: Emits a value; asked for once it is known that all of it can be made.
_Made = Callable[[], Value]


def settled(node: Node, world: World) -> Fusion | None:
    """R13: one kernel for all samples."""
    layer = layer_of(node, world) if isinstance(node.op, SampleConv) else None
    if layer is None or not world.allows(layer):
        return None
    return fused_into(layer, node, layer.nodes, node.name, node.scope)


def adjusted(node: Node, world: World) -> Fusion | Refusal | None:
    """R1 and R13: a batch norm, scale or shift behind a kernel for each sample."""
    layer = layer_of(node, world)
    feeder = layer.x.producer if layer and layer.adjusts and layer.map is None else None
    if layer is None or feeder is None or not isinstance(feeder.op, SampleConv):
        return None
    rules = layer.rules | {"R13"}
    if not rules <= world.enabled:
        return None
    title = "R1" if "R1" in rules else "R13"
    if not world.private(layer.x, node):
        return Refusal(title, f"{layer.x.label} is read elsewhere too")
    kernels = [_adjusted(v, layer, feeder, world) for v in feeder.inputs[1:]]
    made = [kernel for kernel in kernels if kernel]
    if len(made) < len(kernels):
        return Refusal(title, f"the kernels of {layer.x.label} are no mixtures of fixed ones")
    return Fusion(
        node, (node, feeder), rules, 0, lambda: _emit(feeder, layer, *made), feeder.scope
    )  # fmt: skip


def _adjusted(value: Value, layer: Layer, reader: Node, world: World) -> _Made | None:
    """Kernels [N, O, ...] or biases [N, O] times the scale of `layer`."""
    if layer.ones:
        return lambda: value
    axes = len(value.shape) - 2
    return _scaled(value, once(lambda: _row(layer.weight(), axes)), reader, world)


def _row(vector: Value, axes: int) -> Value:
    """Numbers, one a filter, as [1, O, 1, ...]."""
    return reshaped(vector, (1, vector.shape[0], *(1,) * axes))


def _emit(feeder: Node, layer: Layer, kernels: _Made, biases: _Made | None = None) -> Value:
    x, weights = feeder.inputs[:2]
    bias = biases() if biases else None
    if layer.bias is not None:
        shift = _row(layer.bias(), 0)
        bias = broadcast_to(shift, weights.shape[:2]) if bias is None else bias + shift
    name = feeder.name or x.graph.unused_name("fused")
    operands = [x, kernels(), *([] if bias is None else [call(bias, f"{name}.bias")])]
    return x.graph.emit(feeder.op, *operands, name=name)


def _scaled(value: Value, factor: Lazy, reader: Node, world: World) -> _Made | None:
    """`value` times a factor [1, ...], multiplied into what is fixed of it, if that is possible.

    `reader` is the only one who reads the value, so that nothing is computed twice.
    """
    if world.fixed(value):
        return once(lambda: value * factor())
    node = value.producer
    if node is None or not world.private(value, reader):
        return None
    if isinstance(node.op, Reshape):
        return _through_reshape(node, factor, world)
    if isinstance(node.op, MatMul):
        return _through_product(node, factor, world)
    if isinstance(node.op, (Sum, Add)) and _one_rank(node):
        terms = [_scaled(v, factor, node, world) for v in node.inputs]
        made = [term for term in terms if term]
        return once(lambda: _again(node, *(m() for m in made))) if len(made) == len(terms) else None
    if isinstance(node.op, Multiply) and _one_rank(node):
        gate, kernel = sorted(node.inputs, key=world.fixed)
        inner = _scaled(kernel, factor, node, world)
        return once(lambda: _again(node, inner(), gate)) if inner else None
    return None


def _through_reshape(node: Node, factor: Lazy, world: World) -> _Made | None:
    """Samples stay apart; the factor takes the shape of what is reshaped."""
    (x,) = node.inputs
    if x.shape[:1] != node.output.shape[:1]:
        return None
    outer, before = (1, *node.output.shape[1:]), (1, *x.shape[1:])
    inner = _scaled(x, once(lambda: reshaped(broadcast_to(factor(), outer), before)), node, world)
    return once(lambda: reshaped(inner(), node.output.shape)) if inner else None


def _through_product(node: Node, factor: Lazy, world: World) -> _Made | None:
    """A mixture [N, B] of fixed rows [B, E]."""
    gates, rows = node.inputs
    assert isinstance(node.op, MatMul)
    if not world.fixed(rows) or node.op.transpose_b or len(rows.shape) != 2:
        return None
    return once(lambda: node.graph.emit(node.op, gates, rows * factor()))


def _one_rank(node: Node) -> bool:
    return len({len(v.shape) for v in node.inputs}) == 1


def _again(node: Node, *inputs: Value) -> Value:
    return node.graph.emit(node.op, *inputs, name=node.name)
