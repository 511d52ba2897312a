"""Element-wise ops, merges, gates, softmax and concatenation on activations."""

from __future__ import annotations

import numpy as np

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import (
    arranged,
    binary_of,
    computable,
    copied,
    desc,
    function_of,
    plain,
    post_ops,
    ranked,
    replaceable,
)
from branchgraph.backends.onednn.kernels.host import follows_channels_last
from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Binary,
    Eltwise,
    binary,
    eltwise_backward,
    eltwise_forward,
    post_op_operand,
    softmax_forward,
)
from branchgraph.backends.onednn.primitives import Softmax as Variant
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.ir.ops.activation import LogSoftmax, Relu, ReluGradient, Softmax
from branchgraph.ir.ops.elementwise import Divide, Subtract
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.merge import Concat, Mean
from branchgraph.ir.ops.reshape import Embed, Pad

#: Elements from which a primitive beats NumPy, whose calls cost less.
_WORTH = 256


def merge(site: Site) -> bool:
    """Arithmetic on two or more operands, some of which may be broadcast, then post-ops."""
    first = site.first
    arithmetic = binary_of(site.op) is not None or isinstance(site.op, (Mean, Subtract, Divide))
    if not arithmetic or not computable(*site.inputs) or len(first.reads) < 2:
        return False
    last = follows_channels_last(site, first.writes[0])
    out = site.output(site.last.writes[0], last=last)
    if out.size < _WORTH:
        return False
    operands = [_operand(site, site.builder.tensors[b], out, last) for b in first.reads]
    ordered = _ordered(site, operands, out)
    if ordered is None:
        return False
    algorithm, (a, b, *more), then = ordered
    start = Attributes()
    reads: dict[int, Tensor] = {}
    for number, tensor in enumerate(more):
        reads[post_op_operand(number)] = tensor
        start = start.binary(algorithm, desc(tensor))
    if then is not None:
        start = start.eltwise(Eltwise.LINEAR, then)
    rest = post_ops(site, site.cluster.members[1:], first.writes[0], start=start, last=last)
    if rest is None:
        return False
    attributes, others = rest
    return _combined(site, algorithm, a, b, out, attributes, {**reads, **others})


def _ordered(
    site: Site, operands: list[Tensor], out: Tensor
) -> tuple[Binary, list[Tensor], float | None] | None:
    """The function, the operands with one of full shape first, and a factor for the result."""
    full = [t.shape == out.shape for t in operands]
    if not any(full):
        return None
    algorithm = binary_of(site.op)
    if isinstance(site.op, Mean):
        return Binary.ADD, operands, 1.0 / len(operands)
    if algorithm is not None:
        return algorithm, sorted(operands, key=lambda t: t.shape != out.shape), None
    if isinstance(site.op, Subtract):
        a, b = operands
        return (Binary.SUB, [a, b], None) if full[0] else (Binary.SUB, [b, a], -1.0)
    if isinstance(site.op, Divide) and full[0]:
        return Binary.DIV, operands, None
    return None


def _operand(site: Site, tensor: Tensor, out: Tensor, last: bool) -> Tensor:
    """An operand in the rank and the order of the result."""
    found = ranked(tensor, len(out.shape))
    assert found is not None
    return arranged(site, found, last=last)


