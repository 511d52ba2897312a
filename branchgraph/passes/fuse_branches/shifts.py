"""A batch norm before a padded convolution, exact for every size (R2 with a padding by channel).

    W * pad_0(a x + t) = (W a) * pad_0(x - v),    v = -t / a[c]

since zeros around a x + t are what v around x becomes, and x padded with v is x - v padded with
zeros, shifted back. The scale goes into the kernel and one addition is left, where a backend that
pads with a value for each channel would have none. It takes a[c] != 0: at a[c] = 0 channel c is
t[c] inside and 0 around, and no padding of x gives that; a bias map does (`bias_maps`, for a known
size). So it has to be asked for, and the scales are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.norm import BatchNormInference
from branchgraph.passes.fuse_branches.compose import composed
from branchgraph.passes.fuse_branches.found import Fusion, Refusal
from branchgraph.passes.fuse_branches.layer import Layer, emit_layer, reshaped
from branchgraph.passes.fuse_branches.reading import layer_of
from branchgraph.passes.fuse_branches.world import World


def shifts(node: Node, world: World) -> Fusion | Refusal | None:
    """R2: batch norm before a padded convolution."""
    if not world.pad_values or not isinstance(node.op, Conv) or not any(node.op.pad):
        return None
    second, feeder = layer_of(node, world), node.inputs[0].producer
    if second is None or feeder is None or not isinstance(feeder.op, BatchNormInference):
        return None
    first = layer_of(feeder, world)
    if first is None or first.bias is None:
        return None
    scaled = composed(second, replace(first, bias=None), bias_maps=False)
    if not isinstance(scaled, Layer) or not world.allows(scaled):
        return None
    reason = _reason(node, feeder, world)
    if reason:
        return Refusal("R2", reason)
    return Fusion(
        node, scaled.nodes, scaled.rules, 0, _build(scaled, first, node.name), node.scope
    )  # fmt: skip


def _reason(node: Node, norm: Node, world: World) -> str:
    """Why the shift cannot be moved to x, or nothing."""
    if not world.private(norm.output, node):
        return f"{norm.output.label} is read elsewhere too"
    if world.values is None:
        return (
            "pad_values=true divides by scales, none of which may be 0: give the values of the "
            "states, by a .bg file or run(graph, values=store)"
        )
    if world.has_zero(norm.inputs[1]):
        return (
            f"a scale of {norm.output.label} is 0, and no padding stands for its shift; "
            "bias_maps=true repairs it for a known size"
        )
    return ""


def _build(scaled: Layer, norm: Layer, name: str) -> Callable[[], Value]:
    def build() -> Value:
        assert norm.bias is not None
        x = norm.x
        column = (norm.filters, *(1,) * norm.axes)
        shift = reshaped(norm.bias() / reshaped(norm.weight(), (norm.filters,)), column)
        return emit_layer(replace(scaled, x=x + shift), name)

    return build
