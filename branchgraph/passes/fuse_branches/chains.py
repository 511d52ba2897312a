"""Chains: one layer after another becomes one layer (the algebra is in `compose`).

    R1   batch norm after a layer        R13  a scale or shift after a layer
    R2   a scale or shift before it      R6, R7, R8  convolutions, R9 poolings, R14 dense layers
    R14  convolution, flatten, dense: the dense layer is a convolution as large as its input

A chain is left alone where others read what is between, where padding makes it inexact (see
`compose`), and where one kernel would cost more than two, or as much for more weights.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from branchgraph.ir.builder import flatten
from branchgraph.ir.functions import broadcast_to
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.norm import BatchNorm, BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.pool import AveragePool
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.ops.reshape import Pad, Reshape, Slice
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.passes.fuse_branches.compose import composed
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, fused_into, too_dear
from branchgraph.passes.fuse_branches.layer import Layer, emit_layer, held_by, once, reshaped
from branchgraph.passes.fuse_branches.reading import layer_of, uneven
from branchgraph.passes.fuse_branches.world import World


def norms(node: Node, world: World) -> Fusion | Refusal | None:
    """R1: batch norm after a layer."""
    if isinstance(node.op, (BatchNorm, BatchNormTraining)):
        return Refusal("R1", "its statistics are not fixed; specialise(training=False)")
    if not isinstance(node.op, BatchNormInference):
        return None
    found = chains(node, world)
    if found is None and layer_of(node, world) is not None:
        feeder = node.inputs[0].producer
        if feeder is not None and isinstance(feeder.op, (Conv, Dense, SampleConv)):
            return None
        what = feeder.op.opcode if feeder else "an input"
        return Refusal("R1", f"no convolution or dense layer feeds it, but {what}")
    return found


def chains(node: Node, world: World) -> Fusion | Refusal | None:
    """One layer after another."""
    second = layer_of(node, world)
    if second is None or not world.allows(second):
        return None
    feeder = second.x.producer
    first = layer_of(feeder, world) if feeder else None
    if feeder is None or first is None or not world.allows(first):
        return _unread(node, feeder)
    if not second.spent and not first.spent:
        return None
    rule = _title(second, first)
    if second.map is not None or first.map is not None:
        return None
    both = composed(second, first, bias_maps=world.bias_maps)
    if isinstance(both, Layer) and not world.allows(both):
        return None
    if not world.private(second.x, node):
        return Refusal(rule, f"{second.x.label} is read elsewhere too")
    if isinstance(both, str):
        # A padded or sampled value that is no convolution's business is not worth a word.
        return None if isinstance(node.op, (Pad, Slice)) else Refusal(rule, both)
    dear = _too_dear(both)
    if dear and any(isinstance(n.op, Slice) for n in (node, feeder)):
        # A part of a map is a kernel of many zeros; it is read for the sake of sums.
        return None
    if dear and not world.grow:
        return Refusal(rule, dear)
    kept = node if second.spent else feeder
    return fused_into(both, node, both.nodes, kept.name, kept.scope)


def _too_dear(layer: Layer) -> str:
    """Why a chain is better than one layer, or nothing."""
    if layer.macs > layer.spent:
        return too_dear(layer.spent, layer.macs)
    held, needed = held_by([layer]), prod(layer.shape)
    if layer.macs == layer.spent and needed > held:
        return (
            f"it would save no MACs and raise weights from {held:,} to {needed:,}; "
            "grow=true asks for it all the same"
        )
    return ""


def _title(second: Layer, first: Layer) -> str:
    """The rule of a chain, for reasons."""
    if second.adjusts:
        return "R1" if "R1" in second.rules else "R13"
    if first.adjusts:
        return "R2"
    if "R9" in first.rules | second.rules:
        return "R9"
    if not second.axes:
        return "R14"
    if first.pointwise:
        return "R6"
    return "R7" if second.pointwise else "R8"


def _unread(node: Node, feeder: Node | None) -> Refusal | None:
    """Average pooling that feeds a layer and is no convolution."""
    if feeder is not None and isinstance(feeder.op, AveragePool) and uneven(feeder):
        return Refusal("R9", f"{feeder.path or feeder.op.opcode}: {uneven(feeder)}")
    return None


# -- heads -----------------------------------------------------------------------------------------


def heads(node: Node, world: World) -> Fusion | Refusal | None:
    """R14 and R9: a dense layer after flattening or global average pooling, with what is before."""
    dense = layer_of(node, world) if isinstance(node.op, Dense) else None
    joint = dense.x.producer if dense else None
    if dense is None or joint is None or not world.private(dense.x, node):
        return None
    second = _as_convolution(dense, joint, world)
    if second is None or not world.allows(second):
        return None
    feeder = second.x.producer
    first = layer_of(feeder, world) if feeder else None
    whole = second
    if first is not None and world.private(second.x, joint):
        both = composed(second, first, bias_maps=False)
        whole = both.named("R14") if isinstance(both, Layer) else second
    if (whole is second and "R9" not in second.rules) or not world.allows(whole):
        return None
    if whole.macs >= whole.spent and not world.grow:
        # A classifier on pooled features is how it should be.
        dear = first is not None and first.spent
        return Refusal("R14", too_dear(whole.spent, whole.macs)) if dear else None
    return Fusion(
        node, whole.nodes, whole.rules, whole.macs - whole.spent,
        lambda: flatten(emit_layer(whole, node.name)), node.scope,
    )  # fmt: skip


def _as_convolution(dense: Layer, joint: Node, world: World) -> Layer | None:
    """The dense layer as a convolution as large as the map that `joint` makes a vector of."""
    v = joint.inputs[0] if joint.inputs else None
    if v is None or len(v.shape) < 3 or world.fixed(v):
        return None
    _, channels, *rest = v.shape
    size = tuple(d for d in rest if isinstance(d, int))
    if not isinstance(channels, int) or len(size) < len(rest):
        return None
    axes = len(size)
    none, ones = (0,) * axes, (1,) * axes
    shape = (dense.filters, channels, *size)
    pooled = isinstance(joint.op, ReduceMean) and joint.op.axes == tuple(range(2, 2 + axes))
    if pooled and not joint.op.attributes()["keepdims"]:
        weight = once(lambda: _pooled(dense.weight(), shape))
        rules = frozenset({"R9"})
    elif isinstance(joint.op, Reshape) and dense.x.shape[0] == v.shape[0]:
        weight = once(lambda: reshaped(dense.weight(), shape))
        rules = frozenset({"R14"})
    else:
        return None
    return replace(
        dense, x=v, weight=weight, shape=shape, stride=ones, begin=none, end=none, dilation=ones,
        size=ones, nodes=(*dense.nodes, joint), rules=rules,
    )  # fmt: skip


def _pooled(weight: Value, shape: tuple[int, ...]) -> Value:
    """A weight for means as one for all positions: each has its share."""
    shares = reshaped(weight / float(prod(shape[2:])), (*shape[:2], *(1,) * (len(shape) - 2)))
    return broadcast_to(shares, shape)
