"""Convolutions and dense layers with what follows them, and their gradients."""

from __future__ import annotations

from typing import Any

from branchgraph.backends.onednn.kernels.common import computable, desc, post_ops
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Desc,
    OneDNNError,
    Primitive,
    convolution_backward_data,
    convolution_backward_weights,
    convolution_forward,
    inner_product_forward,
    matmul,
    reorder,
)
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.compiler.program import Instruction
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.reduce import ReduceSum


def convolution(site: Site) -> bool:
    """A convolution, its bias, and post-ops."""
    op = site.op
    if not isinstance(op, Conv) or not computable(*site.inputs):
        return False
    first = site.first
    x, weight, *bias = (site.builder.tensors[b] for b in first.reads)
    appended = post_ops(site, site.cluster.members[1:], first.writes[0])
    if appended is None:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0], last=True)
    if not computable(out):
        return False
    weight = _grouped(weight, op.groups)
    try:
        primitive = convolution_forward(
            desc(x), Desc.any(weight.shape, weight.dtype), desc(bias[0]) if bias else None,
            desc(out), **_window(op), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    packed = _packed(site, weight, primitive.desc("weights"))
    reads = {Arg.SRC: x, Arg.WEIGHTS: packed, **operands}
    if bias:
        reads[Arg.BIAS] = bias[0]
    site.primitive(primitive, reads, {Arg.DST: out})
    return True


def convolution_data_gradient(site: Site) -> bool:
    """The transpose of a convolution in its input."""
    op = site.op
    if not isinstance(op, ConvTranspose) or not computable(*site.inputs):
        return False
    dy, weight = site.inputs
    out = site.output(site.first.writes[0], last=True)
    if not computable(out):
        return False
    weight = _grouped(weight, op.groups)
    layout = Desc.any(weight.shape, weight.dtype)
    window = _window(op)
    try:
        hint = convolution_forward(desc(out), layout, None, desc(dy), **window, training=True)
        primitive = convolution_backward_data(desc(out), layout, desc(dy), **window, hint=hint)
    except OneDNNError:
        return False
    packed = _packed(site, weight, primitive.desc("weights"))
    site.primitive(primitive, {Arg.DIFF_DST: dy, Arg.WEIGHTS: packed}, {Arg.DIFF_SRC: out})
    return True


def convolution_weight_gradient(site: Site) -> bool:
    """The transpose of a convolution in its weight, and in its bias where that is asked for."""
    op = site.op
    if not isinstance(op, ConvWeightGradient) or not computable(*site.inputs):
        return False
    x, dy = site.inputs
    out = site.output(site.first.writes[0])
    if not computable(out):
        return False
    weight = _grouped(out, op.groups)
    layout = Desc.any(weight.shape, weight.dtype)
    window = _window(op)
    sums = _bias_gradient(site)
    try:
        bias = None if sums is None else Desc.strided(dy.shape[1:2], dy.dtype)
        hint = convolution_forward(desc(x), layout, bias, desc(dy), **window, training=True)
        primitive = convolution_backward_weights(
            desc(x), layout, bias, desc(dy), **window, hint=hint
        )
    except OneDNNError:
        return False
    made = primitive.desc("diff_weights")
    writes: dict[int, Tensor] = {}
    if sums is not None:
        writes[Arg.DIFF_BIAS] = site.output(sums.writes[0])
        site.builder.done.add(sums.writes[0])
    reads = {Arg.SRC: x, Arg.DIFF_DST: dy}
    if made == desc(weight):
        site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: weight, **writes})
        return True
    blocked = site.builder.opaque(made)
    site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: blocked, **writes})
    site.primitive(reorder(made, desc(weight)), {Arg.SRC: blocked}, {Arg.DST: weight})
    return True


def _bias_gradient(site: Site) -> Instruction | None:
    """The instruction that sums the same cotangent over all but its channels."""
    dy = site.first.reads[1]
    axes = (0, *range(2, len(site.shape(dy))))
    for reader in site.builder.readers(dy):
        op = reader.op
        sums = isinstance(op, ReduceSum) and op.axes == axes and not op.keepdims
        here = reader in site.builder.instructions and reader.writes[0] not in site.builder.done
        if sums and here:
            return reader
    return None


def dense(site: Site) -> bool:
    """A dense layer, its bias, and post-ops."""
    if not isinstance(site.op, Dense) or not computable(*site.inputs):
        return False
    first = site.first
    x, weight, *bias = (site.builder.tensors[b] for b in first.reads)
    appended = post_ops(site, site.cluster.members[1:], first.writes[0])
    if appended is None or len(x.shape) != 2:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0])
    try:
        primitive = inner_product_forward(
            desc(x), Desc.any(weight.shape, weight.dtype), desc(bias[0]) if bias else None,
            desc(out), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    packed = _packed(site, weight, primitive.desc("weights"))
    reads = {Arg.SRC: x, Arg.WEIGHTS: packed, **operands}
    if bias:
        reads[Arg.BIAS] = bias[0]
    site.primitive(primitive, reads, {Arg.DST: out})
    return True


def product(site: Site) -> bool:
    """A product of matrices, or of stacks of them."""
    op = site.op
    if not isinstance(op, MatMul) or not computable(*site.inputs):
        return False
    a, b = site.inputs
    if len(a.shape) != len(b.shape) or len(a.shape) < 2:
        return False
    a = _transposed(a) if op.transpose_a else a
    b = _transposed(b) if op.transpose_b else b
    out = site.output(site.first.writes[0])
    if not computable(out):
        return False
    try:
        primitive = matmul(desc(a), desc(b), None, desc(out), attributes=Attributes())
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: a, Arg.WEIGHTS: b}, {Arg.DST: out})
    return True


def _transposed(tensor: Tensor) -> Tensor:
    order = (*range(len(tensor.shape) - 2), -1, -2)
    return tensor.viewed(
        tuple(tensor.shape[a] for a in order), tuple(tensor.strides[a] for a in order)
    )


def _window(op: Conv | ConvTranspose | ConvWeightGradient) -> dict[str, Any]:
    return {
        "strides": op.stride,
        "dilates": tuple(d - 1 for d in op.dilation),
        "pad_l": op.begin,
        "pad_r": op.end,
    }


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """A weight as [groups, filters of each, ...] where there are groups."""
    if groups == 1:
        return weight
    filters = weight.shape[0] // groups
    shape = (groups, filters, *weight.shape[1:])
    return weight.viewed(shape, (filters * weight.strides[0], *weight.strides))


def _packed(site: Site, weight: Tensor, layout: Desc) -> Tensor:
    """A weight in the layout that a primitive chose."""
    if layout == desc(weight):
        return weight
    return site.builder.packed(site.cluster, weight, layout, _pack, Arg.SRC, Arg.DST)


def _pack(weight: Tensor, layout: Desc) -> Primitive:
    return reorder(desc(weight), layout)
