"""Convolutions and dense layers with what follows them, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import (
    arranged,
    computable,
    copied,
    desc,
    fpmath,
    post_ops,
    temporary,
)
from branchgraph.backends.onednn.kernels.held import cast_back
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Desc,
    Primitive,
    convolution_backward_data,
    convolution_backward_weights,
    convolution_forward,
    inner_product_forward,
    matmul,
    reorder,
)
from branchgraph.backends.onednn.tensors import Shape, Tensor, row_major
from branchgraph.compiler.program import Instruction
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.types import DType


def convolution(site: Site) -> bool:
    """A convolution, its bias, and post-ops."""
    op = site.op
    if not isinstance(op, Conv) or not computable(*site.inputs):
        return False
    first = site.first
    x, weight, *bias = (site.builder.tensors[b] for b in first.reads)
    x = arranged(site, x)
    appended = post_ops(
        site, site.cluster.members[1:], first.writes[0], start=Attributes(fpmath=fpmath(site))
    )
    if appended is None:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0], last=True)
    if not computable(out):
        return False
    weight = grouped(weight, op.groups)
    try:
        primitive = convolution_forward(
            desc(x), Desc.any(weight.shape, x.dtype), desc(bias[0]) if bias else None,
            desc(out), **window(op), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    laid_out = packed(site, weight, primitive.desc("weights"))
    reads = {Arg.SRC: x, Arg.WEIGHTS: laid_out, **operands}
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
    dy = arranged(site, dy)
    out = site.output(site.first.writes[0], last=True)
    if not computable(out):
        return False
    weight = grouped(weight, op.groups)
    layout = Desc.any(weight.shape, dy.dtype)
    geometry = window(op)
    attributes = Attributes(fpmath=fpmath(site))
    try:
        hint = convolution_forward(desc(out), layout, None, desc(dy), **geometry, training=True)
        primitive = convolution_backward_data(
            desc(out), layout, desc(dy), **geometry, hint=hint, attributes=attributes
        )
    except OneDNNError:
        return False
    laid_out = packed(site, weight, primitive.desc("weights"))
    site.primitive(primitive, {Arg.DIFF_DST: dy, Arg.WEIGHTS: laid_out}, {Arg.DIFF_SRC: out})
    return True


def convolution_weight_gradient(site: Site) -> bool:
    """The transpose of a convolution in its weight, and in its bias where that is asked for."""
    op = site.op
    if not isinstance(op, ConvWeightGradient) or not computable(*site.inputs):
        return False
    x, dy = (arranged(site, t) for t in site.inputs)
    out = _gradient(site, site.first.writes[0])
    if not computable(out):
        return False
    weight = grouped(out, op.groups)
    layout = Desc.any(weight.shape, weight.dtype)
    geometry = window(op)
    sums = bias_gradient(site)
    bias = None if sums is None else _gradient(site, sums.writes[0])
    attributes = Attributes(fpmath=fpmath(site))
    try:
        hint = convolution_forward(
            desc(x), Desc.any(weight.shape, x.dtype), None if bias is None else desc(bias),
            desc(dy), **geometry, training=True,
        )  # fmt: skip
        primitive = convolution_backward_weights(
            desc(x), layout, None if bias is None else desc(bias), desc(dy), **geometry,
            hint=hint, attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    made = primitive.desc("diff_weights")
    writes: dict[int, Tensor] = {}
    if sums is not None and bias is not None:
        writes[Arg.DIFF_BIAS] = bias
        site.builder.done.add(sums.writes[0])
    reads = {Arg.SRC: x, Arg.DIFF_DST: dy}
    if made == desc(weight):
        site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: weight, **writes})
        return True
    blocked = site.builder.opaque(made)
    site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: blocked, **writes})
    site.primitive(reorder(made, desc(weight)), {Arg.SRC: blocked}, {Arg.DST: weight})
    return True


def _gradient(site: Site, buffer: int) -> Tensor:
    """Where a parameter's gradient goes: in float32 if that is what it is cast to."""
    out = site.output(buffer)
    if out.dtype is DType.BF16 and cast_back(site, buffer, DType.F32):
        return site.builder.place(buffer, temporary(site, out.shape, DType.F32, last=False))
    return out


def bias_gradient(site: Site) -> Instruction | None:
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
    """A dense layer, its bias, and post-ops; x may be planes that the type says are flat."""
    if not isinstance(site.op, Dense) or not computable(*site.inputs):
        return False
    first = site.first
    x, weight, *bias = (site.builder.tensors[b] for b in first.reads)
    if len(x.shape) > 2:
        return _dense(site, x, _as_planes(site, weight, x.shape), bias) or _dense(
            site, _as_rows(site, x), weight, bias
        )
    x = arranged(site, x)
    if not site.builder.fixed(weight) and weight.dtype is x.dtype:
        return _dense_product(site, x, weight, bias) or _dense(site, x, weight, bias)
    return _dense(site, x, weight, bias)


