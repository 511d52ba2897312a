"""Parts of the channels of a layer are a smaller layer (the dual of R10).

    (W * x + b)[:, A] = W[A] * x + b[A]          A: channels that a slice or split takes

What nobody reads of a layer is no longer computed. A split all of whose parts are read stays, since
one wide layer is as good as several narrow ones; `fuse_siblings` makes such splits. In groups of F
filters every s-th channel, where s divides F, leaves the groups as they are; other parts are taken
out of the dense kernel (R4), if that does not cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Slice, Split
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, too_dear
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, emit_layer, once, regrouped
from branchgraph.passes.fuse_branches.reading import layer_of
from branchgraph.passes.fuse_branches.world import World


@dataclass(frozen=True, eq=False)
class Part:
    """Channels start, start + step, ... of a value, and the value that holds them."""

    value: Value
    start: int
    size: int
    step: int = 1


def parts(node: Node, world: World) -> Fusion | Refusal | None:
    """R10: what is read of the channels of a layer."""
    taken = [part for part in _parts(node, world) if part.size]
    feeder = node.inputs[0].producer if taken else None
    layer = layer_of(feeder, world) if feeder else None
    if feeder is None or layer is None or layer.nodes != (feeder,) or not layer.spent:
        return None
    if not world.private(feeder.output, node):
        cuts = all(_along_channels(user) for user in feeder.output.users)
        return None if cuts else Refusal("R10", f"{feeder.output.label} is read elsewhere too")
    small = _restricted(layer, taken)
    if not world.allows(small):
        return None
    if small.macs > small.spent and not world.grow:
        return Refusal("R10", too_dear(small.spent, small.macs))
    return Fusion(
        node, (node, feeder), small.rules, small.macs - small.spent,
        lambda: _split(emit_layer(small, feeder.name), taken), feeder.scope,
        replaced=tuple(part.value for part in taken),
    )  # fmt: skip


def _along_channels(node: Node) -> bool:
    return isinstance(node.op, (Slice, Split)) and node.op.axis == 1


def _parts(node: Node, world: World) -> list[Part]:
    """What is read of the channels of the operand of a slice or split, if that is not all."""
    if not _along_channels(node):
        return []
    op = node.op
    if isinstance(op, Slice):
        return [Part(node.output, op.start, op.size, op.step)]
    assert isinstance(op, Split)
    starts = [sum(op.sizes[:i]) for i in range(len(op.sizes))]
    roots = world.graph.roots
    cut = (Part(v, *at) for v, *at in zip(node.outputs, starts, op.sizes))
    read = [part for part in cut if part.value.users or part.value in roots]
    return read if len(read) < len(op.sizes) else []


def _restricted(layer: Layer, taken: Sequence[Part]) -> Layer:
    """The layer of the filters that are taken."""
    groups = layer.groups if _keeps_groups(layer, taken) else 1
    filters = sum(part.size for part in taken)
    bias = layer.bias
    return replace(
        layer,
        weight=_filters(lambda: regrouped(layer, groups), taken),
        shape=(filters, layer.channels // groups, *layer.kernel),
        groups=groups,
        bias=_filters(bias, taken) if bias else None,
        rules=layer.rules | {"R10"} | ({"R4"} if groups < layer.groups else set()),
        ones=False,
    )


def _keeps_groups(layer: Layer, taken: Sequence[Part]) -> bool:
    """Whether every group gives as many filters, in the order of the groups."""
    (first, *others) = taken
    width = layer.filters // layer.groups
    spread = first.start < first.step and first.size * first.step == layer.filters
    return layer.groups == 1 or (not others and spread and width % first.step == 0)


def _filters(make: Lazy, taken: Sequence[Part]) -> Lazy:
    """The rows of a weight or bias that are taken."""

    def rows() -> Value:
        whole = make()
        cuts = [
            whole.graph.emit(Slice(axis=0, start=p.start, size=p.size, step=p.step), whole)
            for p in taken
        ]
        return cuts[0] if len(cuts) == 1 else whole.graph.emit(Concat(axis=0), *cuts)

    return once(rows)


def _split(y: Value, taken: Sequence[Part]) -> tuple[Value, ...]:
    """The layer's value in the parts that are read."""
    if len(taken) == 1:
        return (y,)
    split = Split(axis=1, sizes=tuple(part.size for part in taken))
    return y.graph.apply(split, y)
