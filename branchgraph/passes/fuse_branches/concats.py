"""Concatenated results of layers on one input are one layer (R10).

    concat_b (W_b * x + b_b) = [W'_1; ...; W'_B] * x + [b_1; ...; b_B]

along the output channels, kernels brought to one frame and out of their groups. Neighbours in the
concatenation that have an input and a stride in common are fused; the others stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.merge import Concat
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, name_for, part_name, too_dear
from branchgraph.passes.fuse_branches.frame import frame_of, regroups
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, emit_layer, once
from branchgraph.passes.fuse_branches.reading import views
from branchgraph.passes.fuse_branches.world import World


def concats(node: Node, world: World) -> Fusion | Refusal | None:
    """R10: neighbouring layers on one input."""
    if not isinstance(node.op, Concat) or node.op.axis != 1 or not node.output.dtype.is_float:
        return None
    layers = [_shallow(value, node, world) for value in node.inputs]
    dear: Refusal | None = None
    for start, stop in _runs(layers):
        run = [layer for layer in layers[start:stop] if layer is not None]
        fused = _stacked(run)
        if not world.allows(fused):
            continue
        if fused.macs > fused.spent and not world.grow:
            dear = Refusal("R10", too_dear(fused.spent, fused.macs))
            continue
        return _fusion(node, fused, start, stop)
    return dear


def _shallow(value: Value, node: Node, world: World) -> Layer | None:
    """The nearest layer behind a value that costs anything."""
    found = (v for v in views(value, node, world) if v.spent and v.map is None)
    return next(found, None)


def _runs(layers: Sequence[Layer | None]) -> list[tuple[int, int]]:
    """Where neighbours have an input and a stride in common."""
    runs = []
    start = 0
    for i in range(1, len(layers) + 1):
        if i < len(layers) and _alike(layers[start], layers[i]):
            continue
        if i - start > 1:
            runs.append((start, i))
        start = i
    return runs


def _alike(a: Layer | None, b: Layer | None) -> bool:
    return a is not None and b is not None and a.x is b.x and a.stride == b.stride


def _stacked(layers: Sequence[Layer]) -> Layer:
    """Kernels one after another along the output channels."""
    frame = frame_of(layers, groups=1)
    first = layers[0]
    return replace(
        frame.around(first, sum(layer.filters for layer in layers), first.channels),
        weight=once(lambda: _ended([frame.weight(layer) for layer in layers])),
        bias=_biases(layers),
        nodes=tuple(dict.fromkeys(n for layer in layers for n in layer.nodes)),
        rules=frozenset({"R10"}).union(*(v.rules for v in layers), regroups(layers, frame)),
        for_size=any(layer.for_size for layer in layers),
    )


def _biases(layers: Sequence[Layer]) -> Lazy | None:
    """Biases one after another, zeros where a layer has none."""
    if not any(layer.bias for layer in layers):
        return None
    return once(lambda: _ended([bias_of(layer) for layer in layers]))


def bias_of(layer: Layer) -> Value:
    """The bias of a layer, zeros if it has none."""
    if layer.bias is not None:
        return layer.bias()
    zeros = make("full", value=0.0, shape=(layer.filters,), dtype=layer.x.dtype)
    return layer.x.graph.emit(zeros)


def _ended(values: Sequence[Value]) -> Value:
    return values[0].graph.emit(Concat(axis=0), *values)


def _fusion(node: Node, layer: Layer, start: int, stop: int) -> Fusion:
    name, where = name_for(node, [layer])
    rest = (*node.inputs[:start], *node.inputs[stop:])

    def build() -> Value:
        if not rest:
            return emit_layer(layer, name)
        fused = emit_layer(layer, part_name(node, name))
        operands = (*node.inputs[:start], fused, *node.inputs[stop:])
        return node.graph.emit(Concat(axis=1), *operands, name=node.name)

    return Fusion(
        node, (node, *layer.nodes), layer.rules, layer.macs - layer.spent, build, where,
        layer.for_size,
    )  # fmt: skip