def _dense_product(site: Site, x: Tensor, weight: Tensor, bias: Sequence[Tensor]) -> bool:
    """x W^T + b as a product of matrices: packing W costs more than the layer where it changes."""
    appended = post_ops(
        site, site.cluster.members[1:], site.first.writes[0],
        start=Attributes(fpmath=fpmath(site)),
    )  # fmt: skip
    if appended is None:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0])
    row = [b.viewed((1, b.size), row_major((1, b.size))) for b in bias]
    try:
        primitive = matmul(
            _matrix(x), _matrix(_transposed(weight)), desc(row[0]) if row else None,
            Desc.strided(out.shape, out.dtype), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    reads = {Arg.SRC: x, Arg.WEIGHTS: weight, **operands}
    if row:
        reads[Arg.BIAS] = row[0]
    site.primitive(primitive, reads, {Arg.DST: out})
    return True


def _dense(site: Site, x: Tensor, weight: Tensor, bias: Sequence[Tensor]) -> bool:
    appended = post_ops(
        site, site.cluster.members[1:], site.first.writes[0],
        start=Attributes(fpmath=fpmath(site)),
    )  # fmt: skip
    if appended is None:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0])
    try:
        primitive = inner_product_forward(
            desc(x), Desc.any(weight.shape, x.dtype), desc(bias[0]) if bias else None,
            desc(out), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    laid_out = packed(site, weight, primitive.desc("weights"))
    reads = {Arg.SRC: x, Arg.WEIGHTS: laid_out, **operands}
    if bias:
        reads[Arg.BIAS] = bias[0]
    site.primitive(primitive, reads, {Arg.DST: out})
    return True


def _as_planes(site: Site, weight: Tensor, shape: Shape) -> Tensor:
    """The weight [O, C H W] of a dense layer as [O, C, H, W]."""
    weight = arranged(site, weight, last=False)
    planes = (weight.shape[0], *shape[1:])
    return weight.viewed(planes, row_major(planes))


def _as_rows(site: Site, x: Tensor) -> Tensor:
    """Planes copied to rows [N, C H W]."""
    copy = copied(site, x, temporary(site, x.shape, x.dtype, last=False))
    rows = (x.shape[0], prod(x.shape[1:]))
    return copy.viewed(rows, row_major(rows))


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
    buffer = site.first.writes[0]
    out = _gradient(site, buffer)
    if not computable(out):
        return False
    attributes = Attributes(fpmath=fpmath(site))
    try:
        primitive = matmul(
            _matrix(a), _matrix(b), None, Desc.strided(out.shape, out.dtype), attributes=attributes
        )
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: a, Arg.WEIGHTS: b}, {Arg.DST: out})
    return True


def _matrix(tensor: Tensor) -> Desc:
    """A stack of matrices, with strides of single rows and columns that make it one to oneDNN."""
    *_, rows, columns = tensor.shape
    *outer, down, across = tensor.strides
    if rows == 1:
        down = columns if across == 1 else 1
    elif columns == 1:
        across = rows if down == 1 else 1
    return Desc.strided(tensor.shape, tensor.dtype, (*outer, down, across))


def _transposed(tensor: Tensor) -> Tensor:
    order = (*range(len(tensor.shape) - 2), -1, -2)
    return tensor.viewed(
        tuple(tensor.shape[a] for a in order), tuple(tensor.strides[a] for a in order)
    )


def window(op: Any) -> dict[str, Any]:
    """Geometry for oneDNN, whose dilation of 0 means neighbours."""
    return {
        "strides": op.stride,
        "dilates": tuple(d - 1 for d in op.dilation),
        "pad_l": op.begin,
        "pad_r": op.end,
    }


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A weight as [groups, filters of each, ...] where there are groups."""
    if groups == 1:
        return weight
    filters = weight.shape[0] // groups
    shape = (groups, filters, *weight.shape[1:])
    return weight.viewed(shape, (filters * weight.strides[0], *weight.strides))


def packed(site: Site, weight: Tensor, layout: Desc) -> Tensor:
    """A weight in the layout that a primitive chose."""
    if layout == desc(weight):
        return weight
    return site.builder.packed(site.cluster, weight, layout, _pack, Arg.SRC, Arg.DST)


def _pack(weight: Tensor, layout: Desc) -> Primitive:
    return reorder(desc(weight), layout)