def _combined(
    site: Site, algorithm: Binary, a: Tensor, b: Tensor, out: Tensor, attributes: Attributes,
    others: dict[int, Tensor],
) -> bool:  # fmt: skip
    """One primitive; samples times numbers of their own are rows times numbers for oneDNN."""
    rows = out.shape[0]
    if b.shape != out.shape and b.size == rows == b.shape[0] and not others:
        a, b = plain(a, (rows, out.size // rows)), plain(b, (rows, 1))
        out = plain(out, a.shape)
    try:
        primitive = binary(algorithm, desc(a), desc(b), desc(out), attributes=attributes)
    except OneDNNError:
        return False
    reads = {Arg.SRC: a, Arg.SRC_1: b, **others}
    over = replaceable(out, [a], (t.buffer for t in reads.values()))
    site.primitive(primitive, reads, {Arg.DST: out}, over)
    return True


def gate(site: Site) -> bool:
    """The product with a gate; where the gate is 0 the product is then set to 0.

    A product with 0 would not do: 0 times infinity is NaN.
    """
    if not isinstance(site.op, Select) or not computable(*site.inputs):
        return False
    value, opening = site.inputs
    buffer = site.first.writes[0]
    last = follows_channels_last(site, buffer)
    out = site.output(buffer, last=last)
    if out.size < _WORTH:
        return False
    value, b = _operand(site, value, out, last), _operand(site, opening, out, last)
    if not _combined(site, Binary.MUL, value, b, out, Attributes(), {}):
        return False

    def emit(place: Place) -> list[Step]:
        return [(_close, (place.array(b), place.array(out)), None)]

    site.add("numpy closed gates", [b.buffer], [out.buffer], emit)
    return True


def _close(gate: np.ndarray, value: np.ndarray) -> None:
    closed = gate == 0
    if closed.any():
        np.copyto(value, 0, where=closed)


def function(site: Site) -> bool:
    """An element-wise function of one operand."""
    found = function_of(site.op)
    if found is None or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    if x.size < _WORTH and not (isinstance(site.op, Relu) and x.shape):
        return False
    buffer = site.first.writes[0]
    last = follows_channels_last(site, buffer)
    x, out = arranged(site, x, last=last), site.output(buffer, last=last)
    try:
        primitive = eltwise_forward(found.algorithm, desc(x), desc(out), found.alpha, found.beta)
    except OneDNNError:
        return False
    over = replaceable(out, [x], [x.buffer])
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out}, over)
    return True


def relu_gradient(site: Site) -> bool:
    """dy where the result of the ReLU is positive."""
    if not isinstance(site.op, ReluGradient) or not computable(*site.inputs):
        return False
    if not site.inputs[0].shape:
        return False
    buffer = site.first.writes[0]
    last = follows_channels_last(site, buffer)
    y, dy = (arranged(site, t, last=last) for t in site.inputs)
    out = site.output(buffer, last=last)
    try:
        hint = eltwise_forward(Eltwise.RELU, desc(y), desc(y), training=True)
        primitive = eltwise_backward(
            Eltwise.RELU_FROM_RESULT, desc(out), desc(dy), desc(y), hint=hint
        )
    except OneDNNError:
        return False
    over = replaceable(out, [dy], [y.buffer, dy.buffer])
    site.primitive(primitive, {Arg.DST: y, Arg.DIFF_DST: dy}, {Arg.DIFF_SRC: out}, over)
    return True


def softmax(site: Site) -> bool:
    """Softmax along an axis, or its logarithm."""
    op = site.op
    if not isinstance(op, (Softmax, LogSoftmax)) or not computable(*site.inputs):
        return False
    if isinstance(op, LogSoftmax) and site.inputs[0].size < _WORTH:
        return False
    buffer = site.first.writes[0]
    last = follows_channels_last(site, buffer)
    x, out = arranged(site, site.inputs[0], last=last), site.output(buffer, last=last)
    variant = Variant.ACCURATE if isinstance(op, Softmax) else Variant.LOG
    try:
        primitive = softmax_forward(desc(x), desc(out), op.axis, variant)
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out})
    return True


def concatenation(site: Site) -> bool:
    """Operands side by side: one reorder each, which is faster than oneDNN's concatenation."""
    op = site.op
    if not isinstance(op, Concat) or not computable(*site.inputs):
        return False
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    if out.size < _WORTH:
        return False
    start = 0
    for x in site.inputs:
        copied(site, x, _part(out, op.axis, start, x.shape[op.axis]))
        start += x.shape[op.axis]
    return True


def embedded(site: Site) -> bool:
    """An operand among zeros, or other values: they are filled in, and it is copied over."""
    op = site.op
    if not isinstance(op, (Embed, Pad)) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    if out.size < _WORTH:
        return False
    inner, value = out, 0.0
    if isinstance(op, Pad):
        value = op.value
        for axis, begin in enumerate(op.begin):
            inner = _part(inner, axis, begin, x.shape[axis])
    else:
        inner = _part(out, op.axis, op.start, x.shape[op.axis], op.step)

    def emit(place: Place) -> list[Step]:
        return [(place.array(out).fill, (value,), None)]

    site.add("numpy fill", [], [buffer], emit)
    copied(site, x, inner)
    return True


def _part(out: Tensor, axis: int, start: int, size: int, step: int = 1) -> Tensor:
    """A slice of `out` along an axis."""
    shape = (*out.shape[:axis], size, *out.shape[axis + 1 :])
    stride = out.strides[axis]
    strides = (*out.strides[:axis], stride * step, *out.strides[axis + 1 :])
    return out.viewed(shape, strides, start * stride * out.dtype.itemsize)
