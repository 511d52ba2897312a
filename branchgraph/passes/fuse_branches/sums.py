"""Sums of layers on one input are one layer (R3), with R4, R5, R9 and R12 where they are needed.

    sum_b (W_b * x + b_b) = (sum_b W'_b) * x + sum_b b_b          W'_b in one frame (see `frame`)

`sum`, `mean`, `add` and `subtract` are such sums. Operands are read as deep as leads to a common
input: DBB's 1x1, average, batch norm beside a convolution of the same x is one of its branches. If
only some operands have an input in common, these are fused and the others stay. Where the fused
kernel costs more than its parts, as many as pay are fused, the largest first.

R11: convolutions on different inputs are one convolution on their concatenation,

    sum_b W_b * x_b = [W'_1 | ... | W'_B] * concat(x_1, ..., x_B)

Exact for equal strides and sizes. It puts a concatenation in, so it waits for `concats=true`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.elementwise import Add
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, name_for, part_name, too_dear
from branchgraph.passes.fuse_branches.frame import frame_of, regroups, side_by_side, summed
from branchgraph.passes.fuse_branches.layer import Layer, emit_layer, once, spent_by
from branchgraph.passes.fuse_branches.reading import Group, common, factors, layer_of, views
from branchgraph.passes.fuse_branches.world import World

#: How far below a sum reasons are looked for.
_FAR = 4


def sums(node: Node, world: World) -> Fusion | Refusal | None:
    """R3: a sum of layers on one input."""
    if len(node.outputs) != 1 or factors(node) is None:
        return None
    every = len(node.inputs)
    partly = isinstance(node.op, Sum)
    groups = [
        g
        for g in common(node, world)
        if any(layer.spent for _, layer in g) and (partly or len(g) == every)
    ]
    fusable = [g for g in (_affordable(g, world) for g in groups) if len(g) > 1]
    fusable = [g for g in fusable if partly or len(g) == every]
    if not fusable:
        return _refused(node, groups, world)
    best = max(fusable, key=lambda g: (len(g), spent_by(layer for _, layer in g)))
    return _fusion(node, best, side_by_side([layer for _, layer in best]))


def _affordable(group: Group, world: World) -> Group:
    """As many layers, the largest first, as cost together no more than one by one."""

    def pays(part: Group) -> bool:
        layers = [layer for _, layer in part]
        fused = side_by_side(layers)
        return (world.grow or fused.macs <= fused.spent) and world.allows(fused)

    if pays(group):
        return group
    chosen: Group = []
    for entry in sorted(group, key=lambda e: -e[1].macs):
        if not chosen or pays([*chosen, entry]):
            chosen.append(entry)
    return sorted(chosen, key=lambda e: e[0])


def _fusion(node: Node, group: Group, layer: Layer) -> Fusion:
    """`layer` in place of the terms of `group`, in a sum with the others if there are any."""
    name, where = name_for(node, [layer])
    taken = {i for i, _ in group}
    whole = len(taken) == len(node.inputs)

    def build() -> Value:
        if whole:
            return emit_layer(layer, name)
        first = min(taken)
        fused = emit_layer(layer, part_name(node, name))
        rest = [
            fused if i == first else v
            for i, v in enumerate(node.inputs)
            if i not in taken or i == first
        ]
        return node.graph.emit(Sum(), *rest, name=node.name)

    inside = (node, *layer.nodes)
    return Fusion(
        node, inside, layer.rules, layer.macs - layer.spent, build, where, layer.for_size
    )  # fmt: skip


# -- reasons ---------------------------------------------------------------------------------------


def _refused(node: Node, groups: list[Group], world: World) -> Refusal | None:
    """Why nothing of a sum was fused, if it has a layer at all."""
    if groups:
        fused = side_by_side([layer for _, layer in max(groups, key=len)])
        return Refusal("R3", too_dear(fused.spent, fused.macs)) if world.allows(fused) else None
    shared = _read_elsewhere(node, world)
    if shared:
        return Refusal("R3", f"{shared} is read elsewhere too")
    stopped = _nonlinear(node, world)
    if stopped:
        return Refusal("R3", f"{stopped} stands between the layers and their sum; it is not linear")
    terms = [list(views(value, node, world)) for value in node.inputs]
    if sum(any(v.spent for v in term) for term in terms) < 2:
        return None
    read = [v for term in terms for v in term]
    if len({v.x for v in read}) < len({(v.x, v.stride) for v in read}):
        return Refusal("R3", "the layers have different strides")
    return Refusal("R3", "the operands are no layers of one value")


def _read_elsewhere(node: Node, world: World) -> str:
    """An operand that is a layer of the input of another one, but is read elsewhere too."""
    counts: dict[Value, int] = {}
    shared: dict[Value, str] = {}
    for value in dict.fromkeys(node.inputs):
        layer = layer_of(value.producer, world) if value.producer else None
        if layer is None:
            continue
        counts[layer.x] = counts.get(layer.x, 0) + 1
        if not world.private(value, node):
            shared[layer.x] = value.label
    return next((label for x, label in shared.items() if counts[x] > 1), "")


def _nonlinear(node: Node, world: World) -> str:
    """What keeps an operand from being a layer of an input that another operand is a layer of."""
    ends = [_end(value, node, world) for value in node.inputs]
    layered = {x for _, x, costs in ends if costs}
    counts = Counter(x for _, x, _ in ends)
    return next((why for why, x, _ in ends if why and x in layered and counts[x] > 1), "")


def _end(value: Value, reader: Node, world: World) -> tuple[str, Value, bool]:
    """Going down from an operand: what is not linear on the way, the input, if a layer reads it."""
    stops = ""
    for _ in range(_FAR):
        node = value.producer
        layer = layer_of(node, world) if node else None
        if layer is not None:
            return stops, layer.x, bool(layer.spent)
        if node is None or not node.inputs or factors(node) or not world.private(value, reader):
            break
        stops = stops or node.path or node.op.opcode
        value, reader = node.inputs[0], node
    return stops, value, False


# -- different inputs ------------------------------------------------------------------------------


def joins(node: Node, world: World, concats: bool) -> Fusion | Refusal | None:
    """R11: a sum of layers on different inputs, as one layer of the concatenated inputs."""
    if not isinstance(node.op, (Sum, Add)) or factors(node) is None:
        return None
    found: Group = []
    for i, value in enumerate(node.inputs):
        deep = [v for v in views(value, node, world) if v.spent]
        if deep and deep[0].map is None:
            found.append((i, deep[0]))
    group = _alike(found)
    if len(group) < 2 or len({v.x for _, v in group}) < 2:
        return None
    layer = _joined([v for _, v in group])
    if not world.allows(layer):
        return None
    if not concats:
        return Refusal("R11", "it puts a concatenation of the inputs in; concats=true asks for it")
    if layer.macs > layer.spent and not world.grow:
        return Refusal("R11", too_dear(layer.spent, layer.macs))
    return replace(_fusion(node, group, layer), build=partial(_build_join, node, group, layer))


def _alike(found: Group) -> Group:
    """The largest number of layers that agree in stride, batch and size of input."""
    by: dict[tuple[object, ...], Group] = {}
    for entry in found:
        x = entry[1].x
        by.setdefault((entry[1].stride, x.shape[0], x.shape[2:], x.dtype), []).append(entry)
    return max(by.values(), key=len, default=[])


def _joined(layers: Sequence[Layer]) -> Layer:
    """Kernels side by side along the input channels."""
    frame = frame_of(layers, groups=1)
    wide = sum(layer.channels for layer in layers)
    return replace(
        frame.around(layers[0], layers[0].filters, wide),
        weight=once(lambda: _beside([frame.weight(layer) for layer in layers])),
        rules=frozenset({"R11"}).union(*(v.rules for v in layers), regroups(layers, frame)),
        **summed(layers),
    )


def _beside(weights: Sequence[Value]) -> Value:
    return weights[0].graph.emit(Concat(axis=1), *weights)


def _build_join(node: Node, group: Group, layer: Layer) -> tuple[Value, ...]:
    inputs = [v.x for _, v in group]
    x = inputs[0].graph.emit(Concat(axis=1), *inputs)
    return _fusion(node, group, replace(layer, x=x)).made()
